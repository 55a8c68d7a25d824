"""Banded attention on TPU with its gradients, in O(T) memory: `band_forward` and `band_backward` as one."""

import functools

import jax
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from gemma_kernels.tpu.band import Band, Marks
from gemma_kernels.tpu.band_backward import band_backward
from gemma_kernels.tpu.band_forward import band_forward
from gemma_kernels.tpu.band_tiles import AttentionBlocks

Residuals = tuple[Array, Array, Array, Array, Array, Marks]


def band_attention(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    marks: Marks,
    band: Band,
    blocks: AttentionBlocks,
    *,
    interpret: bool | pltpu.InterpretParams = False,
) -> Float[Array, "B N T H"]:
    """Attention of scaled queries to the keys inside the band: `reference.attention` under `reference.band_mask`.

    Can be differentiated once, in reverse, by q, k and v; marks have no gradient. Each forward keeps its inputs, its
    output and one float32 per query and head.
    """
    return attention(q, k, v, marks, band, blocks, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def attention(
    q: Array,
    k: Array,
    v: Array,
    marks: Marks,
    band: Band,
    blocks: AttentionBlocks,
    interpret: bool | pltpu.InterpretParams,
) -> Array:
    return band_forward(q, k, v, marks, band, blocks.forward, interpret=interpret)[0]


def attention_forward(
    q: Array,
    k: Array,
    v: Array,
    marks: Marks,
    band: Band,
    blocks: AttentionBlocks,
    interpret: bool | pltpu.InterpretParams,
) -> tuple[Array, Residuals]:
    out, log_sum = band_forward(q, k, v, marks, band, blocks.forward, interpret=interpret)
    return out, (q, k, v, out, log_sum, marks)


def attention_backward(
    band: Band, blocks: AttentionBlocks, interpret: bool | pltpu.InterpretParams, residuals: Residuals, d_out: Array
) -> tuple[Array, Array, Array, None]:
    q, k, v, out, log_sum, marks = residuals
    gradients = band_backward(q, k, v, out, log_sum, d_out, marks, band, blocks, interpret=interpret)
    return *gradients, None


attention.defvjp(attention_forward, attention_backward)
