import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gemma_jax.configs.config import AltUpConfig, ConfigError
from gemma_jax.nn.cache import empty_cache
from gemma_jax.nn.decoder import Decoder
from gemma_jax.nn.masks import Places
from gemma_jax.nn.scanned import ScannedDecoder

TOLERANCE = 2e-5  # the bound on float32 logits


@pytest.fixture(scope="module")
def step():
    """One chunk through the cache: (model, tokens, places, cache) -> (logits, cache)."""

    def chunk(model, tokens, where, cache):
        x, cache = model.hidden(tokens, where, cache)
        return model.logits(x), cache

    return jax.jit(chunk)


def test_logits_equal_hugging_face(fixture_model, text_fixture, forward):
    ids = jnp.asarray(text_fixture["x:input_ids"])
    got = forward(fixture_model, ids, Places.plain(*ids.shape))
    np.testing.assert_allclose(got, text_fixture["x:logits"], atol=TOLERANCE, rtol=0)


def test_every_hidden_state_equals_hugging_face(fixture_model, text_fixture, hidden_states):
    ids = jnp.asarray(text_fixture["x:input_ids"])
    got = hidden_states(fixture_model, ids, Places.plain(*ids.shape))
    np.testing.assert_allclose(got, text_fixture["x:hidden"], atol=5e-5, rtol=0)


def test_left_padded_logits_equal_hugging_face(fixture_model, text_fixture, forward):
    mask = text_fixture["x:pad_mask"].astype(bool)
    where = Places.of(jnp.asarray(mask))
    np.testing.assert_array_equal(np.maximum(where.positions, 0), text_fixture["x:pad_positions"] * mask)
    got = np.asarray(forward(fixture_model, jnp.asarray(text_fixture["x:input_ids"]), where))
    np.testing.assert_allclose(got[mask], text_fixture["x:pad_logits"][mask], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("start", [0, 3, 6])
def test_logits_do_not_depend_on_where_padding_stands(fixture_model, text_fixture, forward, start):
    """17 real tokens in 23 columns: left, middle, right; the ids at padding do not matter either."""
    ids = np.asarray(text_fixture["x:input_ids"])[1, 6:]
    tokens, mask = np.full((2, 23), 96), np.zeros((2, 23), bool)
    tokens[1, start : start + 17], mask[1, start : start + 17], mask[0, :1] = ids, True, True
    got = np.asarray(forward(fixture_model, jnp.asarray(tokens), Places.of(jnp.asarray(mask))))
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got[1, mask[1]], text_fixture["x:pad_logits"][1, 6:], atol=TOLERANCE, rtol=0)


