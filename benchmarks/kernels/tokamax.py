"""tokamax's splash attention, an optional peer of `band_attention`; in its own environment, see `setup_tokamax.sh`.

Its forward takes several heads at once and its backward is one fused kernel. It is under development: the figures are
of the version that the script pins.
"""

import functools
from typing import Any

import jax
import numpy as np

from benchmarks.kernels.attention import AttentionShape
from benchmarks.kernels.case import Blocks, Program
from benchmarks.kernels.estimate import Part

SIZES = ((512, 512), (256, 256))  # of 1024 the window's were slower, and took minutes to compile


def choices(shape: AttentionShape) -> tuple[Blocks, ...]:
    """Square blocks; all heads of a group together."""
    return tuple({"block_q": q, "block_kv": k, "heads": min(shape.group, 2)} for q, k in SIZES)


def _modules() -> tuple[Any, Any]:
    from tokamax._src.ops.experimental.tpu.splash_attention import (  # pyright: ignore[reportMissingImports]
        splash_attention_kernel,
        splash_attention_mask,
    )

    return splash_attention_kernel, splash_attention_mask


@functools.cache
def _kernel(shape: AttentionShape, blocks: tuple[int, int, int], saves_residuals: bool) -> Any:
    kernels, masks = _modules()
    block_q, block_kv, heads = blocks
    square = (shape.tokens, shape.tokens)
    mask = masks.LocalMask(square, (shape.window - 1, 0), 0) if shape.window else masks.CausalMask(square)
    compute = min(block_kv, 512)
    config = kernels.SplashConfig(
        block_q=block_q,
        block_kv=block_kv,
        block_kv_compute=compute,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_kv_dkv_compute=compute,
        num_stacked_q_heads=heads,
        dq_reduction_steps=3,  # its default keeps a dq for every block of keys, which does not fit HBM at 32K
    )
    return kernels.make_splash_mha_single_device(mask, config=config, save_residuals=saves_residuals)


def forward(shape: AttentionShape, blocks: Blocks) -> Program:
    """The forward pass with residuals and segments."""
    kernel = _kernel(shape, (blocks["block_q"], blocks["block_kv"], blocks["heads"]), True)
    kernels = _modules()[0]

    def function(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array) -> Any:
        return jax.vmap(lambda q, k, v, ids: kernel(q, k, v, kernels.SegmentIds(ids, ids)))(q, k, v, ids)

    copies = shape.query_heads // blocks["heads"]
    part = _part("fwd", kernel.fwd_mask_info, copies, copies * shape.tokens // blocks["block_q"])
    return Program(
        function=function,
        arguments=(shape.queries(), shape.keys(), shape.keys(), shape.ids()),
        parts=(part,),
        flops=shape.flops,
        min_bytes=shape.forward_bytes,
    )


def backward(shape: AttentionShape, blocks: Blocks) -> Program:
    """The fused kernel of the backward pass with segments; the sum over its parts of dq is not counted."""
    kernel = _kernel(shape, (blocks["block_q"], blocks["block_kv"], blocks["heads"]), False)
    kernels = _modules()[0]

    def one_row(q, k, v, ids, d_out):
        return jax.vjp(lambda *arrays: kernel(*arrays, kernels.SegmentIds(ids, ids)), q, k, v)[1](d_out)

    ends = shape.query_heads * shape.tokens // blocks["block_kv"]
    return Program(
        function=jax.vmap(one_row),
        arguments=(shape.queries(), shape.keys(), shape.keys(), shape.ids(), shape.queries()),
        parts=(_part("dkv", kernel.dkv_mask_info, shape.query_heads, ends),),
        flops=shape.backward_flops,
        min_bytes=shape.backward_bytes,
    )


def _part(phase: str, mask: Any, copies: int, ends: float) -> Part:
    """Blocks that need no mask, and those that do, take branches of their own; `ends`: first and last steps."""
    kinds = np.asarray(mask.block_mask)[: int(mask.num_active_blocks[0])]
    whole, edge = int((kinds == 2).sum()) * copies, int((kinds == 1).sum()) * copies
    runs = {"#2 ": whole, "#3 ": edge, "#[14]$": ends}
    return Part(pattern=f"splash_mha_{phase}_.*", steps=len(kinds) * copies, runs=runs)
