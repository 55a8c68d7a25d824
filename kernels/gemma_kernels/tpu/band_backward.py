"""The gradients of `band_attention` on TPU, in memory proportional to T.

One kernel makes dq, another dk and dv; where a window's keys fit into VMEM, one can make all (`band_fused`). What a
step of them computes is in `band_gradients`, which tiles it reads in `band_tiles`.
Dimension letters as in `gemma_kernels.reference`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from gemma_kernels.tpu.band import LANES, Band, Marks, check
from gemma_kernels.tpu.band_fused import fused_backward
from gemma_kernels.tpu.band_gradients import dkv_step, dq_step, kernel
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
from gemma_kernels.tpu.band_tiles import AttentionBlocks, Plan, TileBlocks, plan_of


@functools.partial(jax.jit, static_argnames=("band", "blocks", "interpret"))
def band_backward(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    out: Float[Array, "B N T H"],
    log_sum: Float[Array, "B N T"],
    d_out: Float[Array, "B N T H"],
    marks: Marks,
    band: Band,
    blocks: AttentionBlocks,
    *,
    interpret: Interpret = False,
) -> tuple[Float[Array, "B N T H"], Float[Array, "B K S H"], Float[Array, "B K S H"]]:
    """The gradients of a loss to q, k and v, from that to `out`; `out` and `log_sum` are what `band_forward` gave.

    With blocks.fused and a window, and without offsets, one kernel makes them all.
    A query that sees nothing has a gradient of 0. T and S that are no multiples of their blocks are padded here, which
    copies the arrays.
    """
    for sizes in (blocks.dq, blocks.dkv):
        check(q, k, v, marks, band, sizes)
    if out.shape != q.shape or d_out.shape != q.shape or log_sum.shape != q.shape[:3]:
        raise ValueError(
            f"out, d_out and log_sum have shapes {out.shape}, {d_out.shape} and {log_sum.shape}, wanted twice "
            f"{q.shape} and {q.shape[:3]}: pass what band_forward gave for this q"
        )
    operands = Operands(q, d_out.astype(q.dtype), log_sum[:, :, None], out, k, v)
    if blocks.fused is not None and band.window is not None and marks.offsets is None:
        return fused_backward(operands, marks, band, blocks.fused, interpret)
    dq, sums = gradient(operands, marks, band, blocks.dq, interpret)
    dk, dv = gradient(operands._replace(sums=sums, out=None), marks, band, blocks.dkv, interpret)
    return dq, dk, dv


def gradient(
    operands: Operands, marks: Marks, band: Band, blocks: TileBlocks, interpret: Interpret
) -> tuple[Array, Array]:
    """dq and sums [B, N, 2, T], or, of those sums, dk and dv."""
    (_, num_heads, num_queries, _), (_, num_shared, num_keys, _) = operands.q.shape, operands.k.shape
    sizes = num_queries, num_keys, num_heads // num_shared
    plan = plan_of(band, blocks, sizes, marks, owns_queries=operands.out is not None)
    call = gradient_call(plan, marks, operands, interpret)
    first, second = call(*arguments(plan, blocks, operands, marks, interpret))
    if plan.owns_queries:
        return first[:, :, :num_queries], second[..., :num_queries]
    return first[:, :, :num_keys], second[:, :, :num_keys]


def gradient_call(plan: Plan, marks: Marks, operands: Operands, interpret: Interpret) -> Any:
    """The Pallas call of one gradient over (rows, groups of heads, blocks, steps)."""
    (num_rows, num_heads, num_queries, width), (num_shared,) = operands.q.shape, operands.k.shape[1:2]
    dtype = operands.q.dtype
    length = plan.num_blocks * plan.block
    pairs = num_rows * num_heads * pairs_of(plan, marks, num_queries)
    rows = plan.block * (plan.heads if plan.owns_queries else 1)
    total = pltpu.VMEM((rows, width), jnp.float32)
    owned = pl.BlockSpec((1, rows // plan.block, plan.block, width), lambda b, h, i, *_: (b, h, i, 0))
    if plan.owns_queries:
        outer, body, scratch = num_heads // plan.heads, dq_step, [total, pltpu.VMEM((2, rows, LANES), jnp.float32)]
        out_specs = [owned, pl.BlockSpec((1, plan.heads, 2, plan.block), lambda b, h, i, *_: (b, h, 0, i))]
        shapes = [(num_rows, num_heads, length, width), (num_rows, num_heads, 2, length)]
        types = [dtype, jnp.float32]
    else:
        outer, body, scratch, out_specs = num_shared, dkv_step, [total, total], [owned, owned]
        shapes, types = [(num_rows, num_shared, length, width)] * 2, [dtype, dtype]
    has_ids = marks.query_segments is not None, marks.query_spans is not None
    return pl.pallas_call(
        functools.partial(kernel, plan, has_ids, body),
        name="band_attention_dq" if plan.owns_queries else "band_attention_dkv",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(Scalars._fields),
            grid=(num_rows, outer, plan.num_blocks, plan.steps),
            in_specs=input_specs(plan, width, sum(has_ids)),
            out_specs=out_specs,
            scratch_shapes=scratch,
        ),
        out_shape=[jax.ShapeDtypeStruct(*x) for x in zip(shapes, types, strict=True)],
        compiler_params=compiler_params(4),
        cost_estimate=cost(plan, 3 if plan.owns_queries else 4, pairs, moved_bytes(plan, operands), width),
        interpret=interpret,
    )


def moved_bytes(plan: Plan, operands: Operands) -> int:
    """Bytes of q, d_out, out and dq, or of k, v, dk and dv, and of the tiles all their blocks read."""
    q, k = operands.q, operands.k
    passes, owned = (q.shape[1] // plan.heads, q) if plan.owns_queries else (q.shape[1], k)
    read = q.shape[0] * passes * plan.num_blocks * plan.chunks * plan.chunk * plan.tile * q.shape[3]
    return (4 * owned.size + 2 * read) * q.dtype.itemsize