def test_a_packed_row_gives_each_document_its_own_logits(fixture_model, text_fixture, forward):
    ids = np.asarray(text_fixture["x:input_ids"])[:1]
    tokens = np.concatenate([ids[:, :9], ids[:, :14]], axis=1)
    positions = np.concatenate([np.arange(9), np.arange(14)])[None].astype(np.int32)
    segments = np.repeat([0, 1], [9, 14])[None].astype(np.int32)
    got = np.asarray(forward(fixture_model, tokens, Places(jnp.asarray(positions), jnp.asarray(segments))))
    want = text_fixture["x:logits"][:1]
    np.testing.assert_allclose(got, np.concatenate([want[:, :9], want[:, :14]], axis=1), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("chunk", [1, 4, 7, 23])
def test_any_chunks_through_the_cache_equal_the_whole_forward_beyond_the_window(
    fixture_model, text_fixture, step, chunk
):
    ids = np.asarray(text_fixture["x:input_ids"])
    cache, logits = empty_cache(fixture_model.config, 2, 32, "float32"), []
    for start in range(0, 23, chunk):
        count = min(chunk, 23 - start)
        tokens = np.zeros((2, chunk), np.int32)
        tokens[:, :count] = ids[:, start : start + count]
        column = np.arange(chunk, dtype=np.int32)
        positions = np.broadcast_to(np.where(column < count, start + column, -1), (2, chunk))
        got, cache = step(fixture_model, tokens, Places(jnp.asarray(positions)), cache)
        logits.append(np.asarray(got)[:, :count])
    np.testing.assert_allclose(np.concatenate(logits, axis=1), text_fixture["x:logits"], atol=TOLERANCE, rtol=0)
    assert cache.lengths.tolist() == [23, 23]


def test_a_full_global_cache_without_a_spare_slot_is_enough(fixture_model, text_fixture, step):
    ids = jnp.asarray(text_fixture["x:input_ids"])
    cache = empty_cache(fixture_model.config, 2, 23, "float32")
    got, cache = step(fixture_model, ids[:, :22], Places.plain(2, 22), cache)
    last, _ = step(fixture_model, ids[:, 22:], Places(jnp.full((2, 1), 22)), cache)
    got = np.concatenate([got, last], axis=1)
    np.testing.assert_allclose(got, text_fixture["x:logits"], atol=TOLERANCE, rtol=0)


def test_a_later_token_changes_no_earlier_logits(tiny_model, plain_logits):
    tokens = np.random.default_rng(0).integers(0, 128, 40).tolist()
    before, after = plain_logits(tokens), plain_logits([*tokens[:30], 5, *tokens[31:]])
    np.testing.assert_array_equal(before[:30], after[:30])
    assert np.abs(before[30:] - after[30:]).max() > 1e-3


def test_a_token_beyond_all_windows_still_matters_through_global_layers_only(make_config, with_random_norms, forward):
    """One local layer of window 8 reaches 7 tokens back, not 8; a global one reaches all."""
    tokens = np.random.default_rng(0).integers(0, 128, (1, 20))
    changed = tokens.copy()
    changed[0, 3] = (tokens[0, 3] + 1) % 128
    config = make_config(num_layers=1)
    for is_local, last_changed in ((True, 10), (False, 19)):
        model = with_random_norms(Decoder(config.replace("layers.0.is_local", is_local), rngs=nnx.Rngs(0)))
        logits = [np.asarray(forward(model, jnp.asarray(t), Places.plain(1, 20))) for t in (tokens, changed)]
        differs = np.flatnonzero(np.abs(logits[0] - logits[1]).max(axis=(0, 2)) > 0)
        assert differs.tolist() == list(range(3, last_changed + 1))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("attention.query_pre_attn_scalar", 8.0),
        ("attention.global.rope_scale", 1.0),
        ("attention.global.rope_theta", 1e4),
        ("attention.local.rope_theta", 1e6),
        ("attention.local.rope_scale", 8.0),
        ("attention.local.window", 7),
        ("attention.softcap", 5.0),
        ("final_softcap", 2.0),
        ("activation", "gelu"),
        ("norm.epsilon", 1e-2),
        ("norm.is_zero_centred", False),
        ("has_embedding_scale", False),
        ("attention.is_causal", False),
    ],
)
def test_every_ingredient_of_the_config_reaches_the_logits(tiny_model, plain_logits, path, value):
    tokens = np.random.default_rng(3).integers(0, 128, 24)
    other = Decoder(tiny_model.config.replace(path, value), rngs=nnx.Rngs(0))
    nnx.update(other, nnx.state(tiny_model))
    got = np.asarray(other(jnp.asarray(tokens[None])))[0]
    assert np.abs(got - plain_logits(tokens.tolist())).max() > 1e-4


def test_stacked_layers_with_streams_are_refused_by_name(make_config):
    with pytest.raises(ConfigError, match=r"altup.*ScannedDecoder"):
        ScannedDecoder(make_config(num_layers=1).replace("altup", AltUpConfig()), rngs=nnx.Rngs(0))


def test_a_row_that_sat_out_steps_goes_on_as_if_it_had_not(tiny_model, step):
    """Beyond its window, while its neighbour goes on: what padding leaves in a cache, no token sees."""
    tokens = jax.random.randint(jax.random.key(3), (2, 16), 0, tiny_model.config.vocab_size)
    cache = empty_cache(tiny_model.config, 2, 32, "float32")
    _, prompt = step(tiny_model, tokens[:, :11], Places.plain(2, 11), cache)

    def last_logits(turns):
        at, cache, logits = np.array([11, 11]), prompt, None
        for turn in turns:
            positions = jnp.asarray(np.where(turn, at, -1)[:, None], jnp.int32)
            logits, cache = step(tiny_model, tokens[jnp.arange(2), at][:, None], Places(positions), cache)
            at = at + turn
        return np.asarray(logits)[0]

    row, other, both = np.array([1, 0]), np.array([0, 1]), np.array([1, 1])
    np.testing.assert_array_equal(last_logits([row, other, other, row]), last_logits([row, row]))
    np.testing.assert_array_equal(last_logits([both, other, row]), last_logits([both, both]))
