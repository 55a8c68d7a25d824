import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gemma_jax.configs import gemma3
from gemma_jax.nn.decoder import Decoder
from gemma_jax.nn.masks import Places
from gemma_jax.nn.paths import parameters
from gemma_jax.nn.scanned import ScannedDecoder, segments, stack, unstack


def test_layers_are_cut_into_turns_of_the_pattern_and_a_rest():
    cuts = {config.name: [(len(turn), n) for turn, n in segments(config)] for config in (
        gemma3.GEMMA3_270M, gemma3.GEMMA3_1B, gemma3.GEMMA3_4B, gemma3.GEMMA3_12B, gemma3.GEMMA3_27B
    )}  # fmt: skip
    assert cuts == {
        "gemma-3-270m": [(6, 3)],
        "gemma-3-1b": [(6, 4), (2, 1)],
        "gemma-3-4b": [(6, 5), (4, 1)],
        "gemma-3-12b": [(6, 8)],
        "gemma-3-27b": [(6, 10), (2, 1)],
    }


def test_stacked_layers_equal_hugging_face_in_logits_and_hidden_states(
    fixture_model, text_fixture, forward, hidden_states
):
    scanned = stack(fixture_model)
    ids = jnp.asarray(text_fixture["x:input_ids"])
    where = Places.plain(*ids.shape)
    np.testing.assert_allclose(forward(scanned, ids, where), text_fixture["x:logits"], atol=2e-5, rtol=0)
    np.testing.assert_allclose(hidden_states(scanned, ids, where), text_fixture["x:hidden"], atol=5e-5, rtol=0)


@pytest.mark.parametrize(
    ("num_layers", "tied", "dtype"), [(5, True, "float32"), (4, False, "bfloat16"), (1, True, "float32")]
)
def test_unstacking_what_was_stacked_gives_the_same_weights(make_config, num_layers, tied, dtype):
    config = make_config(num_layers=num_layers).replace("has_tied_head", tied)
    model = Decoder(config, rngs=nnx.Rngs(0), dtype=dtype)
    back = parameters(unstack(stack(model)))
    for path, param in parameters(model).items():
        assert back.pop(path)[...].tolist() == param[...].tolist(), path
    assert not back


def test_stacked_layers_equal_one_by_one_with_padding(tiny_model, forward):
    tokens = np.random.default_rng(0).integers(0, 128, (2, 24))
    mask = np.ones((2, 24), bool)
    mask[0, :9] = mask[1, 20:] = False
    where = Places.of(jnp.asarray(mask))
    want, got = (np.asarray(forward(model, tokens, where)) for model in (tiny_model, stack(tiny_model)))
    np.testing.assert_allclose(got[mask], want[mask], atol=5e-5)


def test_gradients_through_the_scan_equal_those_layer_by_layer(tiny_model):
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 128, (2, 12)))

    @jax.jit
    @jax.grad
    def gradient(model):
        logits = jax.nn.log_softmax(model(tokens))[:, :-1]
        return -jnp.mean(jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1))

    want = parameters(gradient(tiny_model))
    got = parameters(unstack(gradient(stack(tiny_model))))
    assert set(got) == set(want)
    for path, param in want.items():
        np.testing.assert_allclose(got[path][...], param[...], atol=1e-5, err_msg=path)


def test_a_stacked_decoder_can_be_built_from_nothing(tiny_config, forward):
    scanned = ScannedDecoder(tiny_config, rngs=nnx.Rngs(0))
    first, second = (np.asarray(layer.mlp.w_up[...]) for layer in unstack(scanned).layers[:4:2])
    assert not np.array_equal(first, second)  # every turn draws its own weights
    assert forward(scanned, jnp.asarray([[2, 3, 4]]), Places.plain(1, 3)).shape == (1, 3, 128)
