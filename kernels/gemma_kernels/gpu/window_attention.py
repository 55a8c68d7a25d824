"""Attention with a sliding window on GPU, by Pallas and Triton: work proportional to the band, memory to the tokens.

One program has a tile of queries of one head and goes over the tiles of keys that the band touches, with the softmax
of those seen so far (FlashAttention-2, arXiv:2307.08691). Query heads that share a key head read it by the L2 cache.
Dimension letters as in `gemma_kernels.reference`.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from gemma_kernels import reference
from gemma_kernels.gpu import window_backward
from gemma_kernels.gpu.window import (
    MASKED,
    Tile,
    Window,
    key_tiles,
    load_rows,
    product,
    store_rows,
    tile_mask,
    whole,
)

HEAD_WIDTHS = (128, 256)


@dataclass(frozen=True, kw_only=True)
class WindowBlocks:
    """The tiles of the three kernels: forward, gradient of queries, gradients of keys and values."""

    forward: Tile
    dq: Tile
    dkv: Tile


def default_blocks(head_width: int, dtype: jnp.dtype) -> WindowBlocks:
    """Tiles that an H100 holds in registers without spilling, and that its tensor cores take as they are.

    128 rows of 8 warps are two warpgroups' products, of 64 rows each; static figures from the compiler, not timings.
    """
    if dtype == jnp.float32:
        tile = Tile(block_q=32, block_kv=16, num_warps=8)
        return WindowBlocks(forward=tile, dq=tile, dkv=Tile(block_q=16, block_kv=16, num_warps=8))
    if head_width > 128:
        return WindowBlocks(
            forward=Tile(block_q=128, block_kv=64, num_warps=8),
            dq=Tile(block_q=128, block_kv=32, num_warps=8),
            dkv=Tile(block_q=32, block_kv=64, num_warps=8),
        )
    tile = Tile(block_q=128, block_kv=64, num_warps=8)
    return WindowBlocks(forward=tile, dq=tile, dkv=Tile(block_q=64, block_kv=128, num_warps=8))


def window_attention(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    *,
    window: int | None,
    softcap: float | None = None,
    query_segments: Int[Array, "B T"] | None = None,
    key_segments: Int[Array, "B S"] | None = None,
    offset: int = 0,
    blocks: WindowBlocks | None = None,
    interpret: bool = False,
) -> Float[Array, "B N T H"]:
    """`reference.attention` under `reference.band_mask`, differentiable in q, k and v.

    blocks: None takes `default_blocks`. Raises ValueError for arrays that do not fit.
    """
    segments = None if query_segments is None or key_segments is None else (query_segments, key_segments)
    _check(q, k, v, query_segments, key_segments)
    kind = Window(window, softcap, offset)
    blocks = default_blocks(q.shape[-1], q.dtype) if blocks is None else blocks
    return _attention(q, k, v, segments, kind, blocks, interpret)


def _check(q: jax.Array, k: jax.Array, v: jax.Array, query_segments, key_segments) -> None:
    if q.dtype not in (jnp.bfloat16, jnp.float32) or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; wanted all bfloat16 or all float32: cast them")
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        raise ValueError(f"q, k, v are {q.shape}, {k.shape}, {v.shape}; wanted [B, N, T, H] and twice [B, K, S, H]")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads and {k.shape[1]} key heads; wanted a multiple: repeat neither")
    if q.shape[3] not in HEAD_WIDTHS:
        raise ValueError(f"the head width is {q.shape[3]}; wanted one of {HEAD_WIDTHS}: leave this to XLA")
    if (query_segments is None) != (key_segments is None):
        raise ValueError("segments are given of only one of queries and keys; wanted both or neither")
    for name, given, wanted in (("query", query_segments, q), ("key", key_segments, k)):
        if given is not None and given.shape != (wanted.shape[0], wanted.shape[2]):
            raise ValueError(f"{name}_segments are {given.shape}; wanted {(wanted.shape[0], wanted.shape[2])}")


def _attend(q, k, v, segments, kind, blocks, interpret):
    out, residuals = _attend_forward(q, k, v, segments, kind, blocks, interpret)
    del residuals
    return out


def _attend_forward(q, k, v, segments, kind, blocks, interpret):
    out, log_sum = _forward(q, k, v, segments, kind, blocks.forward, interpret)
    return out, (q, k, v, segments, out, log_sum)


def _attend_backward(kind, blocks, interpret, residuals, d_out):
    q, k, v, segments, out, log_sum = residuals
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)
    saved = (q, k, v, d_out, log_sum, delta)
    dq = window_backward.query_gradient(saved, segments, kind, blocks.dq, interpret)
    dk, dv = window_backward.key_gradients(saved, segments, kind, blocks.dkv, interpret)
    return dq, dk, dv, None


_attention = jax.custom_vjp(_attend, nondiff_argnums=(4, 5, 6))
_attention.defvjp(_attend_forward, _attend_backward)


def _forward_kernel(q_ref, k_ref, v_ref, *refs, kind: Window, tile: Tile):
    *segment_refs, out_ref, log_sum_ref = refs
    first_query, num_keys = pl.program_id(0) * tile.block_q, k_ref.shape[0]
    q = load_rows(q_ref, first_query, tile.block_q)
    query = (first_query + jnp.arange(tile.block_q))[:, None]
    query_segments = load_rows(segment_refs[0], first_query, tile.block_q)[:, None] if segment_refs else None

    def add_tile(number, carry):
        sums, peak, total = carry
        first_key = number * tile.block_kv
        k, v = (load_rows(ref, first_key, tile.block_kv) for ref in (k_ref, v_ref))
        segments = None
        if query_segments is not None:
            segments = query_segments, load_rows(segment_refs[1], first_key, tile.block_kv)[None]
        seen = tile_mask(kind, query, (first_key + jnp.arange(tile.block_kv))[None], num_keys, segments)
        logits = jnp.where(seen, reference.capped(product(q, k, 1, 1), kind.softcap), MASKED)
        new_peak = jnp.maximum(peak, jnp.max(logits, axis=1))
        weights = jnp.where(seen, jnp.exp(logits - new_peak[:, None]), 0.0)
        kept = jnp.exp(peak - new_peak)
        sums = sums * kept[:, None] + product(weights.astype(v.dtype), v, 1, 0)
        return sums, new_peak, total * kept + jnp.sum(weights, axis=1)

    empty = jnp.zeros(q.shape, jnp.float32), jnp.full(tile.block_q, MASKED), jnp.zeros(tile.block_q, jnp.float32)
    sums, peak, total = jax.lax.fori_loop(*key_tiles(kind, first_query, tile, num_keys), add_tile, empty)
    divisor = jnp.where(total > 0, total, 1.0)  # a query that saw nothing has sums of 0
    store_rows(out_ref, first_query, sums / divisor[:, None])
    store_rows(log_sum_ref, first_query, jnp.where(total > 0, peak + jnp.log(divisor), MASKED))


def _forward(q, k, v, segments, kind, tile, interpret):
    """The output, and the logarithm of each softmax's sum, which the backward pass needs."""
    batch, heads, num_queries, _ = q.shape
    group = heads // k.shape[1]

    def by_head(i, n, b):
        return b, n

    def by_key_head(i, n, b):
        return b, jax.lax.div(n, group)

    arrays = [q, k, v, *(segments or ())]
    specs = [whole(q, by_head), whole(k, by_key_head), whole(v, by_key_head)]
    specs += [whole(segment, lambda i, n, b: (b,)) for segment in segments or ()]
    log_sum = jax.ShapeDtypeStruct(q.shape[:3], jnp.float32)
    return pl.pallas_call(
        functools.partial(_forward_kernel, kind=kind, tile=tile),
        name="window_attention",
        grid=(pl.cdiv(num_queries, tile.block_q), heads, batch),
        in_specs=specs,
        out_specs=[whole(q, by_head), whole(log_sum, by_head)],
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), log_sum],
        cost_estimate=window_backward.cost(q, k, kind, products=2, moved=[*arrays, q, log_sum]),
        compiler_params=tile.compiler_params,
        interpret=interpret,
    )(*arrays)
