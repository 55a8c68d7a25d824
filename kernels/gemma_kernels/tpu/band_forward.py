"""The forward of a banded attention on TPU, and the logarithm of each softmax's sum for its backward.

Two kernels. Where a window fits into VMEM, one step takes a block of queries and every key they see. Else keys stream
through one block at a time. Both stack the query heads that share a key head, both skip what no query of a block sees.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from gemma_kernels.tpu import band as bands
from gemma_kernels.tpu.band import LANES, Band, BandBlocks, Marks
from gemma_kernels.tpu.band_softmax import Plan, Scalars, kernel

WINDOW_BYTES = 6 << 20  # keys and values of one window above which they stream instead; VMEM holds two of them
VMEM_BYTES = 48 << 20  # what a step may use: a core of tpu7x or v5p has 64 MiB; by default v5e grants 16 MiB


def band_forward(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    marks: Marks,
    band: Band,
    blocks: BandBlocks,
    *,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[Float[Array, "B N T H"], Float[Array, "B N T"]]:
    """Attention of scaled queries inside the band, and the logarithm of each softmax's sum in float32.

    The same as `reference.attention` under `reference.band_mask`, in O(T) memory. T and S that are no multiples of
    their blocks are padded here, which copies q, or k and v.
    """
    bands.check(q, k, v, marks, band, blocks)
    num_queries, num_keys = q.shape[2], k.shape[2]
    marks = bands.padded_marks(marks, blocks)
    q = bands.padded(q, 2, blocks.block_q)
    k, v = bands.padded(k, 2, blocks.block_kv), bands.padded(v, 2, blocks.block_kv)
    plan = make_plan(band, blocks, marks, (q.shape[2], k.shape[2]), num_keys, q.dtype)
    is_window = band.window is not None and step_bytes(plan, k) <= WINDOW_BYTES
    scalars = schedule(plan, marks, q.shape[0], num_queries, is_window)
    ids = marks.query_segments, marks.query_spans, marks.key_segments, marks.key_spans
    call = forward_call(plan, marks, q, k, is_window, interpret)
    out, log_sum = call(*scalars, q, k, v, *(x[:, None] for x in ids if x is not None))
    return out[:, :, :num_queries], log_sum.reshape(q.shape[:3])[:, :, :num_queries]


def make_plan(
    band: Band, blocks: BandBlocks, marks: Marks, lengths: tuple[int, int], num_keys: int, dtype: jnp.dtype
) -> Plan:
    """The plan for queries and keys of padded `lengths`, of which num_keys keys are there."""
    window = band.window or num_keys
    align = math.gcd(blocks.block_q, blocks.block_kv, marks.step)
    lead = window - 1 + (1 - window) % align
    return Plan(
        band,
        blocks,
        num_keys,
        (lengths[0] // blocks.block_q, lengths[1] // blocks.block_kv),
        bands.most_key_blocks(band, blocks, num_keys, marks.step),
        (lead, lead + blocks.block_kv - align),
        jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None,
    )


def step_bytes(plan: Plan, k: Array) -> int:
    """Keys and values that one step of the window's kernel holds."""
    return 2 * plan.slots * plan.blocks.block_kv * k.shape[3] * k.dtype.itemsize


def schedule(plan: Plan, marks: Marks, num_rows: int, num_queries: int, is_window: bool) -> Scalars:
    """Which keys each block of queries reads, and whether it can do without all masks but those of the band's edges."""
    band, blocks, (nq, nk) = plan.band, plan.blocks, plan.num_blocks
    columns = marks.columns(num_rows)
    first, last = bands.key_blocks(band, blocks, columns, num_queries, plan.num_keys)
    queries = bands.extents(marks.query_segments, marks.query_spans, (num_rows, nq * blocks.block_q), blocks.block_q)
    keys = bands.extents(marks.key_segments, marks.key_spans, (num_rows, nk * blocks.block_kv), blocks.block_kv)
    is_plain = jnp.zeros_like(first)
    if is_window and band.window is not None:
        query = bands.block_table(columns, blocks.block_q, queries)
        first = (query.first - band.window + 1) // blocks.block_kv
        inside = jnp.clip(first[:, :, None] + jnp.arange(plan.plain_slots, dtype=jnp.int32), 0, nk - 1)
        row = jnp.arange(num_rows)[:, None, None]
        low = jnp.minimum(query.segment_low, keys[row, inside, 0].min(2))
        high = jnp.maximum(query.segment_high, keys[row, inside, 1].max(2))
        is_plain = (low == high) & (query.span_high == 0) & (query.last < plan.num_keys)
        # with fewer blocks of keys than the path without masks may read there is no such path: see `window_step`
        is_plain &= (first >= 0) & (first <= nk - plan.slots) & (plan.plain_slots <= plan.slots)
    return Scalars(*(x.astype(jnp.int32).reshape(-1) for x in (columns, first, last, is_plain, queries, keys)))


