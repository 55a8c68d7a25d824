"""All gradients of a window's attention in one kernel, where `band_backward` else takes two.

dq, dk and dv need the same weights; made once, they save two of seven matrix products. A step owns a block of queries.
It makes their dq, and adds to the dk and dv of all keys they see. Those wait in VMEM, in a ring of as many blocks as a
window touches, until the last query that sees them has passed. Everything keeps keys along sublanes.
Dimension letters as in `gemma_kernels.reference`; R counts a block's queries, stacked over the heads of a key head.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from gemma_kernels.tpu import band as bands
from gemma_kernels.tpu.band import LANES, Band, Marks
from gemma_kernels.tpu.band_gradients import (
    COLUMNS,
    ROWS,
    Place,
    Refs,
    blocks_at,
    edge_bias,
    ids_at,
    ids_down,
    kernel,
    product,
    stacked,
    tile_bias,
    tile_slice,
    weights_and_slopes,
)
from gemma_kernels.tpu.band_inputs import (
    Interpret,
    Operands,
    Scalars,
    arguments,
    compiler_params,
    cost,
    input_specs,
    pairs_of,
)
from gemma_kernels.tpu.band_tiles import Plan, TileBlocks, plan_of, step_at

FIRST = ((0,), (0,))  # what a product contracts of two factors that both have keys along sublanes


def fused_backward(
    operands: Operands, marks: Marks, band: Band, block: int, interpret: Interpret
) -> tuple[Array, Array, Array]:
    """dq, dk and dv of a band with a window, without offsets, by blocks of `block` queries and as many keys."""
    num_queries, num_keys = operands.q.shape[2], operands.k.shape[2]
    share = operands.q.shape[1] // operands.k.shape[1]
    blocks = TileBlocks(block, block, share, tiles=-(-num_keys // block))
    bands.check(operands.q, operands.k, operands.v, marks, band, blocks)
    plan = plan_of(band, blocks, (num_queries, num_keys, share), marks, owns_queries=True)
    call = fused_call(plan, operands, marks, interpret)
    dq, dk, dv = call(*arguments(plan, blocks, operands, marks, interpret))
    return dq[:, :, :num_queries], dk[:, :, :num_keys], dv[:, :, :num_keys]


def fused_call(plan: Plan, operands: Operands, marks: Marks, interpret: Interpret) -> Any:
    """The Pallas call over (rows, key heads, blocks of queries and as many more as keys wait for)."""
    (num_rows, num_heads, num_queries, width), num_shared = operands.q.shape, operands.k.shape[1]
    (back, ahead), last, block = reach(plan), plan.num_blocks - 1, plan.block
    query = pl.BlockSpec((1, plan.share, block, width), lambda b, h, i, *_: (b, h, jnp.minimum(i, last), 0))
    key = pl.BlockSpec((1, 1, block, width), lambda b, h, i, *_: (b, h, jnp.clip(i - back, 0, plan.num_tiles - 1), 0))
    keys = num_rows, num_shared, plan.num_tiles * block, width
    ring = pltpu.VMEM((back + 1 + ahead, block, width), jnp.float32)
    has_ids = marks.query_segments is not None, marks.query_spans is not None
    pairs = num_rows * num_heads * pairs_of(plan, marks, num_queries)
    return pl.pallas_call(
        functools.partial(kernel, plan, has_ids, fused_step),
        name="band_attention_gradients",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(Scalars._fields),
            grid=(num_rows, num_shared, max(plan.num_blocks, plan.num_tiles + back)),
            in_specs=[held_spec(spec, last) for spec in input_specs(plan, width, sum(has_ids))],
            out_specs=[query, key, key],
            scratch_shapes=[pltpu.VMEM((plan.share * block, width), jnp.float32), ring, ring],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(shape, operands.q.dtype)
            for shape in ((num_rows, num_heads, plan.num_blocks * block, width), keys, keys)
        ],
        compiler_params=compiler_params(3),
        cost_estimate=cost(plan, 5, pairs, moved_bytes(plan, operands), width),
        interpret=interpret,
    )


def reach(plan: Plan) -> tuple[int, int]:
    """Blocks of keys that a block of queries may see before its own, and behind it."""
    assert plan.band.window is not None
    return -((1 - plan.band.window) // plan.block), (plan.block - 1 + plan.band.ahead) // plan.block


def held_spec(spec: pl.BlockSpec, last: int) -> pl.BlockSpec:
    """The spec of a grid of three dimensions, in which steps after the last block of queries fetch nothing new."""
    index = spec.index_map
    assert index is not None
    return pl.BlockSpec(spec.block_shape, lambda b, h, i, *scalars: index(b, h, jnp.minimum(i, last), 0, *scalars))


def moved_bytes(plan: Plan, operands: Operands) -> int:
    """Bytes of q, d_out, out and dq, of dk and dv, and of the windows of k and v that all blocks read."""
    q, k = operands.q, operands.k
    read = k.shape[0] * k.shape[1] * plan.num_blocks * plan.chunk * plan.tile * k.shape[3]
    return (4 * q.size + 2 * k.size + 2 * read) * q.dtype.itemsize


def fused_step(plan: Plan, scalars: Scalars, refs: Refs, results: Sequence[Any]) -> None:
    """One block of queries; then the block of keys that no later query sees is written."""
    row, block = pl.program_id(0), pl.program_id(2)
    entry = row * plan.num_blocks + jnp.minimum(block, plan.num_blocks - 1)
    place = Place(row, block, 0, step_at(plan, scalars.table, entry, 0))
    is_clear = place.step.is_clear & (block < plan.num_blocks) & bool(plan.clear)

    @pl.when(block == 0)
    def _():
        for ring in results[-2:]:
            ring[...] = jnp.zeros_like(ring)

    if plan.clear:
        pl.when(is_clear)(lambda: clear_step(plan, refs, block, results))

    @pl.when(~is_clear)
    def _():
        dk, dv, _, dk_ring, dv_ring = results[1:]
        back, ahead = reach(plan)
        make_room((dk_ring, dv_ring), block + ahead)
        pl.when(block < plan.num_blocks)(lambda: tile_gradients(plan, scalars, refs, place, results))
        for out, ring in ((dk, dk_ring), (dv, dv_ring)):
            out[0, 0] = ring[slot_of(ring, block - back + ring.shape[0])].astype(out.dtype)


def clear_step(plan: Plan, refs: Refs, block: Any, results: Sequence[Any]) -> None:
    """A block of queries whose window is whole and of one segment, in one straight piece."""
    dq, dk, dv, _, dk_ring, dv_ring = results
    back, ahead = reach(plan)
    is_new = ahead == 0 and back > 0  # whether the last block of the window comes with this step, so that sums begin
    if not is_new:
        make_room((dk_ring, dv_ring), block + ahead)
    parts = clear_gradients(plan, refs, dq)
    for i, (out, ring) in enumerate(((dk, dk_ring), (dv, dv_ring))):
        out[0, 0] = (ring[slot_of(ring, block - back)] + parts[0][i]).astype(out.dtype)
        for j in range(1, back + 1):
            slot = slot_of(ring, block - back + j)
            ring[slot] = parts[j][i] if is_new and j == back else ring[slot] + parts[j][i]


def make_room(rings: Sequence[Any], block: Any) -> None:
    """Clears the place of the block of keys that comes, which is that of the one that left with the step before."""
    for ring in rings:
        ring[slot_of(ring, block)] = jnp.zeros(ring.shape[1:], jnp.float32)


def slot_of(ring: Any, block: Any) -> Any:
    """Where a ring holds block number `block` of the keys, which is not negative."""
    return jax.lax.rem(block, jnp.int32(ring.shape[0]))


def row_sums(plan: Plan, refs: Refs) -> tuple[Array, Array]:
    """log_sum and delta = sum(out * d_out) of the block, [1, R]."""
    delta = stacked(refs.out).astype(jnp.float32) * stacked(refs.d_out).astype(jnp.float32)
    delta = jnp.broadcast_to(jnp.sum(delta, axis=1, keepdims=True), (delta.shape[0], LANES)).T[:1]
    return jnp.concatenate([refs.sums[0, head] for head in range(plan.heads)], axis=1), delta


def factors(plan: Plan, refs: Refs, keys: Any, sums: tuple[Array, Array], bias: Array | None) -> tuple[Array, Array]:
    """Weights and the gradient of the logits at some keys of the window, both [keys, R]."""
    logits = product(refs.k[0, 0, keys], stacked(refs.q), COLUMNS)
    d_weights = product(refs.v[0, 0, keys], stacked(refs.d_out), COLUMNS)
    if bias is not None:
        bias = jnp.concatenate([bias] * plan.heads, axis=1)
    weights, slopes = weights_and_slopes(plan.band.softcap, logits, d_weights, sums, bias)
    return weights.astype(refs.k.dtype), slopes.astype(refs.k.dtype)


def clear_gradients(plan: Plan, refs: Refs, dq: Any) -> list[tuple[Array, Array]]:
    """Writes dq, and gives the shares in dk and dv of each block of the window."""
    size, sums = plan.tile, row_sums(plan, refs)
    pieces = [slice(i * size, (i + 1) * size) for i in range(len(plan.clear))]
    parts = [factors(plan, refs, x, sums, edge_bias(plan, y, 1)) for x, y in zip(pieces, plan.clear, strict=True)]
    weights, slopes = (jnp.concatenate([part[kind] for part in parts], axis=0) for kind in (0, 1))
    value = product(slopes, refs.k[0, 0, : len(parts) * size], FIRST)
    dq[...] = value.astype(dq.dtype).reshape(dq.shape)
    d_keys, d_values = product(slopes, stacked(refs.q), ROWS), product(weights, stacked(refs.d_out), ROWS)
    return [(d_keys[x], d_values[x]) for x in pieces]


def tile_gradients(plan: Plan, scalars: Scalars, refs: Refs, place: Place, results: Sequence[Any]) -> None:
    """Writes dq and adds to dk and dv tile by tile, under the full mask."""
    dq, _, _, total, dk_ring, dv_ring = results
    total[...] = jnp.zeros_like(total)
    sums = row_sums(plan, refs)

    def tile(index, _):
        blocks, keys = blocks_at(plan, scalars, place, index), tile_slice(plan, place, index)

        @pl.when(bands.any_seen(plan.band, *blocks))
        def _():
            bias = tile_bias(plan, blocks, (ids_at(refs.query_ids, slice(None)), ids_down(refs.key_ids, keys)), 1)
            weights, slopes = factors(plan, refs, keys, sums, bias)
            slot = slot_of(dk_ring, index)
            dk_ring[slot] += product(slopes, stacked(refs.q), ROWS)
            dv_ring[slot] += product(weights, stacked(refs.d_out), ROWS)
            total[...] += product(slopes, refs.k[0, 0, keys], FIRST)

    jax.lax.fori_loop(place.step.first, place.step.end, tile, None)
    dq[...] = total[...].astype(dq.dtype).reshape(dq.shape)
