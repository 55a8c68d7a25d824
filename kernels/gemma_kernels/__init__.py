"""Kernels for Gemma's attention, streams, head and quantised weights: arrays in, arrays out.

Each operation has a `choose_...` that says what serves it for the arrays at hand; see `dispatch`. What it computes is
written in plain `jnp` in `reference`.
"""

from gemma_kernels.dispatch import Choice, recorded, using
from gemma_kernels.ops import (
    MOST_DECODE_QUERIES,
    band_attention,
    choose_band_attention,
    choose_decode_attention,
    choose_group_quant_matmul,
    choose_linear_cross_entropy,
    choose_mix_streams,
    decode_attention,
    group_quant_matmul,
    linear_cross_entropy,
    mix_streams,
)
from gemma_kernels.tpu.band import Band, Marks

__all__ = [
    "MOST_DECODE_QUERIES",
    "Band",
    "Choice",
    "Marks",
    "band_attention",
    "choose_band_attention",
    "choose_decode_attention",
    "choose_group_quant_matmul",
    "choose_linear_cross_entropy",
    "choose_mix_streams",
    "decode_attention",
    "group_quant_matmul",
    "linear_cross_entropy",
    "mix_streams",
    "recorded",
    "using",
]
