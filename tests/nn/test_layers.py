import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gemma_jax.configs.config import LayerSpec, NormConfig
from gemma_jax.nn.decoder import Decoder
from gemma_jax.nn.layers import (
    ACTIVATION,
    CPU_LAYOUT,
    PLAIN_LAYOUT,
    GatedMLP,
    Layout,
    RMSNorm,
    Table,
    _sparse_product,
    dimension_sizes,
    softcap,
)
from gemma_jax.nn.masks import Places
from gemma_jax.nn.paths import parameters, weights
from gemma_jax.nn.sites import Tap


def norm(scale: np.ndarray, config: NormConfig, dtype: str = "float32") -> RMSNorm:
    module = RMSNorm("D", len(scale), config, jnp.dtype(dtype))
    module.scale.set_raw_value(jnp.asarray(scale, dtype))
    return module


@pytest.mark.parametrize(("is_zero_centred", "offset"), [(True, 1.0), (False, 0.0)])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_rms_norm_is_its_formula_with_epsilon_inside_the_mean(is_zero_centred, offset, size):
    generator = np.random.default_rng(0)
    x, scale = size * generator.normal(size=(2, 3, 16)), generator.normal(size=16)
    got = norm(scale, NormConfig(is_zero_centred=is_zero_centred))(jnp.asarray(x, jnp.float32))
    want = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6) * (offset + scale)
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-7)


def test_rms_norm_of_zeros_is_zero():
    assert not np.any(norm(np.ones(8), NormConfig())(jnp.zeros((1, 8))))


def test_a_new_norm_leaves_the_size_alone_whichever_way_its_scale_is_centred():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 16)), jnp.float32)
    centred, plain = (
        RMSNorm("D", 16, NormConfig(is_zero_centred=flag), jnp.dtype("float32"))(x) for flag in (True, False)
    )
    np.testing.assert_array_equal(centred, plain)
    np.testing.assert_allclose(np.mean(np.square(centred), axis=-1), 1.0, rtol=1e-5)


def test_rms_norm_in_bfloat16_multiplies_in_float32_and_rounds_once():
    generator = np.random.default_rng(0)
    x = jnp.asarray(generator.normal(size=(4, 64)), jnp.bfloat16)
    scale = np.asarray(jnp.asarray(generator.normal(size=64), jnp.bfloat16), np.float32)
    wide = np.asarray(x, np.float32)
    want = wide / np.sqrt(np.mean(wide * wide, axis=-1, keepdims=True) + 1e-6) * (1 + scale)
    got = norm(scale, NormConfig(), "bfloat16")(x)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(got, np.float32), want, rtol=2**-8
    )  # half a unit of bfloat16, not one and a half


@pytest.mark.parametrize(
    ("name", "at", "want"),
    [
        ("gelu_tanh", 1.0, 0.8411919906082768),
        ("gelu_tanh", -2.0, -0.045402305912224),
        ("gelu", 1.0, 0.8413447460685429),
        ("silu", 1.0, 0.7310585786300049),
        ("relu", -1.0, 0.0),
    ],
)
def test_activations_have_the_values_of_their_formulas(name, at, want):
    np.testing.assert_allclose(ACTIVATION[name](jnp.float32(at)), want, rtol=1e-5)


@pytest.mark.parametrize("activation", ["gelu_tanh", "relu"])
def test_the_gated_mlp_is_gate_times_up_then_down(make_config, activation):
    config = make_config().replace("activation", activation)
    mlp = GatedMLP(config, LayerSpec(is_local=True, ffw_width=48), rngs=nnx.Rngs(0), dtype=jnp.dtype("float32"))
    x = np.random.default_rng(0).normal(size=(2, 3, 32))
    gate, up, down = (np.asarray(w[...], np.float64) for w in (mlp.w_gate, mlp.w_up, mlp.w_down))
    z = x @ gate
    gelu = 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))
    want = ((gelu if activation == "gelu_tanh" else np.maximum(z, 0)) * (x @ up)) @ down
    np.testing.assert_allclose(mlp(jnp.asarray(x, jnp.float32)), want, atol=2e-5)


