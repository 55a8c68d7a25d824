"""The schedule of `band_backward`: which tiles each block meets, and which of its steps need no mask from ids.

Either gradient owns blocks along one axis (queries for dq, keys for dk and dv) and meets tiles along the other. A step
of the grid reads `chunk` consecutive tiles. Most steps are clear: what their tiles show is known when traced. Those run
as one straight piece of code; the others go tile by tile, with the full mask.
Dimension letters as in `gemma_kernels.reference`; `n` and `m` count blocks and tiles.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from gemma_kernels.tpu.band import (
    Band,
    BandBlocks,
    Block,
    Marks,
    key_blocks,
    most_key_blocks,
    most_query_blocks,
    query_blocks,
)

FIELDS = 6  # integers of one block in a schedule


@dataclass(frozen=True)
class TileBlocks(BandBlocks):
    """Sizes of a step of a gradient: block_q queries of `heads` heads against block_kv keys, `tiles` times.

    dq owns block_q queries and meets tiles of block_kv keys; dk and dv own block_kv keys and meet tiles of block_q
    queries. The owned size should be a multiple of the other's: then the edges of a window fall alike in every block
    and, if the tiles of a window are no more than `tiles`, one step without a mask from ids does a whole block.
    """

    tiles: int = 8

    def __post_init__(self):
        if self.tiles < 1:
            raise ValueError(f"tiles is {self.tiles}, wanted at least 1 tile in a step")


@dataclass(frozen=True)
class AttentionBlocks:
    """Sizes for each kernel of `band_attention`.

    fused: queries, and keys, of a step of the kernel that makes all gradients of a window; None: dq and dkv make them.
    """

    forward: BandBlocks
    dq: TileBlocks
    dkv: TileBlocks
    fused: int | None = None


@dataclass(frozen=True)
class Plan:
    """What is fixed of one gradient's grid when it is traced; block and tile are sizes in columns.

    owns_queries: dq's plan, else that of dk and dv. heads: those of a step, of the `share` that have one key head.
    A step reads chunk tiles of num_tiles; a block takes `chunks` steps for each group of heads. `clear` has one entry
    per tile of a clear step: None, or, where the band's edge is in the tile, its first query's column less its first
    key's. It is empty where no step can be clear.
    """

    band: Band
    owns_queries: bool
    heads: int
    share: int
    block: int
    tile: int
    num_blocks: int
    num_tiles: int
    num_keys: int
    chunk: int
    chunks: int
    clear: tuple[int | None, ...]

    @property
    def is_single(self) -> bool:
        """Whether a window's tiles are all read by one step, so that a clear step holds the window's edges."""
        return self.band.window is not None and self.chunks == 1

    @property
    def groups(self) -> int:
        """Groups of heads that add to one block."""
        return 1 if self.owns_queries else self.share // self.heads

    @property
    def steps(self) -> int:
        """Steps of the grid that add to one block."""
        return self.chunks * self.groups


class Step(NamedTuple):
    """What a step of the grid does: tiles [first, end), of which `start` is the first that was read."""

    first: Any
    end: Any
    start: Any
    is_clear: Any


def quotient(a: Any, b: int) -> Any:
    """a // b of what is not negative; Python's `//` asks for the device when traced, to look at signs."""
    return a if b == 1 else jax.lax.div(a, jnp.int32(b))


def start_at(plan: Plan, table: Any, entry: Any, number: Any) -> Any:
    """The first tile that step `number` of block number `entry` reads: that of the step before where it has none."""
    base = table[entry * FIELDS]
    if plan.chunks == 1:
        return base
    chunk = jnp.minimum(jax.lax.rem(number, jnp.int32(plan.chunks)), table[entry * FIELDS + 1])
    return jnp.minimum(base + chunk * plan.chunk, plan.num_tiles - plan.chunk)


def step_at(plan: Plan, table: Any, entry: Any, number: Any) -> Step:
    """The step `number` of block number `entry` of a flat schedule."""
    base, _, first, end, clear_first, clear_end = (table[entry * FIELDS + i] for i in range(FIELDS))
    low = base
    if plan.chunks > 1:
        low += jax.lax.rem(number, jnp.int32(plan.chunks)) * plan.chunk
    is_clear = (clear_first <= low) & (low + plan.chunk <= clear_end)
    start = start_at(plan, table, entry, number)
    return Step(jnp.maximum(first, low), jnp.minimum(end, low + plan.chunk), start, is_clear)


