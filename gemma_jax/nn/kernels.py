"""Where the decoder meets `gemma_kernels`: what a kernel is told of the tokens at hand, or None where none serves."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

import gemma_kernels
from gemma_jax.nn import logical
from gemma_jax.nn.cache import LayerCache, advance
from gemma_jax.nn.masks import Places
from gemma_jax.nn.stored import Stored
from gemma_kernels import Band, Marks, reference


def band_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    places: tuple[Places, Places],
    start: int | jax.Array,
    band: Band,
) -> Float[Array, "B T N H"] | None:
    """Attention of tokens to themselves, and to others before; see `gemma_kernels.band_attention`. None: by XLA.

    `places` are those of the queries and of the keys, in whose column `start` the first query stands.
    """
    (query, key), q = places, q.swapaxes(1, 2)
    is_first = isinstance(start, int) and start == 0
    choice = gemma_kernels.choose_band_attention(q, k, band, has_offsets=not is_first)
    if choice.kernel is None or not query.is_dense:
        return None
    if is_first:
        marks = Marks(None, query.segments, key.segments, query.blocks, key.blocks)
    else:  # columns without a token may stand before those of the first document
        own, theirs = (jnp.zeros_like(one.positions) if one.segments is None else one.segments for one in places)
        theirs = jnp.where(key.positions < 0, -1, theirs)
        offsets, multiple = jnp.full(q.shape[:1], start, jnp.int32), start if isinstance(start, int) else 1
        marks = Marks(offsets, own, theirs, query.blocks, key.blocks, multiple)
    return gemma_kernels.band_attention(q, k, v, marks, band, choice).swapaxes(1, 2)


def chunk_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    where: Places,
    caches: tuple[LayerCache, LayerCache],
    lengths: Int[Array, " B"],
    band: Band,
) -> Float[Array, "B T N H"] | None:
    """Attention of a prompt's next tokens to what came before and to themselves. None: by XLA.

    `caches` are the layer's before and after these tokens, `lengths` the numbers stored before.
    """
    before, after = caches
    kept = before.keys.shape[2] - (band.window or 0) + 1  # so many tokens fill a ring without what the first one sees
    if q.shape[1] <= min(kept, gemma_kernels.MOST_DECODE_QUERIES):
        served = decode_attention(q, after, where, advance(lengths, where), band)
        if served is not None or q.shape[1] == 1:
            return served
    q = q.swapaxes(1, 2)
    if band.window is None:  # the slots of a global cache are its positions
        keys, values, offsets, multiple = after.keys, after.values, lengths, 1
        spans, segments = placed(where.blocks, lengths, keys.shape[2]), None
    else:
        slots = before.keys.shape[2]
        keys, values = (jnp.concatenate([unrolled(old, lengths), new.astype(old.dtype)], axis=2)
                        for old, new in ((before.keys, k), (before.values, v)))  # fmt: skip
        offsets, multiple = jnp.full_like(lengths, slots), slots
        is_empty = jnp.arange(keys.shape[2])[None, :] < slots - lengths[:, None]
        segments = -is_empty.astype(jnp.int32)
        spans = None if where.blocks is None else jnp.pad(where.blocks, [(0, 0), (slots, 0)])
    choice = gemma_kernels.choose_band_attention(q, keys, band, has_offsets=True)
    if choice.kernel is None or not where.is_dense:
        return None
    own = None if segments is None else jnp.zeros(q.shape[::2], jnp.int32)
    marks = Marks(offsets, own, segments, where.blocks, spans, multiple)
    return gemma_kernels.band_attention(q, keys, values, marks, band, choice).swapaxes(1, 2)


def unrolled(ring: Float[Array, "B K S H"], lengths: Int[Array, " B"]) -> Float[Array, "B K S H"]:
    """A ring's slots in the order of their positions, empty ones first, so that the newest is the last."""
    slots = ring.shape[2]
    order = (lengths[:, None] + jnp.arange(slots)[None, :]) % slots
    return jnp.take_along_axis(ring, order[:, None, :, None], axis=2)


def placed(blocks: Int[Array, "B T"] | None, lengths: Int[Array, " B"], slots: int) -> Int[Array, "B S"] | None:
    """The blocks of new tokens at their slots of a global cache, 0 elsewhere."""
    if blocks is None:
        return None
    column = jnp.arange(slots)[None, :] - lengths[:, None]
    placed = jnp.take_along_axis(blocks, jnp.clip(column, 0, blocks.shape[1] - 1), axis=1)
    return jnp.where((column >= 0) & (column < blocks.shape[1]), placed, 0)


def decode_attention(
    q: Float[Array, "B T N H"], cache: LayerCache, where: Places, lengths: Int[Array, " B"], band: Band
) -> Float[Array, "B T N H"] | None:
    """Attention of one token or a few to a cache that holds them already. None: by XLA.

    `lengths` are the numbers stored, these tokens among them. Not for tokens whose keys a ring has lost to later ones.
    """
    q = q.swapaxes(1, 2)
    choice = gemma_kernels.choose_decode_attention(q, cache.keys, band)
    if choice.kernel is None:
        return None
    out = gemma_kernels.decode_attention(q, cache.keys, cache.values, where.positions, lengths, band, choice)
    return out.swapaxes(1, 2)


def table_losses(
    dims: str, table: Float[Array, "V D"] | Stored, x: Float[Array, "T D"], targets: Int[Array, " T"], cap: float | None
) -> Float[Array, " T"] | None:
    """-log probability of each target under softmax(cap(x table^T)). None: by XLA. `dims` is the table's order."""
    if dims != "V D" or isinstance(table, Stored):
        return None
    choice = gemma_kernels.choose_linear_cross_entropy(x, table)
    if choice.kernel is None:
        return None
    return gemma_kernels.linear_cross_entropy(x.astype(table.dtype), table, targets, cap, choice)


def mix_streams(
    coefficients: Float[Array, "B T O I"],
    streams: Float[Array, "A B T D"],
    other: Float[Array, "B T D"] | None = None,
    added: Float[Array, "B T D"] | None = None,
) -> Float[Array, "O B T D"]:
    """Sums of each token's vectors by coefficients of its own; see `gemma_kernels.reference.mix_streams`.

    `other` and `added` are taken in the streams' dtype. On a mesh each device mixes the part of tokens and width that
    it has.
    """
    other, added = (None if x is None else x.astype(streams.dtype) for x in (other, added))
    if logical.current() is None:
        return _mixed(coefficients, streams, other, added)
    vector = logical.spec(("batch", "act_seq", "act_embed"), streams.shape[1:])
    several, tokens = PartitionSpec(None, *vector), PartitionSpec(*vector[:2])
    specs = (tokens, several, vector, vector)
    run = jax.shard_map(_mixed, in_specs=specs, out_specs=several, check_vma=False)
    return run(coefficients, streams, other, added)


def _mixed(coefficients: jax.Array, streams: jax.Array, other: jax.Array | None, added: jax.Array | None) -> jax.Array:
    def joined(x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-3], -1, x.shape[-1])

    flat = coefficients.reshape(-1, *coefficients.shape[2:]), joined(streams)
    choice = gemma_kernels.choose_mix_streams(*flat)
    if choice.kernel is None:
        return reference.mix_streams(coefficients, streams, other, added)
    other, added = (None if x is None else joined(x) for x in (other, added))
    out = gemma_kernels.mix_streams(*flat, other, added, choice)
    return out.reshape(len(out), *streams.shape[1:])
