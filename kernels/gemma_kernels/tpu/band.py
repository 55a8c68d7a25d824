"""The band of an attention on TPU: which keys a query sees, first block by block, then inside a block.

The schedule is arithmetic on block numbers. Nothing here is larger than a few integers per block, on the host or on the
device, so a context of 128K tokens costs no more to trace than one of 1K.
Dimension letters as in `gemma_kernels.reference`; `nq` and `nk` count blocks of queries and of keys.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

LANES = 128  # the last dimension of a TPU's vector register: what blocks of queries and keys are multiples of
NO_SPAN = np.int32(2**31 - 1)
FIELDS = 4  # integers an extent has


@dataclass(frozen=True)
class Band:
    """What is fixed of an attention when it is traced.

    window: columns a query sees, its own included; None: all earlier ones.
    softcap: logits x become softcap * tanh(x / softcap).
    max_span: columns of the longest span, first to last; 0: no spans. A longer span is cut where blocks end.
    """

    window: int | None
    softcap: float | None = None
    max_span: int = 0

    def __post_init__(self):
        if self.window is not None and self.window < 1:
            raise ValueError(f"window is {self.window}, wanted at least 1 (a query sees itself), or None for no window")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap is {self.softcap}, wanted more than 0, or None for no cap")
        if self.max_span < 0:
            raise ValueError(f"max_span is {self.max_span}, wanted 0 (no spans) or the longest span's columns")

    @property
    def ahead(self) -> int:
        """Columns to the right of itself that a query may see."""
        return max(self.max_span - 1, 0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Marks:
    """What is known of an attention only when it runs; the rule is `reference.band_mask`'s.

    offsets: query i of row b stands in key column offsets[b] + i; None: in column i. Segments and spans: ids of each
    query and each key. multiple: a promise, known when traced, that offsets are multiples of it: with one that blocks
    divide a window touches fewer blocks of keys, and fewer keys suffice for the path without masks.
    """

    offsets: Int[Array, " B"] | None = None
    query_segments: Int[Array, "B T"] | None = None
    key_segments: Int[Array, "B S"] | None = None
    query_spans: Int[Array, "B T"] | None = None
    key_spans: Int[Array, "B S"] | None = None
    multiple: int = field(default=1, metadata={"static": True})

    @property
    def step(self) -> int:
        """What all offsets are multiples of; 0 where all are 0."""
        return 0 if self.offsets is None else self.multiple

    def columns(self, num_rows: int) -> Int[Array, " B"]:
        """The key column of each row's first query."""
        return jnp.zeros(num_rows, jnp.int32) if self.offsets is None else self.offsets.astype(jnp.int32)


@dataclass(frozen=True)
class BandBlocks:
    """Sizes of a step: block_q queries of `heads` heads, which share a key head, against block_kv keys.

    The heads are stacked into heads * block_q rows of one product, so keys are read once for all of them.
    """

    block_q: int
    block_kv: int
    heads: int


class Block(NamedTuple):
    """Columns of a block of queries or keys, and the least and largest of the ids in it (spans: of those above 0).

    Scalars inside a kernel; arrays, one entry per block, outside.
    """

    first: Any
    last: Any
    segment_low: Any
    segment_high: Any
    span_low: Any
    span_high: Any


class Ids(NamedTuple):
    """Segments and spans of queries or of keys, in a shape that broadcasts against a block of logits."""

    segments: Array | None = None
    spans: Array | None = None


