import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_jax.nn.masks import Places, visible


def may_look(query: int, key: int, window: int | None, is_causal: bool) -> bool:
    """gemma3.md 3.6, one pair at a time."""
    if key < 0:
        return False
    if is_causal:
        return key <= query and (window is None or query - key < window)
    return window is None or abs(query - key) <= window // 2


@given(
    query=st.lists(st.integers(0, 12), min_size=4, max_size=4),
    key=st.lists(st.integers(-1, 12), min_size=6, max_size=6),
    window=st.sampled_from([None, 1, 2, 3, 8, 100]),
    is_causal=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_visible_is_the_rule_for_every_pair(query, key, window, is_causal):
    got = visible(Places(jnp.asarray([query])), Places(jnp.asarray([key])), window, is_causal)
    want = [[may_look(q, k, window, is_causal) for k in key] for q in query]
    np.testing.assert_array_equal(got[0], want)


def test_a_window_of_five_at_twenty_sees_sixteen_to_twenty():
    got = visible(Places(jnp.asarray([[20]])), Places.plain(1, 30), 5)
    assert np.flatnonzero(got).tolist() == [16, 17, 18, 19, 20]


def test_a_symmetric_window_of_512_sees_513_keys():
    got = visible(Places(jnp.asarray([[1000]])), Places.plain(1, 2000), 512, is_causal=False)
    assert np.flatnonzero(got).tolist() == list(range(744, 1257))


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("window", [None, 4])
def test_empty_slots_and_padding_are_never_seen(window, is_causal):
    keys = Places(jnp.asarray([[-1, 0, 1, -1]]))
    got = np.asarray(visible(Places.plain(1, 3), keys, window, is_causal))
    assert not got[..., [0, 3]].any()


def test_documents_of_a_packed_row_do_not_see_each_other():
    places = Places(jnp.asarray([[0, 1, 2, 0, 1]]), jnp.asarray([[0, 0, 0, 1, 1]]))
    got = np.asarray(visible(places, places, None))[0]
    np.testing.assert_array_equal(got[:3, :3], np.tri(3, dtype=bool))
    np.testing.assert_array_equal(got[3:, 3:], np.tri(2, dtype=bool))
    assert not got[:3, 3:].any()
    assert not got[3:, :3].any()


def test_places_count_real_tokens_wherever_the_padding_stands():
    mask = jnp.asarray([[1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0], [0, 1, 1, 0], [1, 0, 0, 1], [0, 0, 0, 0]], bool)
    want = [[0, 1, 2, 3], [-1, -1, 0, 1], [0, 1, -1, -1], [-1, 0, 1, -1], [0, -1, -1, 1], [-1, -1, -1, -1]]
    np.testing.assert_array_equal(Places.of(mask).positions, want)
    np.testing.assert_array_equal(Places.plain(2, 3).positions, [[0, 1, 2]] * 2)
