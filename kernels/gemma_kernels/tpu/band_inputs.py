"""What the kernels of `band_backward` are given: arrays, the scalars they go by, and which blocks of each a step reads.

Dimension letters as in `gemma_kernels.reference`.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from gemma_kernels.tpu import band as bands
from gemma_kernels.tpu import band_tiles as tiles
from gemma_kernels.tpu.band import LANES, Marks
from gemma_kernels.tpu.band_tiles import Plan, TileBlocks

# A step holds its window twice (the next one is being fetched) and spills its weights: more than the 16 MiB that v5e
# grants by default. A core of tpu7x has 64 MiB.
VMEM_BYTES = 48 * 2**20

Interpret = bool | pltpu.InterpretParams


class Scalars(NamedTuple):
    """Integers a kernel knows before it starts: a column per row, a schedule and extents per block, flat."""

    columns: Any
    table: Any
    queries: Any
    keys: Any


class Operands(NamedTuple):
    """What a gradient is made of: log_sum is [B, N, 1, T], or, with delta below it and without out, [B, N, 2, T]."""

    q: Array
    d_out: Array
    sums: Array
    out: Array | None
    k: Array
    v: Array


def arguments(plan: Plan, blocks: TileBlocks, operands: Operands, marks: Marks, interpret: Interpret) -> list[Array]:
    """Scalars, operands padded to whole blocks, and ids, in the order of `input_specs`."""
    num_queries = operands.q.shape[2]
    marks = bands.padded_marks(marks, blocks)
    queries = [bands.padded(x, -1 if x is operands.sums else 2, blocks.block_q) for x in operands[:4] if x is not None]
    keys = [bands.padded(x, 2, blocks.block_kv) for x in operands[4:]]
    ids = (marks.query_segments, marks.query_spans, marks.key_segments, marks.key_spans)
    arrays = [*queries, *keys, *(x[:, None] for x in ids if x is not None)]
    if not interpret:  # else XLA may put all of q into VMEM, from where each step copies its part by vector registers
        arrays = [pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in arrays]
    return [*scalars_of(plan, blocks, marks, operands.q.shape[0], num_queries), *arrays]


def scalars_of(plan: Plan, blocks: TileBlocks, marks: Marks, num_rows: int, num_queries: int) -> Scalars:
    """What the kernel and its fetches go by."""
    columns = marks.columns(num_rows)
    counts = (plan.num_blocks, plan.num_tiles) if plan.owns_queries else (plan.num_tiles, plan.num_blocks)
    shapes = [(num_rows, n * size) for n, size in zip(counts, (blocks.block_q, blocks.block_kv), strict=True)]
    query_extents = bands.extents(marks.query_segments, marks.query_spans, shapes[0], blocks.block_q)
    key_extents = bands.extents(marks.key_segments, marks.key_spans, shapes[1], blocks.block_kv)
    queries = bands.block_table(columns, blocks.block_q, query_extents)
    keys = bands.block_table(jnp.zeros_like(columns), blocks.block_kv, key_extents)
    if plan.owns_queries:
        table = tiles.key_schedule(plan, blocks, queries, keys, num_queries)
    else:
        table = tiles.query_schedule(plan, blocks, keys, queries, num_queries)
    return Scalars(*(x.reshape(-1) for x in (columns, table, query_extents, key_extents)))


def input_specs(plan: Plan, width: int, num_ids: int) -> list[pl.BlockSpec]:
    """Blocks of q, d_out, sums [B, N, 1 or 2, T], (dq: out), k, v, and of the ids of queries and of keys [B, 1, T]."""
    read = plan.chunk * plan.tile
    queries, keys = (plan.block, read) if plan.owns_queries else (read, plan.block)

    def spec(shape, index):
        def at(b, h, i, j, columns, table, *_):
            start = tiles.start_at(plan, table, b * plan.num_blocks + i, j)
            owned, other = pl.multiple_of(i * plan.block, LANES), pl.multiple_of(start * plan.tile, LANES)
            if plan.owns_queries:
                return index(b, h * plan.heads, tiles.quotient(h * plan.heads, plan.share), owned, other)
            group = 0 if plan.groups == 1 else tiles.quotient(j, plan.chunks)
            return index(b, h * plan.share + group * plan.heads, h, other, owned)

        return pl.BlockSpec(tuple(pl.Element(size) for size in shape), at)

    query = spec((1, plan.heads, queries, width), lambda b, n, k, t, s: (b, n, t, 0))
    key = spec((1, 1, keys, width), lambda b, n, k, t, s: (b, k, s, 0))
    sums = spec((1, plan.heads, 1 if plan.owns_queries else 2, queries), lambda b, n, k, t, s: (b, n, 0, t))
    query_ids = spec((1, 1, queries), lambda b, n, k, t, s: (b, 0, t))
    key_ids = spec((1, 1, keys), lambda b, n, k, t, s: (b, 0, s))
    outs = [query] if plan.owns_queries else []
    return [query, query, sums, *outs, key, key, *[query_ids] * num_ids, *[key_ids] * num_ids]


def compiler_params(dimensions: int) -> pltpu.CompilerParams:
    """Of a grid whose last dimension adds to what the one before began."""
    return pltpu.CompilerParams(
        dimension_semantics=("parallel",) * (dimensions - 1) + ("arbitrary",),
        vmem_limit_bytes=VMEM_BYTES,
        disable_bounds_checks=True,  # 100 to 150 bundles a step; the schedule keeps every fetch inside its array
    )


def pairs_of(plan: Plan, marks: Marks, num_queries: int) -> int:
    """Pairs of a query and a key inside the band, of one head; chunks are taken to be a sequence's last."""
    ahead = 0 if marks.offsets is None else max(plan.num_keys - num_queries, 0)
    window = plan.band.window or plan.num_keys
    # Query i sees min(ahead + i + 1, window) keys: a triangle, then a rectangle.
    rising = min(max(window - ahead, 0), num_queries)
    return rising * ahead + rising * (rising + 1) // 2 + (num_queries - rising) * min(window, plan.num_keys)


def cost(plan: Plan, products: int, pairs: int, num_bytes: int, width: int) -> pl.CostEstimate:
    """Of `products` matrix products over the pairs of all heads."""
    return pl.CostEstimate(
        flops=2 * products * pairs * width,
        transcendentals=pairs * (1 if plan.band.softcap is None else 2),
        bytes_accessed=num_bytes,
    )