def forward_call(plan: Plan, marks: Marks, q: Array, k: Array, is_window: bool, interpret: Any) -> Any:
    """The Pallas call over (rows, groups of heads, blocks of queries), and steps over keys where they stream."""
    blocks, (num_rows, num_heads, _, width) = plan.blocks, q.shape
    heads = blocks.heads
    grid = (num_rows, num_heads // heads, plan.num_blocks[0]) + (() if is_window else (plan.slots,))
    size = blocks.block_kv * (plan.slots if is_window else 1)
    has_ids = marks.query_segments is not None, marks.query_spans is not None
    query_spec = pl.BlockSpec((1, heads, blocks.block_q, width), lambda b, h, i, *_: (b, h, i, 0))
    rows_spec = pl.BlockSpec((1, 1, heads, blocks.block_q), lambda b, h, i, *_: (b, h, 0, i))
    id_spec = pl.BlockSpec((1, 1, blocks.block_q), lambda b, h, i, *_: (b, 0, i))
    key_spec, key_id_spec = key_specs(plan, is_window, num_heads // k.shape[1], size, width)
    states = [pltpu.VMEM((heads, blocks.block_q, n), jnp.float32) for n in (LANES, LANES, LANES, width)]
    return pl.pallas_call(
        functools.partial(kernel, plan, has_ids, is_window),
        name="band_window_forward" if is_window else "band_stream_forward",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(Scalars._fields),
            grid=grid,
            in_specs=[query_spec, key_spec, key_spec] + [id_spec] * sum(has_ids) + [key_id_spec] * sum(has_ids),
            out_specs=[query_spec, rows_spec],
            scratch_shapes=[*states, pltpu.SMEM((1,), jnp.int32)],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((num_rows, num_heads // heads, heads, q.shape[2]), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * 3 + ("arbitrary",) * (len(grid) - 3),
            vmem_limit_bytes=VMEM_BYTES,
            disable_bounds_checks=True,  # `key_specs` clips every block to its array, whatever the marks are
        ),
        cost_estimate=cost(plan, marks, q, k, math.prod(grid) * size),
        interpret=interpret,
    )


def key_specs(plan: Plan, is_window: bool, share: int, size: int, width: int) -> tuple[pl.BlockSpec, pl.BlockSpec]:
    """Where a step finds its `size` keys, and their ids; `share` query heads have one key head.

    Windows overlap, so keys are addressed by element. A step without any seen key names one that is there already, or
    will be needed next, so that nothing is fetched for it alone.
    """
    blocks, (nq, nk) = plan.blocks, plan.num_blocks

    def start(b, i, rest):
        scalars = Scalars(*rest[-len(Scalars._fields) :])
        first = scalars.first[b * nq + i]
        if is_window:
            block = jnp.clip(first, 0, nk - plan.slots)
        else:
            block = jnp.clip(scalars.last[b * nq + i] - rest[0], first, nk - 1)
        return pl.multiple_of(block * blocks.block_kv, LANES)

    def keys(b, h, i, *rest):
        return b, jax.lax.div(h * blocks.heads, share), start(b, i, rest), 0

    def ids(b, h, i, *rest):
        return b, 0, start(b, i, rest)

    one = pl.Element(1)
    return pl.BlockSpec((one, one, pl.Element(size), pl.Element(width)), keys), pl.BlockSpec(
        (one, one, pl.Element(size)), ids
    )


def cost(plan: Plan, marks: Marks, q: Array, k: Array, num_keys_read: int) -> pl.CostEstimate:
    """Operations on the pairs inside the band, and the bytes its blocks move.

    Where offsets are known only when it runs, queries are taken for the last of the keys.
    """
    num_queries, window = q.shape[2], plan.band.window or plan.num_keys
    before = 0 if marks.offsets is None else max(plan.num_keys - num_queries, 0)
    # Query i sees min(before + i + 1, window) keys: a trapezium, then a rectangle.
    rising = min(max(window - before, 0), num_queries)
    pairs = rising * before + rising * (rising + 1) // 2 + (num_queries - rising) * min(window, plan.num_keys)
    pairs *= q.shape[0] * q.shape[1]
    return pl.CostEstimate(
        flops=4 * pairs * q.shape[3],
        transcendentals=pairs * (1 if plan.band.softcap is None else 2),
        bytes_accessed=2 * q.size * q.dtype.itemsize
        + 4 * q.size // q.shape[3]
        + 2 * num_keys_read * k.shape[3] * k.dtype.itemsize,
    )
