"""What the kernels of `band_backward` compute in one step of their grids.

Weights are made again from q, k and the forward's log_sum. A clear step is one straight piece of code for a whole
window (or for `tiles` tiles of a longer context): the last product of each gradient then sums over all tiles inside the
matrix unit and not in vector registers, which is where most of the speed comes from. dq keeps queries along sublanes,
dk and dv keep them along lanes, so that no block of weights is ever transposed.
Dimension letters as in `gemma_kernels.reference`; R counts the queries of a block, stacked over the heads of a step.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from gemma_kernels.tpu import band as bands
from gemma_kernels.tpu import band_tiles as tiles
from gemma_kernels.tpu.band import LANES, Block, Ids
from gemma_kernels.tpu.band_inputs import Scalars
from gemma_kernels.tpu.band_tiles import Plan

ROWS, COLUMNS = ((1,), (0,)), ((1,), (1,))  # what a product contracts of its two factors


class Refs(NamedTuple):
    """What a step reads. sums: log_sum of each query, [heads, 1, T]; for dk and dv with delta below, [heads, 2, T].

    Only dq reads `out`, of which it makes delta = sum(out * d_out). Ids are None where a call has none.
    """

    q: Any
    d_out: Any
    sums: Any
    out: Any
    k: Any
    v: Any
    query_ids: Ids
    key_ids: Ids


class Place(NamedTuple):
    """Where a step stands: the row of the batch, the block it adds to, its number among those of the block."""

    row: Any
    block: Any
    number: Any
    step: tiles.Step


def kernel(plan: Plan, has_ids: tuple[bool, bool], body: Callable[..., None], *refs: Any) -> None:
    """Names the arguments of a step, and takes it: `body`."""
    scalars, rest = Scalars(*refs[:4]), list(refs[4:])
    q, d_out, sums = (rest.pop(0) for _ in range(3))
    out = rest.pop(0) if plan.owns_queries else None
    k, v = (rest.pop(0) for _ in range(2))
    query_ids = Ids(*(rest.pop(0) if has else None for has in has_ids))
    key_ids = Ids(*(rest.pop(0) if has else None for has in has_ids))
    body(plan, scalars, Refs(q, d_out, sums, out, k, v, query_ids, key_ids), rest)


def dq_step(plan: Plan, scalars: Scalars, refs: Refs, results: Sequence[Any]) -> None:
    """One step of dq: the block's queries against a chunk of keys. The first also makes delta."""
    dq, sums, total, stats = results
    place = place_of(plan, scalars)

    def slopes(keys, bias):
        """The gradient of the logits at some keys of the chunk, [R, keys]."""
        logits = product(stacked(refs.q), refs.k[0, 0, keys], COLUMNS)
        d_weights = product(stacked(refs.d_out), refs.v[0, 0, keys], COLUMNS)
        pair = stats[0, :, :1], stats[1, :, :1]
        return weights_and_slopes(plan.band.softcap, logits, d_weights, pair, bias)[1].astype(refs.k.dtype)

    def clear():
        size = plan.tile
        parts = [
            slopes(slice(i * size, (i + 1) * size), edge_bias(plan, distance, 0))
            for i, distance in enumerate(plan.clear)
        ]
        return [product(jnp.concatenate(parts, axis=1), refs.k[0, 0, : len(parts) * size], ROWS)]

    def tile(index):
        blocks, keys = blocks_at(plan, scalars, place, index), tile_slice(plan, place, index)

        @pl.when(bands.any_seen(plan.band, *blocks))
        def _():
            bias = tile_bias(plan, blocks, (ids_down(refs.query_ids, slice(None)), ids_at(refs.key_ids, keys)), 0)
            total[...] += product(slopes(keys, bias), refs.k[0, 0, keys], ROWS)

    run_step(plan, place, (functools.partial(make_stats, plan, refs, sums, stats), clear, tile), [(dq, total)])


