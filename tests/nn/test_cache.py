import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_jax.configs import gemma3
from gemma_jax.nn.cache import (
    LayerCache,
    advance,
    cache_bytes,
    capacity_bucket,
    empty_cache,
    slot_counts,
    slot_places,
    store,
)
from gemma_jax.nn.masks import Places

MIB = 2**20
SIZES = [gemma3.GEMMA3_270M, gemma3.GEMMA3_1B, gemma3.GEMMA3_4B, gemma3.GEMMA3_12B, gemma3.GEMMA3_27B]


def allocated(cache) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache.layers))


@pytest.mark.parametrize("config", SIZES, ids=lambda config: config.name)
@pytest.mark.parametrize(("batch", "capacity", "dtype"), [(1, 32_768, "bfloat16"), (3, 100, "float32")])
def test_cache_bytes_are_the_allocation_of_every_size(config, batch, capacity, dtype):
    shapes = jax.eval_shape(lambda: empty_cache(config, batch, capacity, dtype))
    assert cache_bytes(config, batch, capacity, dtype) == allocated(shapes)


@pytest.mark.parametrize(
    ("config", "context", "mebibytes"),
    list(zip(SIZES, [32_768, 32_768, 131_072, 131_072, 131_072], [103.5, 139, 2676, 8512, 10_656], strict=True)),
    ids=lambda value: getattr(value, "name", None),
)
def test_cache_bytes_at_full_context_are_those_of_the_specification(config, context, mebibytes):
    assert cache_bytes(config, 1, context, "bfloat16") == mebibytes * MIB


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("capacity", [1, 7, 8, 20])
def test_cache_bytes_are_the_real_allocation(tiny_config, capacity, dtype):
    cache = empty_cache(tiny_config, 2, capacity, dtype)
    assert cache_bytes(tiny_config, 2, capacity, dtype) == allocated(cache)
    assert slot_counts(tiny_config, capacity) == tuple(min(8, capacity) if i % 2 == 0 else capacity for i in range(5))


@pytest.mark.parametrize("slots", [1, 5, 8])
def test_slots_hold_the_newest_position_of_their_residue(slots):
    for length in range(3 * slots + 2):
        held = [-1] * slots
        for position in range(length):
            held[position % slots] = position
        got = slot_places(jnp.asarray([length]), slots).positions
        np.testing.assert_array_equal(got, [held])


@given(
    slots=st.sampled_from([5, 12]),
    chunks=st.lists(st.tuples(st.sampled_from([1, 3, 11]), st.integers(0, 11), st.integers(0, 11)), max_size=5),
)
@settings(deadline=None, max_examples=40)
def test_a_ring_holds_after_any_chunks_what_a_dictionary_would(slots, chunks):
    """Two rows, chunks of real tokens followed by padding; every value says its row and position."""
    cache = LayerCache(jnp.full((2, 1, slots, 2), -1.0), jnp.full((2, 1, slots, 2), -1.0))
    lengths, want, is_free = np.zeros(2, np.int32), np.full((2, slots), -1.0), np.zeros((2, slots), bool)
    for size, *counts in chunks:
        real = np.minimum(counts, size)
        column = np.arange(size)
        positions = np.where(column < real[:, None], lengths[:, None] + column, -1)
        values = np.where(positions >= 0, 1000 * np.arange(2)[:, None] + positions, 77_777.0)
        keys = jnp.asarray(np.repeat(values[:, None, :, None], 2, axis=3), jnp.float32)
        where = Places(jnp.asarray(positions, jnp.int32))
        cache = store(cache, keys, keys + 0.5, where, jnp.asarray(lengths))
        np.testing.assert_array_equal(advance(jnp.asarray(lengths), where), lengths + real)
        lengths = lengths + real.astype(np.int32)
        for row in range(2):
            # a lone token that is padding may be written to the slot of the next token, which nobody reads before
            is_free[row, lengths[row] % slots] |= size == 1 and real[row] == 0
            for position in positions[row][positions[row] >= 0]:
                want[row, position % slots] = 1000 * row + position
                is_free[row, position % slots] = False
    assert all(list(np.flatnonzero(is_free[row])) in ([], [lengths[row] % slots]) for row in range(2))
    np.testing.assert_array_equal(cache.keys[:, 0, :, 1][~is_free], want[~is_free])
    np.testing.assert_array_equal(cache.values[:, 0, :, 0][~is_free], np.where(want < 0, -1, want + 0.5)[~is_free])


def test_capacity_buckets_are_few_and_waste_at_most_a_third():
    buckets = [capacity_bucket(tokens) for tokens in range(1, 32_769)]
    assert all(bucket >= tokens for tokens, bucket in enumerate(buckets, start=1))
    assert buckets == sorted(buckets)
    assert len(set(buckets)) <= 16
    assert all(bucket <= 1.5 * tokens for tokens, bucket in enumerate(buckets, start=1) if tokens > 256)
    assert capacity_bucket(32_768) == 32_768
    assert all(capacity_bucket(bucket) == bucket for bucket in set(buckets))