def clear_tiles(band: Band, blocks: BandBlocks, shift: int, owns_queries: bool) -> tuple[int | None, ...]:
    """Plan.clear of a window's single step, whose first tile is `shift` tiles right of the block's first column."""
    block, tile = (blocks.block_q, blocks.block_kv) if owns_queries else (blocks.block_kv, blocks.block_q)
    assert band.window is not None
    count = (block - 1) // tile - shift + 1 if owns_queries else (block + band.window - 2) // tile + 1
    distances = [(-1 if owns_queries else 1) * (shift + i) * tile for i in range(count)]

    def is_whole(distance):
        return distance >= blocks.block_kv - 1 and distance + blocks.block_q - 1 < band.window

    return tuple(None if is_whole(distance) else distance for distance in distances)


def plan_of(band: Band, blocks: TileBlocks, sizes: tuple[int, int, int], marks: Marks, owns_queries: bool) -> Plan:
    """The plan of dq (`owns_queries`) or of dk and dv; sizes are T, S and query heads per key head."""
    num_queries, num_keys, share = sizes
    query, key = (blocks.block_q, num_queries), (blocks.block_kv, num_keys)
    (block, owned), (tile, other) = (query, key) if owns_queries else (key, query)
    num_blocks, num_tiles = -(-owned // block), -(-other // tile)
    most_tiles, window = most_key_blocks if owns_queries else most_query_blocks, band.window
    most = most_tiles(band, blocks, other, marks.step)
    chunk = min(blocks.tiles, most)
    chunks = -(-most // chunk)
    clear: tuple[int | None, ...] = (None,) * chunk
    if window is not None and chunks == 1:
        clear = clear_tiles(band, blocks, (1 - window) // tile if owns_queries else 0, owns_queries)
        clear = clear if marks.step == 0 and block % tile == 0 and len(clear) <= chunk else ()
    return Plan(
        band, owns_queries, blocks.heads, share, block, tile, num_blocks, num_tiles, num_keys, chunk, chunks, clear
    )


def runs(tiles: Block) -> tuple[Int[Array, "B m"], Int[Array, "B m"]]:
    """First and end of the run of tiles, all of one segment alone, that each tile is in (itself at least)."""
    count = tiles.segment_low.shape[1]
    index = jnp.arange(count, dtype=jnp.int32)[None]
    pure = tiles.segment_low == tiles.segment_high
    joined = pure[:, 1:] & pure[:, :-1] & (tiles.segment_low[:, 1:] == tiles.segment_low[:, :-1])
    joined = jnp.pad(joined, ((0, 0), (1, 1)))
    first = jax.lax.cummax(jnp.where(joined[:, :-1], 0, index), axis=1)
    return first, jax.lax.cummin(jnp.where(joined[:, 1:], count, index + 1), axis=1, reverse=True)


def at(x: Int[Array, "B m"], index: Int[Array, "B n"]) -> Int[Array, "B n"]:
    """x[b, index[b, i]], of the nearest entry where there is none."""
    return jnp.take_along_axis(x, jnp.clip(index, 0, x.shape[1] - 1), axis=1)


def within_segments(
    blocks: Block, tiles: Block, first: Int[Array, "B n"], end: Int[Array, "B n"]
) -> tuple[Int[Array, "B n"], Int[Array, "B n"]]:
    """The range [first, end) less the tiles at its ends whose segments are all below, or all above, the block's.

    Exact where ids do not fall along a row, as packing numbers them; never too narrow.
    """
    search = jax.vmap(jnp.searchsorted, in_axes=(0, 0))
    low = search(jax.lax.cummax(tiles.segment_high, axis=1), blocks.segment_low)
    high = search(jax.lax.cummin(tiles.segment_low, axis=1, reverse=True), blocks.segment_high + 1)
    return jnp.maximum(first, low.astype(jnp.int32)), jnp.minimum(end, high.astype(jnp.int32))


def same_segment(blocks: Block, tiles: Block, index: Int[Array, "B n"]) -> Bool[Array, "B n"]:
    """Whether a block and its tile number `index` are of one segment, the same."""
    low = jnp.minimum(blocks.segment_low, at(tiles.segment_low, index))
    return low == jnp.maximum(blocks.segment_high, at(tiles.segment_high, index))


def schedule(plan: Plan, bounds: tuple[Array, Array], clear: tuple[Array, Array]) -> Int[Array, "B n 6"]:
    """The table that `step_at` reads, of tiles [first, end) and the clear ones among them."""
    first, end = bounds
    # Without a window steps begin at multiples of a chunk, so that only those at a range's ends are not clear.
    base = first if plan.band.window is not None else first // plan.chunk * plan.chunk
    base = jnp.clip(base, 0, plan.num_tiles - 1 if plan.chunks > 1 else plan.num_tiles - plan.chunk)
    last = jnp.maximum(end - 1 - base, 0) // plan.chunk
    return jnp.stack([base, last, first, end, *clear], axis=-1).astype(jnp.int32)


def single_clear(
    plan: Plan, blocks: Block, tiles: Block, first: Array, is_inside: Bool[Array, "B n"]
) -> tuple[Array, Array]:
    """Clear tiles where one step reads a window: the whole chunk, or none."""
    last = first + len(plan.clear) - 1
    is_clear = is_inside & (first >= 0) & (first + plan.chunk <= plan.num_tiles) & bool(plan.clear)
    is_clear &= same_segment(blocks, tiles, last) & (at(runs(tiles)[0], last) <= first) & (blocks.span_high == 0)
    return first, jnp.where(is_clear, first + plan.chunk, first)


def key_schedule(plan: Plan, blocks: BandBlocks, queries: Block, keys: Block, num_queries: int) -> Array:
    """The tiles of keys that each block of queries meets."""
    band, tile = plan.band, plan.tile
    first, last = key_blocks(band, blocks, queries.first[:, 0], num_queries, plan.num_keys)
    causal = jnp.minimum(queries.last, plan.num_keys - 1) // tile
    end = jnp.where(queries.span_high > 0, last, causal) + 1
    first, end = within_segments(queries, keys, first, end)
    if plan.is_single:
        assert band.window is not None
        begin = (queries.first - band.window + 1) // tile
        clear = single_clear(plan, queries, keys, begin, queries.last < plan.num_keys)
        return schedule(plan, (first, end), clear)
    clear_end = jnp.minimum(jnp.maximum(queries.first + 1, 0), plan.num_keys) // tile
    clear_first = at(runs(keys)[0], clear_end - 1)
    if band.window is not None:
        clear_first = jnp.maximum(clear_first, -((band.window - 1 - queries.last) // tile))
    clear_end = jnp.where(same_segment(queries, keys, clear_end - 1), clear_end, 0)
    return schedule(plan, (first, end), (clear_first, clear_end))


def query_schedule(plan: Plan, blocks: BandBlocks, keys: Block, queries: Block, num_queries: int) -> Array:
    """The tiles of queries that each block of keys meets."""
    band, tile, column = plan.band, plan.tile, queries.first[:, :1]
    first, last = query_blocks(band, blocks, queries.first[:, 0], num_queries, plan.num_keys)
    causal = jnp.maximum(keys.first - column, 0) // tile
    first, end = within_segments(keys, queries, jnp.where(keys.span_high > 0, first, causal), last + 1)
    if plan.is_single:
        clear = single_clear(plan, keys, queries, keys.first // tile, keys.last < plan.num_keys)
        return schedule(plan, (first, end), clear)
    clear_first = jnp.maximum(-((column - keys.last) // tile), 0)
    clear_end = at(runs(queries)[1], clear_first)
    if band.window is not None:
        clear_end = jnp.minimum(clear_end, (keys.first + band.window - column) // tile)
    clear_end = jnp.where(same_segment(keys, queries, clear_first), clear_end, 0)
    return schedule(plan, (first, end), (clear_first, clear_end))