def make_stats(plan: Plan, refs: Refs, sums: Any, stats: Any) -> None:
    """log_sum and delta = sum(out * d_out) as columns for the steps of dq, and as rows for dk and dv."""
    delta = stacked(refs.out).astype(jnp.float32) * stacked(refs.d_out).astype(jnp.float32)
    delta = jnp.broadcast_to(jnp.sum(delta, axis=1, keepdims=True), stats.shape[1:])
    stats[1] = delta
    for head in range(plan.heads):
        part = slice(head * plan.block, (head + 1) * plan.block)
        stats[0, part] = jnp.broadcast_to(refs.sums[0, head], (LANES, plan.block)).T
        sums[0, head, :1] = refs.sums[0, head]
        sums[0, head, 1:] = delta[part].T[:1]


def dkv_step(plan: Plan, scalars: Scalars, refs: Refs, results: Sequence[Any]) -> None:
    """One step of dk and dv: the block's keys against a chunk of queries, those of `heads` heads."""
    dk, dv, dk_total, dv_total = results
    place, size = place_of(plan, scalars), plan.tile

    def factors(head, queries, bias):
        """Weights and the gradient of the logits at some queries of the chunk, both [keys, queries]."""
        logits = product(refs.k[0, 0], refs.q[0, head, queries], COLUMNS)
        d_weights = product(refs.v[0, 0], refs.d_out[0, head, queries], COLUMNS)
        sums = refs.sums[0, head, :1, queries], refs.sums[0, head, 1:, queries]
        both = weights_and_slopes(plan.band.softcap, logits, d_weights, sums, bias)
        return [x.astype(refs.k.dtype) for x in both]

    def clear():
        biases = [edge_bias(plan, distance, 1) for distance in plan.clear]
        sums: list[Any] = [0.0, 0.0]
        for head in range(plan.heads):
            parts = [factors(head, slice(i * size, (i + 1) * size), bias) for i, bias in enumerate(biases)]
            for kind, x in enumerate((refs.d_out, refs.q)):
                joined = jnp.concatenate([part[kind] for part in parts], axis=1)
                sums[kind] += product(joined, x[0, head, : len(parts) * size], ROWS)
        return sums[::-1]

    def tile(index):
        blocks, queries = blocks_at(plan, scalars, place, index), tile_slice(plan, place, index)

        @pl.when(bands.any_seen(plan.band, *blocks))
        def _():
            bias = tile_bias(plan, blocks, (ids_at(refs.query_ids, queries), ids_down(refs.key_ids, slice(None))), 1)
            for head in range(plan.heads):
                weights, slopes = factors(head, queries, bias)
                dv_total[...] += product(weights, refs.d_out[0, head, queries], ROWS)
                dk_total[...] += product(slopes, refs.q[0, head, queries], ROWS)

    run_step(plan, place, (lambda: None, clear, tile), [(dk, dk_total), (dv, dv_total)])


def run_step(
    plan: Plan,
    place: Place,
    parts: tuple[Callable[[], None], Callable[[], Sequence[Array]], Callable[[Any], None]],
    refs: Sequence[tuple[Any, Any]],
) -> None:
    """Adds a step's share to (output, sum) references.

    parts: what a block begins with; the values of a clear step; one tile of another, which it adds to sums itself.
    """
    begin, clear, tile = parts
    step, is_clear = place.step, place.step.is_clear & bool(plan.clear)
    is_first, is_last = place.number == 0, place.number == plan.steps - 1
    if plan.steps == 1:  # in one piece: what a clear step has is written without sums in VMEM
        is_first = is_last = ~is_clear

    @pl.when(is_first)
    def _():
        begin()
        for _, total in refs:
            total[...] = jnp.zeros_like(total)

    @pl.when(~is_clear)
    def _():
        jax.lax.fori_loop(step.first, step.end, lambda index, _: tile(index), None)

    @pl.when(is_clear)
    def _():
        if plan.steps == 1:
            begin()
        for (out, total), value in zip(refs, clear() if plan.clear else (), strict=bool(plan.clear)):
            if plan.steps == 1:
                out[...] = value.astype(out.dtype).reshape(out.shape)
            else:
                total[...] += value

    @pl.when(is_last)
    def _():
        for out, total in refs:
            out[...] = total[...].astype(out.dtype).reshape(out.shape)