@pytest.mark.parametrize("num_active", [1, 8, 9, 12], ids=lambda n: f"{n} of 64")
def test_of_a_sparse_ffw_the_active_units_give_the_whole_product(make_config, num_active):
    """Gathered up to the budget of 8, all rows beyond it; two tokens, one with a single active unit."""
    layout = Layout(gathers_units=True)
    spec = LayerSpec(is_local=True, ffw_width=64, activation_sparsity=0.95)
    mlp = GatedMLP(make_config(), spec, rngs=nnx.Rngs(0), dtype=jnp.dtype("float32"), layout=layout)
    assert mlp.budget == 8
    gate = np.zeros((32, 64), np.float32)
    gate[0, 20 : 20 + num_active] = 1 + 0.01 * np.arange(num_active)
    gate[1, 63] = 1
    mlp.w_gate.set_raw_value(jnp.asarray(gate))
    x = np.random.default_rng(0).normal(size=(2, 1, 32)).astype(np.float32)
    x[:, 0, :2] = np.eye(2)
    hidden = []
    tap = Spy(hidden)
    found = mlp(jnp.asarray(x), tap)
    assert [int(n) for n in np.count_nonzero(hidden[0], axis=-1)[:, 0]] == [num_active, 1]
    np.testing.assert_allclose(found, hidden[0] @ np.asarray(mlp.w_down[...]), atol=1e-6)
    whole = jax.jit(lambda mlp, x: mlp(x))(mlp, jnp.tile(x, (1, 8, 1)))  # too many tokens to gather for
    np.testing.assert_allclose(whole[:, 3:4], found, atol=1e-6)

    def total(down, shift):  # units that are zero have a derivative too
        hidden = _sparse_product(jnp.asarray(hidden_now) + shift, down, 8)
        return jnp.sum(hidden * jnp.arange(32))

    hidden_now, down = hidden[0], mlp.w_down[...]
    by_down, by_shift = jax.grad(total, argnums=(0, 1))(down, jnp.zeros((2, 1, 64)))
    np.testing.assert_allclose(by_shift, np.tile(np.asarray(down) @ np.arange(32), (2, 1, 1)), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(by_down, np.outer(hidden_now.sum(axis=(0, 1)), np.arange(32)), rtol=1e-5, atol=1e-5)


class Spy(Tap):
    def __init__(self, values):
        object.__setattr__(self, "values", values)

    def __call__(self, name, x):
        self.values.append(np.asarray(x))
        return x


def test_softcap_stays_inside_the_cap_and_none_changes_nothing():
    x = jnp.asarray([-1e6, -3.0, 0.0, 1e-3, 50.0, 1e6], jnp.float32)
    np.testing.assert_allclose(softcap(x, 30.0), 30 * np.tanh(np.asarray(x, np.float64) / 30), rtol=1e-6)
    assert softcap(x, None) is x


@pytest.mark.parametrize("tied", [True, False])
def test_a_table_means_the_same_in_either_memory_order(make_config, tied):
    config = make_config().replace("has_tied_head", tied)
    by_row, by_column = (Table(config, dims, rngs=nnx.Rngs(0), dtype=jnp.dtype("float32")) for dims in ("V D", "D V"))
    by_column.embedding.set_raw_value(by_row.embedding[...].T)
    tokens = jnp.asarray([[0, 5, 127], [127, 1, 2]])
    np.testing.assert_array_equal(by_row.rows(tokens), by_column.rows(tokens))
    np.testing.assert_array_equal(by_row.rows(tokens), np.asarray(by_row.embedding[...])[np.asarray(tokens)])
    x = by_row.rows(tokens) + 0.5
    np.testing.assert_allclose(by_row.logits(x), by_column.logits(x), atol=1e-5)


def test_logits_are_float32_even_from_bfloat16_weights(make_config):
    model = Decoder(make_config(num_layers=1), rngs=nnx.Rngs(0), dtype="bfloat16")
    logits = model(jnp.asarray([[2, 3]]))
    assert logits.dtype == jnp.float32
    assert len(set(np.asarray(logits, np.float32).ravel().tolist())) > 200  # not rounded to bfloat16 on the way


@pytest.mark.parametrize(
    ("width", "dtype", "want"),
    [
        (640, "float32", 25.2982216),
        (640, "bfloat16", 25.25),
        (1152, "bfloat16", 34.0),
        (2560, "bfloat16", 50.5),
        (3840, "bfloat16", 62.0),
        (5376, "bfloat16", 73.5),
        (5376, "float32", 73.3212128),
    ],
)
def test_embeddings_are_scaled_by_the_root_of_the_width_rounded_to_the_table(make_config, width, dtype, want):
    config = make_config(vocab_size=2, num_layers=1).replace("width", width).replace("layers.*.ffw_width", 2)
    model = Decoder(config, rngs=nnx.Rngs(0), dtype=dtype)
    model.embedder.embedding.set_raw_value(jnp.ones((2, width), dtype))
    x = model.embed(jnp.asarray([[1]]))
    assert x.dtype == jnp.dtype(dtype)
    np.testing.assert_allclose(np.asarray(x, np.float32), want, rtol=1e-7)


def test_embeddings_stay_unscaled_when_the_config_says_so(make_config):
    config = make_config(num_layers=1).replace("has_embedding_scale", False)
    model = Decoder(config, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(model.embed(jnp.asarray([[3]]))[0, 0], model.embedder.embedding[...][3])


def test_fused_weights_are_the_same_model_under_the_same_names(tiny_model, forward):
    fused = Decoder(tiny_model.config, rngs=nnx.Rngs(0), layout=CPU_LAYOUT)
    plain, places = parameters(tiny_model), weights(fused)
    assert places.keys() == plain.keys()
    buffers = {place.name: np.zeros(place.param[...].shape, np.float32) for place in places.values()}
    for path, place in places.items():
        assert place.shape == plain[path][...].shape, path
        place.view(buffers[place.name])[...] = plain[path][...]
    for place in places.values():
        place.param.set_raw_value(jnp.asarray(buffers[place.name]))
    tokens, where = jnp.asarray([[2, 5, 7, 11, 3]]), Places.plain(1, 5)
    np.testing.assert_allclose(forward(fused, tokens, where), forward(tiny_model, tokens, where), atol=1e-5, rtol=0)


@pytest.mark.parametrize("layout", [PLAIN_LAYOUT, CPU_LAYOUT])
def test_every_weight_names_its_dimensions(make_config, layout):
    config = make_config().replace("has_tied_head", False)
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), layout=layout))
    sizes = dimension_sizes(config) | {"F": 48, "E": 96}
    params = parameters(model)
    for path, param in params.items():
        shape = tuple(sizes[letter] for letter in param.get_metadata("dims").split())
        assert param.get_raw_value().shape == shape, path
    leaves = jax.tree.leaves(model)
    assert len(leaves) == len(params)  # nothing but weights is held


def test_paths_are_those_of_the_specification(make_config):
    model = nnx.eval_shape(lambda: Decoder(make_config(num_layers=1), rngs=nnx.Rngs(0)))
    layer = [
        "attn/k/kernel", "attn/k_norm/scale", "attn/o/kernel", "attn/q/kernel", "attn/q_norm/scale", "attn/v/kernel",
        "mlp/down/kernel", "mlp/gate/kernel", "mlp/up/kernel",
        "post_attention_norm/scale", "post_ffw_norm/scale", "pre_attention_norm/scale", "pre_ffw_norm/scale",
    ]  # fmt: skip
    want = ["embedder/embedding", "final_norm/scale", *(f"layers_0/{name}" for name in layer)]
    assert sorted(parameters(model)) == want


def test_float16_is_refused_with_its_reason(make_config):
    with pytest.raises(ValueError, match=r"float16.*65504"):
        Decoder(make_config(num_layers=1), rngs=nnx.Rngs(0), dtype="float16")