def check(q: Array, k: Array, v: Array, marks: Marks, band: Band, blocks: BandBlocks) -> None:
    """Raises ValueError where arrays do not fit each other, or blocks do not fit arrays."""
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[::3] != k.shape[::3] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q, k and v have shapes {q.shape}, {k.shape} and {v.shape}, wanted [B, N, T, H] and twice [B, K, S, H] "
            "with N a multiple of K"
        )
    if {x.dtype for x in (q, k, v)} not in ({jnp.dtype("bfloat16")}, {jnp.dtype("float32")}):
        raise ValueError(f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}, wanted all bfloat16 or all float32")
    if q.shape[3] % LANES:
        raise ValueError(f"the head width is {q.shape[3]}, wanted a multiple of {LANES}; pad it, or use the reference")
    check_marks(marks, band, (q.shape[0], q.shape[2]), (k.shape[0], k.shape[2]))
    if (q.shape[1] // k.shape[1]) % blocks.heads or blocks.heads < 1:
        raise ValueError(
            f"blocks.heads is {blocks.heads}, wanted a divisor of the {q.shape[1] // k.shape[1]} query heads that "
            "share a key head"
        )
    for name, size in (("block_q", blocks.block_q), ("block_kv", blocks.block_kv)):
        if size < LANES or size % LANES:
            raise ValueError(f"blocks.{name} is {size}, wanted a multiple of {LANES}")


def check_marks(marks: Marks, band: Band, queries: tuple[int, int], keys: tuple[int, int]) -> None:
    """Raises ValueError where ids are half given, of another shape than queries and keys, or no part of the band."""
    for name in ("segments", "spans"):
        pair = getattr(marks, f"query_{name}"), getattr(marks, f"key_{name}")
        if (pair[0] is None) != (pair[1] is None):
            raise ValueError(f"{name} are given of queries or of keys only, wanted both or neither")
        if pair[0] is not None and (pair[0].shape != queries or pair[1].shape != keys):
            raise ValueError(f"{name} have shapes {pair[0].shape} and {pair[1].shape}, wanted {queries} and {keys}")
    if (marks.query_spans is not None) != (band.max_span > 0):
        raise ValueError(
            f"max_span is {band.max_span} and spans are {'not ' * (marks.query_spans is None)}given; give both, or "
            "max_span=0 and no spans"
        )
    if marks.offsets is not None and marks.offsets.shape != queries[:1]:
        raise ValueError(f"offsets have shape {marks.offsets.shape}, wanted {queries[:1]}: one for each row")
    if marks.multiple < 1:
        raise ValueError(f"the offsets' multiple is {marks.multiple}, wanted 1 or more")


def padded(x: Array, axis: int, block: int, mode: str = "constant") -> Array:
    """x with zeros (mode "edge": copies of the last entry) added to `axis` until it is a multiple of `block`."""
    missing = -x.shape[axis] % block
    if not missing:
        return x
    return jnp.pad(x, [(0, missing if i == axis % x.ndim else 0) for i in range(x.ndim)], mode=mode)


def padded_marks(marks: Marks, blocks: BandBlocks) -> Marks:
    """Marks of padded queries and keys. Copies of the last segment leave a block of one segment what it is."""

    def ids(x, block, mode="edge"):
        return None if x is None else padded(x.astype(jnp.int32), 1, block, mode)

    return replace(
        marks,
        query_segments=ids(marks.query_segments, blocks.block_q),
        key_segments=ids(marks.key_segments, blocks.block_kv),
        query_spans=ids(marks.query_spans, blocks.block_q, "constant"),
        key_spans=ids(marks.key_spans, blocks.block_kv, "constant"),
    )


def extents(
    segments: Int[Array, "B T"] | None, spans: Int[Array, "B T"] | None, shape: tuple[int, int], block: int
) -> Int[Array, "B nq 4"]:
    """Of each block the least and largest segment, and the least and largest span above 0 (none: NO_SPAN and 0).

    `shape` is [B, T], of which T is a multiple of `block`. Kernels get the result flat, as scalars prefetched.
    """
    split = (shape[0], shape[1] // block, block)
    segments = jnp.zeros(split, jnp.int32) if segments is None else segments.reshape(split)
    spans = jnp.zeros(split, jnp.int32) if spans is None else spans.reshape(split)
    inside = jnp.where(spans > 0, spans, NO_SPAN)
    fields = segments.min(2), segments.max(2), inside.min(2), jnp.maximum(spans, 0).max(2)
    return jnp.stack(fields, axis=-1).astype(jnp.int32)


def block_at(index: Any, size: int, column: Any, table: Any, entry: Any) -> Block:
    """Block `index` of blocks of `size` that begin at `column`; its extent is entry number `entry` of a flat table."""
    first = column + index * size
    return Block(first, first + size - 1, *(table[entry * FIELDS + i] for i in range(FIELDS)))


def block_table(column: Int[Array, " B"], size: int, table: Int[Array, "B n 4"]) -> Block:
    """All blocks at once, as arrays [B, n]: what `block_at` reads one by one, for use outside a kernel."""
    first = column[:, None] + size * jnp.arange(table.shape[1], dtype=jnp.int32)
    return Block(first, first + size - 1, *jnp.moveaxis(table, -1, 0))


def any_seen(band: Band, query: Block, key: Block) -> Bool[Array, ""]:
    """False only where no query of the block sees a key of the block."""
    crossed = (query.span_low <= key.span_high) & (key.span_low <= query.span_high)
    seen = (key.first <= query.last) | crossed if band.max_span else key.first <= query.last
    if band.window is not None:
        seen &= query.first - key.last < band.window
    return seen & (query.segment_low <= key.segment_high) & (key.segment_low <= query.segment_high)


def all_seen(band: Band, query: Block, key: Block, num_keys: int) -> Bool[Array, ""]:
    """True only where every query of the block sees every key of the block: then no mask is needed."""
    seen = (key.last <= query.first) & (key.last < num_keys)
    if band.window is not None:
        seen &= query.last - key.first < band.window
    low, high = jnp.minimum(query.segment_low, key.segment_low), jnp.maximum(query.segment_high, key.segment_high)
    return seen & (low == high)


def is_diagonal(band: Band, blocks: BandBlocks, query: Block, key: Block, num_keys: int) -> Bool[Array, ""]:
    """True only where queries stand in the columns of the keys, and see all of them that are not ahead."""
    fits = blocks.block_q == blocks.block_kv and (band.window is None or band.window >= blocks.block_q)
    low, high = jnp.minimum(query.segment_low, key.segment_low), jnp.maximum(query.segment_high, key.segment_high)
    here = (query.first == key.first) & (query.last < num_keys)
    return here & (low == high) & (query.span_high == 0) & fits


def seen_mask(
    band: Band, shape: tuple[int, int], query_axis: int, start: tuple[Any, Any], num_keys: int, ids: tuple[Ids, Ids]
) -> Bool[Array, "..."]:
    """The mask of one block of logits, of `shape`, whose queries run along `query_axis` (0 or 1).

    `start` holds the columns of the first query and the first key, `ids` those of queries and of keys.
    """
    key = start[1] + jax.lax.broadcasted_iota(jnp.int32, shape, 1 - query_axis)
    distance = start[0] + jax.lax.broadcasted_iota(jnp.int32, shape, query_axis) - key
    queries, keys = ids
    seen = distance >= 0
    if queries.spans is not None:
        seen |= (queries.spans == keys.spans) & (queries.spans > 0)
    if band.window is not None:
        seen &= distance < band.window
    if queries.segments is not None:
        seen &= queries.segments == keys.segments
    return seen & (key < num_keys)


def key_blocks(
    band: Band, blocks: BandBlocks, columns: Int[Array, " B"], num_queries: int, num_keys: int
) -> tuple[Int[Array, "B nq"], Int[Array, "B nq"]]:
    """First and last block of keys that each block of queries may reach; first > last where it reaches none."""
    first = columns[:, None] + blocks.block_q * jnp.arange(-(-num_queries // blocks.block_q), dtype=jnp.int32)
    low = jnp.zeros_like(first) if band.window is None else jnp.maximum(first - band.window + 1, 0)
    high = jnp.minimum(first + blocks.block_q - 1 + band.ahead, num_keys - 1)
    return low // blocks.block_kv, high // blocks.block_kv


def query_blocks(
    band: Band, blocks: BandBlocks, columns: Int[Array, " B"], num_queries: int, num_keys: int
) -> tuple[Int[Array, "B nk"], Int[Array, "B nk"]]:
    """First and last block of queries that may see each block of keys; first > last where none does."""
    first = blocks.block_kv * jnp.arange(-(-num_keys // blocks.block_kv), dtype=jnp.int32) - columns[:, None]
    low = jnp.maximum(first - band.ahead, 0)
    high = jnp.full_like(first, num_queries - 1)
    if band.window is not None:
        high = jnp.minimum(first + blocks.block_kv - 1 + band.window - 1, high)
    return low // blocks.block_q, high // blocks.block_q


def most_blocks(width: int, shift: int, step: int, block: int) -> int:
    """Most blocks that `width` columns touch when they begin at shift + i * step for any i."""
    align = math.gcd(step, block)
    return (block - align + shift % align + width - 1) // block + 1


def most_key_blocks(band: Band, blocks: BandBlocks, num_keys: int, step: int) -> int:
    """Most blocks of keys that any block of queries reaches: an extent of the grid. `step` is `Marks.step`."""
    count = -(-num_keys // blocks.block_kv)
    if band.window is None:
        return count
    width = blocks.block_q + band.window - 1 + band.ahead
    return min(most_blocks(width, 1 - band.window, math.gcd(blocks.block_q, step), blocks.block_kv), count)


def most_query_blocks(band: Band, blocks: BandBlocks, num_queries: int, step: int) -> int:
    """Most blocks of queries that see any one block of keys; `step` is `Marks.step`."""
    count = -(-num_queries // blocks.block_q)
    if band.window is None:
        return count
    width = blocks.block_kv + band.window - 1 + band.ahead
    return min(most_blocks(width, -band.ahead, math.gcd(blocks.block_kv, step), blocks.block_q), count)
