"""Capture against the parts of the model called by hand, and against its own hidden states."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax import interp
from gemma_jax.interp.activations import stream_sites
from gemma_jax.nn import sites
from gemma_jax.nn.masks import Places

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def everything(gemma, tokens) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in interp.capture(gemma, tokens, ["*"]).items()}


def close(got, want):
    np.testing.assert_allclose(got, want, atol=TOLERANCE, rtol=0)


def test_all_sites_come_in_the_order_of_the_forward_with_the_shapes_that_are_promised(gemma, tokens, everything):
    shapes = sites.shapes(gemma.config)
    assert list(everything) == list(shapes)
    for name, value in everything.items():
        assert value.shape == ((2, 4, 16, 16) if name.endswith("attn_weights") else (2, 16, *shapes[name])), name


def test_captured_streams_are_the_hidden_states_and_logits_of_the_plain_forward(gemma, tokens, everything):
    want = np.asarray(gemma.hidden_states(tokens))
    for got, state in zip([everything[name] for name in stream_sites(2)[:-1]], want, strict=False):
        close(got, state)
    close(everything["final"], want[-1])
    close(everything["logits"], gemma.logits(tokens))


def test_one_site_alone_is_what_it_is_among_all(gemma, tokens, everything):
    for name in ("layers.0.mlp_hidden", "layers.1.attn_out"):
        np.testing.assert_array_equal(interp.capture(gemma, tokens, name)[name], everything[name])


def test_the_parts_of_a_layer_follow_from_each_other(gemma, everything):
    for i, layer in enumerate(gemma.model.layers):
        at = {name.rsplit(".", 1)[1]: value for name, value in everything.items() if name.startswith(f"layers.{i}.")}
        close(at["attn_in"], layer.pre_attention_norm(at["resid_pre"]))
        close(at["attn_out"], layer.post_attention_norm(jnp.einsum("BTNH,NHD->BTD", at["heads"], layer.attn.w_o[...])))
        close(at["resid_mid"], at["resid_pre"] + at["attn_out"])
        close(at["mlp_in"], layer.pre_ffw_norm(at["resid_mid"]))
        close(at["mlp_out"], layer.post_ffw_norm(at["mlp_hidden"] @ layer.mlp.w_down[...]))
        close(at["resid_post"], at["resid_mid"] + at["mlp_out"])


def test_attention_maps_are_distributions_within_the_window_that_bring_what_heads_bring(gemma, everything):
    distance = np.arange(16)[:, None] - np.arange(16)[None]
    for i, spec in enumerate(gemma.config.layers):
        maps, values = everything[f"layers.{i}.attn_weights"], everything[f"layers.{i}.v"]
        close(maps.sum(-1), 1.0)
        seen = (distance >= 0) & (distance < (8 if spec.is_local else 16))
        assert (maps[..., ~seen] == 0).all()
        assert (maps[..., seen] > 0).all()
        close(np.einsum("BNTS,BSNH->BTNH", maps, values.repeat(2, axis=2)), everything[f"layers.{i}.heads"])


def test_maps_obey_the_softcap_and_are_refused_with_a_cache(gemma, tokens, everything):
    site = "layers.0.attn_weights"
    model = gemma.model
    attention = model.config.attention
    q, k = (everything[f"layers.0.{name}"] for name in "qk")
    scores = np.einsum("BTNH,BSNH->BNTS", q * attention.query_scale, k.repeat(2, axis=2))
    distance = np.arange(16)[:, None] - np.arange(16)[None]
    scores = np.where((distance >= 0) & (distance < 8), scores, -np.inf)
    close(everything[site], jax.nn.softmax(scores, axis=-1))
    with pytest.raises(ValueError, match="without a cache"):
        sites.Taps(model.config, (), [site]).at(Places.plain(1, 1), is_cached=True)


def test_texts_are_encoded_as_hidden_states_whatever_stands_beside_them(gemma, tokens):
    texts = [tokens[0, :11].tolist(), tokens[1, :4].tolist()]
    want = [gemma.hidden_states([text]) for text in texts]
    for layer, index in ((-1, 2), (2, 2), (0, 0), (1, 1)):
        states, mask = interp.encode(gemma, texts, layer)
        assert mask.sum(1).tolist() == [11, 4]
        assert states.shape == (2, 11, 32)
        for row, text in enumerate(texts):
            close(states[row, : len(text)], want[row][index, 0])


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda g, t: interp.capture(g, t, ["layers.2.q"]), ValueError, r"'layers.2.q'; interp has embed.*layers.1"),
        (lambda g, t: interp.capture(g, t, ["embed", "*.resid", "mlp"]), ValueError, r"'\*.resid', 'mlp'.*resid_post"),
        (lambda g, t: interp.encode(g, [[1]], 3), ValueError, "layer is 3; interp has -3 to 2"),
        (lambda g, t: interp.encode(g, "text"), TypeError, "one text"),
        (lambda g, t: interp.encode(g, [[]]), ValueError, "prompt 0 is empty"),
        (lambda g, t: interp.logit_lens(g, t, 0), ValueError, "keep is 0; wanted 1 to 128"),
        (lambda g, t: interp.logit_lens(g, t, [128]), ValueError, "keep has id 128"),
    ],
)
def test_what_there_is_not_is_refused(gemma, tokens, call, error, words):
    with pytest.raises(error, match=words):
        call(gemma, tokens)
