"""jax's splash attention, the peer of `band_attention`: forward with residuals, and backward split into dq and dkv."""

import functools
from typing import Any

import jax
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from benchmarks.kernels.attention import AttentionShape
from benchmarks.kernels.case import Blocks, Program
from benchmarks.kernels.estimate import Part

CHOICES: tuple[Blocks, ...] = (
    {"block_q": 512, "block_kv": 512, "block_kv_compute": 512},
    {"block_q": 512, "block_kv": 1024, "block_kv_compute": 512},
    {"block_q": 1024, "block_kv": 1024, "block_kv_compute": 512},
)


@functools.cache
def _kernel(shape: AttentionShape, blocks: tuple[int, int, int], saves_residuals: bool) -> Any:
    square = (shape.tokens, shape.tokens)
    one = splash.LocalMask(square, (shape.window - 1, 0), 0) if shape.window else splash.CausalMask(square)
    block_q, block_kv, block_kv_compute = blocks
    sizes = splash.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_kv_compute=block_kv_compute,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_kv_dkv_compute=block_kv_compute,
        block_q_dq=block_q,
        block_kv_dq=block_kv,
    )
    mask = splash.MultiHeadMask([one] * shape.query_heads)
    return splash.make_splash_mha_single_device(mask, block_sizes=sizes, save_residuals=saves_residuals)


def forward(shape: AttentionShape, blocks: Blocks) -> Program:
    """The forward pass with residuals and segments."""
    kernel = _kernel(shape, _sizes(blocks), True)

    def function(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array) -> Any:
        return jax.vmap(lambda q, k, v, ids: kernel(q, k, v, splash.SegmentIds(ids, ids)))(q, k, v, ids)

    visited, lines = _runs(kernel.fwd_mask_info, shape, shape.tokens // blocks["block_q"])
    runs = {"#2 ": visited, "#[13]$": lines}  # of its three conditions the second guards the work
    return Program(
        function=function,
        arguments=(shape.queries(), shape.keys(), shape.keys(), shape.ids()),
        parts=(Part(pattern="splash_mha_fwd_segmented_residuals", runs=runs),),
        flops=shape.flops,
        min_bytes=shape.forward_bytes,
    )


def backward(shape: AttentionShape, blocks: Blocks) -> Program:
    """The two kernels of the backward pass with segments; the forward pass beside them is not counted."""
    kernel = _kernel(shape, _sizes(blocks), False)

    def one_row(q, k, v, ids, d_out):
        return jax.vjp(lambda *arrays: kernel(*arrays, splash.SegmentIds(ids, ids)), q, k, v)[1](d_out)

    visited, lines = _runs(kernel.dq_mask_info, shape, shape.tokens // blocks["block_q"])
    of_q = Part(pattern="splash_mha_dq_.*", runs={"#2 ": visited, "#[13]$": lines})
    visited, lines = _runs(kernel.dkv_mask_info, shape, shape.tokens // blocks["block_kv"])
    ends = lines * shape.key_heads / shape.query_heads
    of_keys = Part(pattern="splash_mha_dkv_.*", runs={"#2 ": visited, "#[13]$": ends})
    return Program(
        function=jax.vmap(one_row),
        arguments=(shape.queries(), shape.keys(), shape.keys(), shape.ids(), shape.queries()),
        parts=(of_q, of_keys),
        flops=shape.backward_flops,
        min_bytes=shape.backward_bytes,
    )


def _sizes(blocks: Blocks) -> tuple[int, int, int]:
    return blocks["block_q"], blocks["block_kv"], blocks["block_kv_compute"]


def _runs(mask: Any, shape: AttentionShape, num_blocks: int) -> tuple[float, float]:
    """Blocks of logits that are computed, and rows (columns) of such blocks, of all query heads."""
    masks = np.asarray(mask.block_mask)
    return float((masks > 0).sum() * shape.query_heads / masks.shape[0]), float(num_blocks * shape.query_heads)