def weights_and_slopes(
    softcap: float | None, logits: Array, d_weights: Array, sums: tuple[Array, Array], bias: Array | None
) -> tuple[Array, Array]:
    """The softmax weights of a block, and the gradient of what was before the cap. bias is -inf where unseen.

    sums: log_sum and delta of each query.
    """
    slope = None
    if softcap is not None:
        ratio = jnp.tanh(logits * (1 / softcap))
        logits, slope = softcap * ratio, 1.0 - ratio * ratio
    if bias is not None:
        logits = (logits.reshape(-1, *bias.shape) + bias).reshape(logits.shape)
    # A query that sees nothing has a log_sum of -2.4e38: the bias makes its weights exp(-inf), not exp(inf).
    weights = jnp.exp(logits - sums[0])
    slopes = weights * (d_weights - sums[1])
    return weights, slopes if slope is None else slopes * slope


def edge_bias(plan: Plan, distance: int | None, query_axis: int) -> Array | None:
    """0 or -inf over a tile whose first query stands `distance` columns right of its first key; None: all is seen.

    query_axis: where queries run, 0 down sublanes or 1 along lanes.
    """
    if distance is None:
        return None
    shape = plan.block, plan.tile
    query, key = (jax.lax.broadcasted_iota(jnp.int32, shape, i) for i in (query_axis, 1 - query_axis))
    away, bias = query - key, jnp.zeros(shape, jnp.float32)
    if distance < shape[1 - query_axis] - 1:
        bias = jnp.where(away >= -distance, bias, -jnp.inf)
    if plan.band.window is not None and distance + shape[query_axis] > plan.band.window:
        bias = jnp.where(away < plan.band.window - distance, bias, -jnp.inf)
    return bias


def tile_bias(plan: Plan, blocks: tuple[Block, Block], ids: tuple[Ids, Ids], query_axis: int) -> Array:
    """0 where a query sees a key, else -inf, over the tile where two blocks, of queries and of keys, meet."""
    start = blocks[0].first, blocks[1].first
    seen = bands.seen_mask(plan.band, (plan.block, plan.tile), query_axis, start, plan.num_keys, ids)
    return jnp.where(seen, 0.0, -jnp.inf)


def place_of(plan: Plan, scalars: Scalars) -> Place:
    row, block, number = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    step = tiles.step_at(plan, scalars.table, row * plan.num_blocks + block, number)
    return Place(row, block, number, step)


def blocks_at(plan: Plan, scalars: Scalars, place: Place, index: Any) -> tuple[Block, Block]:
    """The queries and the keys of the owned block against tile number `index`."""
    owned = place.block, plan.block, place.row * plan.num_blocks + place.block
    other = index, plan.tile, place.row * plan.num_tiles + index
    query, key = (owned, other) if plan.owns_queries else (other, owned)
    return (
        bands.block_at(query[0], query[1], scalars.columns[place.row], scalars.queries, query[2]),
        bands.block_at(key[0], key[1], 0, scalars.keys, key[2]),
    )


def tile_slice(plan: Plan, place: Place, index: Any) -> Any:
    """Where tile number `index` lies in what the step has read."""
    return pl.ds(pl.multiple_of((index - place.step.start) * plan.tile, LANES), plan.tile)


def ids_at(ids: Ids, where: Any) -> Ids:
    """Ids along lanes, of some columns of those that were read."""
    return Ids(*(None if x is None else x[0, :, where] for x in ids))


def ids_down(ids: Ids, where: Any) -> Ids:
    """The same down sublanes. In HBM a column would take 128 times its bytes."""
    return Ids(*(None if x is None else jnp.broadcast_to(x, (LANES, x.shape[1])).T[:, :1] for x in ids_at(ids, where)))


def stacked(ref: Any) -> Array:
    """The block [1, heads, block, H] of a reference with its heads below each other, [R, H]."""
    return ref[...].reshape(-1, ref.shape[-1])


def product(a: Array, b: Array, contract: tuple[tuple[int], tuple[int]]) -> Array:
    """The product of two blocks, summed in float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = contract, ((), ())
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)
