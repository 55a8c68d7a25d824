"""Key/value caches of the exact size: a ring of W slots for a local layer, `capacity` slots for a global one.

Both are rings by one rule: position p stands in slot p mod S. So the position that a slot holds follows from the
number of tokens stored, and is not stored itself. Keys are kept after norm and rope.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gemma_jax.configs.config import DecoderConfig
from gemma_jax.nn import logical
from gemma_jax.nn.masks import Places

SLACK = 16


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCache:
    """One layer's keys and values; [B, K, S, H] lets a step update one row in place on TPU and CPU alike."""

    keys: jax.Array  # [B, K, S, H]
    values: jax.Array  # [B, K, S, H]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """All layers' caches, and how many tokens of each row they have seen."""

    layers: tuple[LayerCache, ...]
    lengths: jax.Array  # int32 [B]


def slot_counts(config: DecoderConfig, capacity: int, slack: int = 0) -> tuple[int, ...]:
    """Slots of each layer's cache for `capacity` tokens of context; none where it reads another layer's.

    A ring with `slack` slots more than its window forgets nothing visible when as many new tokens are taken back,
    which is done by setting `Cache.lengths`. Slack is rounded up to whole registers of a TPU.
    """
    slack = -(-slack // SLACK) * SLACK
    windows = (config.kind(spec).window for spec in config.layers)
    return tuple(
        0 if spec.kv_source is not None else capacity if window is None else min(window + slack, capacity)
        for spec, window in zip(config.layers, windows, strict=True)
    )


def cache_bytes(config: DecoderConfig, batch: int, capacity: int, dtype: jnp.dtype | str = "bfloat16") -> int:
    """Bytes of the keys and values that `empty_cache` allocates (the counters, 4 bytes a row, left out)."""
    row = 2 * config.attention.num_kv_heads * config.attention.head_dim * jnp.dtype(dtype).itemsize
    return batch * row * sum(slot_counts(config, capacity))


def empty_cache(config: DecoderConfig, batch: int, capacity: int, dtype: jnp.dtype | str, slack: int = 0) -> Cache:
    """A cache for rows of at most `capacity` tokens. Writing more than that is the caller's error."""
    heads, width = config.attention.num_kv_heads, config.attention.head_dim
    layers = []
    for spec, slots in zip(config.layers, slot_counts(config, capacity, slack), strict=True):
        names = slot_names(is_global=config.kind(spec).window is None)
        keys, values = (logical.zeros((batch, heads, slots, width), dtype, *names) for _ in range(2))
        layers.append(LayerCache(keys, values))
    return Cache(tuple(layers), logical.zeros((batch,), jnp.int32, "batch"))


def slot_names(*, is_global: bool) -> tuple[str | None, ...]:
    """Logical names of a layer's keys [B, K, S, H]: a global cache's slots are others than a ring's."""
    return "batch", "kv_heads", "kv_seq" if is_global else "kv_win", None


def slot_places(lengths: Int[Array, " B"], slots: int) -> Places:
    """The position that each slot holds once `lengths` tokens are stored; -1 where none yet."""
    last = lengths[:, None] - 1
    slot = jnp.arange(slots, dtype=jnp.int32)[None, :]
    position = last - (last - slot) % slots
    return Places(jnp.maximum(position, -1))


def advance(lengths: Int[Array, " B"], where: Places) -> Int[Array, " B"]:
    """How many tokens are stored once the real ones at hand are."""
    return lengths + jnp.sum(where.positions >= 0, axis=1, dtype=jnp.int32)


def store(
    cache: LayerCache,
    keys: Float[Array, "B K T H"],
    values: Float[Array, "B K T H"],
    where: Places,
    lengths: Int[Array, " B"],
    share: tuple[jax.Array, int] | None = None,
) -> LayerCache:
    """Writes the new tokens into their slots. Real tokens stand first in a row; padding (position -1) leaves no trace
    that a later token could see.

    `lengths` is the number of tokens stored before. When more tokens come than there are slots the last ones stay.
    `share`: the cache at hand is a part of a larger one: its first slot, and how many that has.
    """
    here = cache.keys.shape[2]
    first, slots = (0, here) if share is None else share
    if keys.shape[2] == 1:
        return _store_one(cache, keys, values, where, lengths % slots - first)
    # Seen from a slot: which of the new tokens does it hold afterwards, if any? Works for any T, wrap and padding.
    held = slot_places(advance(lengths, where), slots).positions
    held = held if share is None else jax.lax.dynamic_slice_in_dim(held, first, here, axis=1)
    index = held - lengths[:, None]
    is_new = (index >= 0)[:, None, :, None]
    index = jnp.clip(index, 0, keys.shape[2] - 1)[:, None, :, None]

    def renewed(old: jax.Array, new: jax.Array) -> jax.Array:
        new = jnp.take_along_axis(new, index, axis=2)
        return jnp.where(is_new, new.astype(old.dtype), old)

    return LayerCache(renewed(cache.keys, keys), renewed(cache.values, values))


def _store_one(
    cache: LayerCache, keys: jax.Array, values: jax.Array, where: Places, slots: Int[Array, " B"]
) -> LayerCache:
    """One token a row; a slot that is none of the cache's keeps its row out.

    A loop that reads nothing of the cache is the form that XLA on CPU runs in place: of a scatter, or of writes that it
    may fuse, it makes whole copies of the cache, at every step.
    """
    new = (keys.astype(cache.keys.dtype), values.astype(cache.values.dtype))
    is_real = (where.positions[:, 0] >= 0) & (slots >= 0) & (slots < cache.keys.shape[2])
    rows = jnp.argsort(~is_real).astype(jnp.int32)  # those to write first
    none = jnp.int32(0)

    def row(i: jax.Array, stored: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        b = rows[i]
        at = (b, none, slots[b], none)
        first, second = (
            jax.lax.dynamic_update_slice(old, jax.lax.dynamic_slice_in_dim(one, b, 1), at)
            for old, one in zip(stored, new, strict=True)
        )
        return first, second

    count = jnp.sum(is_real, dtype=jnp.int32)
    return LayerCache(*jax.lax.fori_loop(0, count, row, (cache.keys, cache.values)))


def capacity_bucket(tokens: int) -> int:
    """The smallest capacity on offer for `tokens`: few sizes, so that a new length seldom compiles anew.

    Powers of two and their midpoints from 256 on: at most a third of a global cache stays unused.
    """
    if tokens <= 256:
        return 256
    power = 2 ** math.ceil(math.log2(tokens))
    return power * 3 // 4 if tokens <= power * 3 // 4 else power
