"""A training step of all weights: what it computes in, what it keeps, what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from gemma_jax import train
from gemma_jax.configs.config import VisionConfig
from gemma_jax.nn.decoder import Decoder
from gemma_jax.nn.paths import parameters
from gemma_jax.nn.scanned import stack

TOKENS = np.random.default_rng(0).integers(0, 120, (2, 16))
BATCH = train.Batch(jnp.asarray(TOKENS))


@pytest.fixture(scope="module")
def vision_model(small):
    tower = VisionConfig(num_layers=1, width=16, num_heads=2, ffw_width=16, patch_size=7, image_size=28,
                         num_soft_tokens=4, soft_token=124, begin_token=125, end_token=126)  # fmt: skip
    return Decoder(dataclasses.replace(small.config, vision=tower), rngs=nnx.Rngs(3))


def gradients(model, *, is_remat):
    step = jax.jit(jax.value_and_grad(lambda m: train.next_token_loss(m, BATCH, is_remat=is_remat)))
    return step(model)


@pytest.mark.parametrize("name", ["stacked", "small_3n"])
def test_layers_that_are_computed_again_give_the_same_gradients(request, name):
    model = stack(request.getfixturevalue("small")) if name == "stacked" else request.getfixturevalue(name)
    (want, whole), (got, remat) = (gradients(model, is_remat=flag) for flag in (False, True))
    assert float(got) == pytest.approx(float(want), rel=1e-6)
    for path, param in parameters(whole).items():
        value = np.asarray(param[...])
        scale = np.abs(value).max()
        np.testing.assert_allclose(parameters(remat)[path][...], value, atol=1e-4 * scale + 1e-9, err_msg=path)


def test_layers_that_are_computed_again_keep_less(small):
    """Of a pass of 16 tokens what goes from forward to backward: the residuals that JAX keeps."""

    def kept(is_remat):
        _, residuals = jax.eval_shape(
            lambda m: jax.vjp(lambda m: train.next_token_loss(m, BATCH, is_remat=is_remat), m), small
        )
        return sum(x.size for x in jax.tree.leaves(residuals))

    assert kept(True) < 0.8 * kept(False)


def test_a_step_is_the_optimizers_on_the_losss_gradient(small):
    optimizer = optax.sgd(0.5)
    want, gradient = gradients(small, is_remat=False)
    state, metrics = train.make_step(optimizer)(train.start(small, optimizer), BATCH)
    assert float(metrics["loss"]) == pytest.approx(float(want), rel=1e-6)
    assert float(metrics["gradient_norm"]) == pytest.approx(float(optax.tree.norm(gradient)), rel=1e-5)
    for path, param in parameters(small).items():
        moved = param[...] - 0.5 * parameters(gradient)[path][...]
        np.testing.assert_allclose(parameters(state.weights)[path][...], moved, atol=2e-6, err_msg=path)


def test_weights_keep_their_dtype_where_another_is_computed_in(small):
    optimizer = optax.adam(1e-3)
    state, step = train.start(small, optimizer), train.make_step(optimizer, dtype="bfloat16")
    state, metrics = step(state, BATCH)
    want = float(gradients(small, is_remat=False)[0])
    assert {param[...].dtype.name for param in parameters(state.weights).values()} == {"float32"}
    assert float(metrics["loss"]) != want
    assert float(metrics["loss"]) == pytest.approx(want, rel=0.02)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(small))


def test_a_wrong_batch_leaves_the_state_as_it_was(small):
    optimizer = optax.sgd(0.5)
    state, step = train.start(small, optimizer), train.make_step(optimizer)
    with pytest.raises(ValueError, match=r"tokens are int32\[16\]; wanted integers \[B, T\]"):
        step(state, train.Batch(jnp.asarray(TOKENS[0])))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_towers_are_left_as_they_are(vision_model):
    """Weight decay moves every weight that it sees."""
    optimizer = optax.adamw(1e-1, weight_decay=0.5)
    state, _ = train.make_step(optimizer)(train.start(vision_model, optimizer), BATCH)
    trained, before = parameters(train.finished(vision_model, state)), parameters(vision_model)
    assert set(trained) == set(before)
    assert any(path.startswith("vision/") for path in before)
    for path, param in before.items():
        is_same = np.array_equal(trained[path][...], param[...])
        assert is_same == path.startswith(("vision/", "mm/")), path


@pytest.mark.parametrize("dtype", ["int8", "auto", "float16"])
def test_dtypes_that_nothing_is_trained_in_are_refused(dtype):
    with pytest.raises(ValueError, match=f"dtype is '{dtype}'; wanted 'float32' or 'bfloat16'"):
        train.make_step(optax.sgd(0.5), dtype=dtype)


def test_a_state_of_another_model_does_not_finish_one(small, small_3n):
    with pytest.raises(ValueError, match="the state is of another model"):
        train.finished(small_3n, train.start(small, optax.sgd(0.5)))


def test_what_is_no_batch_is_refused(small):
    step = train.make_step(optax.sgd(0.5))
    with pytest.raises(TypeError, match="tokens are a list; wanted an array"):
        step(train.start(small, optax.sgd(0.5)), train.Batch([[1, 2], [3, 4]]))


def test_what_is_no_decoder_is_refused():
    with pytest.raises(TypeError, match="a dict cannot be trained"):
        train.start({}, optax.sgd(0.5))
