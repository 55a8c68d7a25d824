"""Adapters beside weights that stay: what they compute, what is trained, and the way to a file and back."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import gemma_jax as gj
from gemma_jax import matformer, train
from gemma_jax.nn.decoder import Decoder
from gemma_jax.nn.layers import CPU_LAYOUT
from gemma_jax.nn.paths import parameters, weights
from gemma_jax.nn.scanned import stack
from gemma_jax.train import lora

TOKENS = np.random.default_rng(0).integers(5, 128, (2, 16))
BATCH = train.Batch(jnp.asarray(TOKENS))

forward = jax.jit(lambda model, tokens: model(tokens))
losses = jax.jit(train.next_token_loss)


def drawn(model, scale=0.1):
    """The adapter with both factors away from zero."""
    found = lora.factors(model)
    keys = jax.random.split(jax.random.key(7), len(found))
    values = (scale * jax.random.normal(key, f[...].shape) for key, f in zip(keys, found.values(), strict=True))
    return lora.with_factors(model, {path: f.replace(v) for (path, f), v in zip(found.items(), values, strict=True)})


def merged(model, adapted):
    """The model with the changes added to its weights, in numpy."""
    whole = jax.tree.map(lambda x: x, model)
    for path, change in lora.changes(adapted).items():
        place = weights(whole)[path]
        value = np.array(place.param[...])
        place.view(value)[...] += change.scale * np.tensordot(change.a, change.b, 1)
        place.param.set_raw_value(jnp.asarray(value))
    return whole


@pytest.fixture(scope="module")
def adapted(small):
    return lora.attach(small, 3, alpha=6, seed=1)


def test_a_new_adapter_changes_nothing(small, adapted):
    np.testing.assert_allclose(forward(adapted, TOKENS), forward(small, TOKENS), atol=5e-6)  # other programs
    assert not any("lora" in path or "pairs" in path for path in parameters(small))


def test_first_factors_are_normal_by_their_inputs_and_second_ones_zero(small):
    found = lora.factors(lora.attach(small, 200))
    assert len(found) == 2 * 7 * len(small.layers)
    down, up = found["layers_0/mlp/down/kernel/pairs/down/a"], found["layers_0/mlp/up/kernel/pairs/up/a"]
    assert down[...].shape == (48, 200)
    assert float(jnp.std(down[...])) == pytest.approx(48**-0.5, rel=0.05)
    assert float(jnp.std(up[...])) == pytest.approx(32**-0.5, rel=0.05)
    out = found["layers_1/attn/o/kernel/pairs/o/a"]
    assert out[...].shape == (4, 8, 200)
    assert float(jnp.std(out[...])) == pytest.approx(32**-0.5, rel=0.05)
    values = [np.asarray(f[...]) for path, f in found.items() if path.endswith("/a")]
    assert len({value.tobytes() for value in values}) == len(values)
    assert all(not np.any(f[...]) for path, f in found.items() if path.endswith("/b"))
    again = lora.factors(lora.attach(small, 200, seed=1))
    assert not np.array_equal(again["layers_0/mlp/down/kernel/pairs/down/a"][...], down[...])


def test_a_seed_draws_the_same_whatever_the_layout(small, with_random_norms):
    fused = Decoder(small.config, rngs=nnx.Rngs(5), layout=CPU_LAYOUT)
    want = lora.changes(lora.attach(small, 3, seed=2))
    for other in (fused, stack(small)):
        got = lora.changes(lora.attach(other, 3, seed=2))
        assert set(got) == set(want)
        for path, change in want.items():
            np.testing.assert_array_equal(got[path].a, change.a, err_msg=path)


def test_a_slice_that_shares_weights_is_adapted(small):
    gemma = gj.Gemma(dataclasses.replace(small.config, name="parent"), small)
    lent, own = (matformer.slice(gemma, ffw=16, copy=copy).model for copy in (False, True))
    one, other = (lora.attach(model, 2, seed=1) for model in (lent, own))
    assert lora.changes(one).keys() == lora.changes(other).keys()
    np.testing.assert_allclose(forward(drawn(one), TOKENS), forward(drawn(other), TOKENS), atol=5e-6)


@pytest.mark.parametrize("name", ["small", "small_3n"])
def test_an_adapted_model_is_the_model_with_the_changes_in_its_weights(request, name):
    model = request.getfixturevalue(name)
    adapted = drawn(lora.attach(model, 3, alpha=6), scale=0.05)
    want = forward(merged(model, adapted), TOKENS)
    assert float(jnp.abs(want - forward(model, TOKENS)).max()) > 0.1
    np.testing.assert_allclose(forward(adapted, TOKENS), want, atol=5e-5)


def test_gradients_of_factors_are_those_of_the_merged_weights(small, adapted):
    adapted = drawn(adapted)
    got = jax.jit(jax.grad(lambda f: train.next_token_loss(lora.with_factors(adapted, f), BATCH)))(
        lora.factors(adapted)
    )
    whole = parameters(jax.jit(jax.grad(train.next_token_loss))(merged(small, adapted), BATCH))
    for path, change in lora.changes(adapted).items():
        gradient, name = np.asarray(whole[path][...]), path.split("/")[-2]
        inputs = change.a.ndim - 1
        outputs = tuple(range(inputs, gradient.ndim))
        want_a = change.scale * np.tensordot(gradient, change.b, (outputs, tuple(range(1, change.b.ndim))))
        want_b = change.scale * np.tensordot(change.a, gradient, (tuple(range(inputs)), tuple(range(inputs))))
        for side, want in (("a", want_a), ("b", want_b)):
            value = got[f"{path}/pairs/{name}/{side}"][...]
            np.testing.assert_allclose(value, want, atol=2e-5 * max(1.0, np.abs(want).max()), err_msg=f"{path} {side}")


def test_fused_weights_are_adapted_one_by_one(make_config, with_random_norms):
    fused = with_random_norms(Decoder(make_config(num_layers=1), rngs=nnx.Rngs(5), layout=CPU_LAYOUT))
    adapted = drawn(lora.attach(fused, 2, targets=("q", "v", "up", "down")))
    assert {path.split("/", 1)[1] for path in lora.changes(adapted)} == {
        "attn/q/kernel", "attn/v/kernel", "mlp/up/kernel", "mlp/down/kernel",
    }  # fmt: skip
    np.testing.assert_allclose(forward(adapted, TOKENS), forward(merged(fused, adapted), TOKENS), atol=2e-5)


def test_stacked_layers_with_an_adapter_are_the_same_model(adapted):
    adapted = drawn(adapted)
    stacked = stack(adapted)
    np.testing.assert_allclose(forward(stacked, TOKENS), forward(adapted, TOKENS), atol=2e-5)
    want, got = lora.changes(adapted), lora.changes(stacked)
    assert set(want) == set(got)
    for path, change in want.items():
        np.testing.assert_array_equal(got[path].a, change.a)
        np.testing.assert_array_equal(got[path].b, change.b)
        assert got[path].scale == change.scale == 2


@pytest.mark.parametrize("is_stacked", [False, True])
def test_training_descends_with_the_factors_alone(small, is_stacked):
    model = lora.attach(stack(small) if is_stacked else small, 4, targets=("q", "v", "down"))
    before = {path: np.asarray(param[...]) for path, param in parameters(model).items()}
    optimizer = optax.sgd(0.3)
    state, step = train.start(model, optimizer), train.make_step(optimizer)
    found = []
    for _ in range(12):
        state, metrics = step(state, BATCH, model)
        found.append(float(metrics["loss"]))
    assert found[0] == pytest.approx(float(losses(small, BATCH)), rel=1e-5)
    assert found[-1] < 0.9 * found[0]
    assert set(state.weights) == set(lora.factors(model))
    for path, param in parameters(model).items():
        np.testing.assert_array_equal(param[...], before[path])
    after = train.finished(model, state)
    assert float(losses(after, BATCH)) < found[-1]


def test_factors_of_a_bfloat16_model_are_float32(make_config):
    model = lora.attach(Decoder(make_config(num_layers=1), rngs=nnx.Rngs(5), dtype="bfloat16"), 2)
    state, step = train.start(model, optax.sgd(1e-2)), train.make_step(optax.sgd(1e-2))
    state, _ = step(state, BATCH, model)
    assert {factor[...].dtype.name for factor in state.weights.values()} == {"float32"}
    assert any(np.any(np.asarray(f[...])) for path, f in state.weights.items() if path.endswith("/b"))


@pytest.mark.parametrize("format", ["huggingface", "gguf", "orbax"])
def test_a_saved_adapter_is_merged_when_a_model_is_loaded_with_it(tmp_path, make_config, format):
    config = dataclasses.replace(make_config(num_layers=2), name="parent")
    gemma = gj.Gemma(config, Decoder(config, rngs=nnx.Rngs(5)))
    gemma.save(tmp_path / "model")
    adapted = drawn(lora.attach(gemma.model, 3, alpha=1.5, targets=("q", "o", "gate")))
    folder = tmp_path / ("adapter.gguf" if format == "gguf" else "adapter")
    lora.save(adapted, folder, format)
    loaded = gj.load(tmp_path / "model", lora=folder, dtype="float32", progress=False)
    np.testing.assert_allclose(loaded.logits(TOKENS), forward(adapted, TOKENS), atol=2e-5)


def test_what_cannot_be_adapted_is_said(small, adapted):
    for rank in (0, 2.5, True):
        with pytest.raises(ValueError, match=f"rank is {rank}; wanted a whole number"):
            lora.attach(small, rank)
    with pytest.raises(ValueError, match="alpha is 0; wanted a number above 0"):
        lora.attach(small, 2, alpha=0)
    with pytest.raises(TypeError, match=r"a Gemma cannot have an adapter; wanted a Decoder, such as gemma\.model"):
        lora.attach(gj.Gemma(small.config, small), 2)
    with pytest.raises(ValueError, match="a new checkpoint needs a model without an adapter"):
        gj.Gemma(small.config, adapted).save("nowhere")
    with pytest.raises(ValueError, match=r"targets are \['q', 'router'\]; wanted some of q, k, v, o"):
        lora.attach(small, 2, targets=("q", "router"))
    with pytest.raises(ValueError, match="has an adapter already"):
        lora.attach(adapted, 2)
    with pytest.raises(ValueError, match="has no adapter"):
        lora.changes(small)
    state, step = train.start(adapted, optax.sgd(0.1)), train.make_step(optax.sgd(0.1))
    with pytest.raises(ValueError, match="leave it out"):
        train.make_step(optax.sgd(0.1), dtype="bfloat16")(state, BATCH, adapted)
    with pytest.raises(ValueError, match=r"an adapter is trained by step\(state, batch, model\)"):
        step(state, BATCH)
    with pytest.raises(ValueError, match=r"all weights by step\(state, batch\)"):
        step(train.start(small, optax.sgd(0.1)), BATCH, adapted)
    for other in (lora.attach(small, 2), lora.attach(small, 3, targets=["q"]), small):
        with pytest.raises(ValueError, match="the state is of another model: layers_"):
            step(state, BATCH, other)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
