"""The gradients of window attention on GPU: one kernel for queries, one for keys and values.

Each goes over the band once and computes the softmax anew from the logits and the logarithm of its sum, so nothing
larger than the tokens is kept. A program of the second has one key head and goes over all query heads that share it:
sums stay in registers, no atomic addition, and the result does not depend on the order of programs.
Dimension letters as in `gemma_kernels.reference`.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float

from gemma_kernels import reference
from gemma_kernels.gpu.window import (
    Tile,
    Window,
    key_tiles,
    load_rows,
    product,
    query_tiles,
    store_rows,
    tile_mask,
    whole,
)

Saved = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]  # q, k, v, d_out, log_sum, delta


def cost(q: jax.Array, k: jax.Array, kind: Window, *, products: int, moved: Sequence[Any]) -> pl.CostEstimate:
    """The arithmetic of `products` products over the band, and each array of `moved` once."""
    batch, heads, num_queries, width = q.shape
    column = np.arange(num_queries) + kind.offset
    first = 0 if kind.window is None else np.maximum(column - kind.window + 1, 0)
    pairs = batch * heads * int(np.maximum(np.minimum(column + 1, k.shape[2]) - first, 0).sum())
    size = sum(array.size * array.dtype.itemsize for array in moved)
    return pl.CostEstimate(flops=2 * products * pairs * width, transcendentals=pairs, bytes_accessed=size)


def _weights(
    kind: Window, products: Float[Array, "..."], log_sum: Float[Array, "..."], seen: Bool[Array, "..."]
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """A tile's softmax weights, and what a gradient of the capped logits becomes that of `products` by."""
    logits = reference.capped(products, kind.softcap)
    weights = jnp.where(seen, jnp.exp(logits - log_sum), 0.0)
    return weights, weights if kind.softcap is None else weights * (1 - (logits / kind.softcap) ** 2)


def _query_kernel(q_ref, k_ref, v_ref, d_ref, log_sum_ref, delta_ref, *refs, kind: Window, tile: Tile):
    *segment_refs, dq_ref = refs
    first_query, num_keys = pl.program_id(0) * tile.block_q, k_ref.shape[0]
    q, d_out, log_sum, delta = (
        load_rows(ref, first_query, tile.block_q) for ref in (q_ref, d_ref, log_sum_ref, delta_ref)
    )
    query = (first_query + jnp.arange(tile.block_q))[:, None]
    query_segments = load_rows(segment_refs[0], first_query, tile.block_q)[:, None] if segment_refs else None

    def add_tile(number, dq):
        first_key = number * tile.block_kv
        k, v = (load_rows(ref, first_key, tile.block_kv) for ref in (k_ref, v_ref))
        segments = None
        if query_segments is not None:
            segments = query_segments, load_rows(segment_refs[1], first_key, tile.block_kv)[None]
        seen = tile_mask(kind, query, (first_key + jnp.arange(tile.block_kv))[None], num_keys, segments)
        _, slope = _weights(kind, product(q, k, 1, 1), log_sum[:, None], seen)
        d_logits = slope * (product(d_out, v, 1, 1) - delta[:, None])
        return dq + product(d_logits.astype(k.dtype), k, 1, 0)

    empty = jnp.zeros(q.shape, jnp.float32)
    store_rows(dq_ref, first_query, jax.lax.fori_loop(*key_tiles(kind, first_query, tile, num_keys), add_tile, empty))


def query_gradient(saved: Saved, segments, kind: Window, tile: Tile, interpret: bool) -> Float[Array, "B N T H"]:
    """The gradient of q; `saved` ends with the sum over H of out * d_out."""
    q, k = saved[:2]
    group = q.shape[1] // k.shape[1]

    def by_head(i, n, b):
        return b, n

    def by_key_head(i, n, b):
        return b, jax.lax.div(n, group)

    arrays = [*saved, *(segments or ())]
    specs = [whole(array, by_key_head if place in (1, 2) else by_head) for place, array in enumerate(saved)]
    specs += [whole(segment, lambda i, n, b: (b,)) for segment in segments or ()]
    return pl.pallas_call(
        functools.partial(_query_kernel, kind=kind, tile=tile),
        name="window_attention_dq",
        grid=(pl.cdiv(q.shape[2], tile.block_q), q.shape[1], q.shape[0]),
        in_specs=specs,
        out_specs=whole(q, by_head),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        cost_estimate=cost(q, k, kind, products=3, moved=[*arrays, q]),
        compiler_params=tile.compiler_params,
        interpret=interpret,
    )(*arrays)


def _key_kernel(q_ref, k_ref, v_ref, d_ref, log_sum_ref, delta_ref, *refs, kind: Window, tile: Tile):
    """All tiles are [S, T]: so keys, of which there are enough for a tensor core, are the rows of all products."""
    *segment_refs, dk_ref, dv_ref = refs
    group, num_queries, _ = q_ref.shape
    first_key, num_keys = pl.program_id(0) * tile.block_kv, k_ref.shape[0]
    k, v = (load_rows(ref, first_key, tile.block_kv) for ref in (k_ref, v_ref))
    key = (first_key + jnp.arange(tile.block_kv))[:, None]
    key_segments = load_rows(segment_refs[1], first_key, tile.block_kv)[:, None] if segment_refs else None
    start, stop = query_tiles(kind, first_key, tile, num_queries)

    def add_tile(number, carry):
        dk, dv = carry
        head = jax.lax.div(number, stop - start)
        first_query = (start + jax.lax.rem(number, stop - start)) * tile.block_q
        q, d_out, log_sum, delta = (
            load_rows(ref, first_query, tile.block_q, head) for ref in (q_ref, d_ref, log_sum_ref, delta_ref)
        )
        segments = None
        if key_segments is not None:
            segments = load_rows(segment_refs[0], first_query, tile.block_q)[None], key_segments
        seen = tile_mask(kind, (first_query + jnp.arange(tile.block_q))[None], key, num_keys, segments)
        weights, slope = _weights(kind, product(k, q, 1, 1), log_sum[None], seen)
        dv += product(weights.astype(d_out.dtype), d_out, 1, 0)
        d_logits = slope * (product(v, d_out, 1, 1) - delta[None])
        return dk + product(d_logits.astype(q.dtype), q, 1, 0), dv

    empty = jnp.zeros(k.shape, jnp.float32)
    num_tiles = group * jnp.maximum(stop - start, 0)
    dk, dv = jax.lax.fori_loop(0, num_tiles, add_tile, (empty, empty))
    store_rows(dk_ref, first_key, dk)
    store_rows(dv_ref, first_key, dv)


def key_gradients(
    saved: Saved, segments, kind: Window, tile: Tile, interpret: bool
) -> tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]]:
    """The gradients of k and v."""
    q, k = saved[:2]
    grouped = (q.shape[0], k.shape[1], q.shape[1] // k.shape[1])
    arrays = [x if place in (1, 2) else x.reshape(*grouped, *x.shape[2:]) for place, x in enumerate(saved)]

    def by_key_head(j, n, b):
        return b, n

    specs = [whole(array, by_key_head) for array in arrays]
    arrays += segments or ()
    specs += [whole(segment, lambda j, n, b: (b,)) for segment in segments or ()]
    return pl.pallas_call(
        functools.partial(_key_kernel, kind=kind, tile=tile),
        name="window_attention_dkv",
        grid=(pl.cdiv(k.shape[2], tile.block_kv), k.shape[1], k.shape[0]),
        in_specs=specs,
        out_specs=[whole(k, by_key_head)] * 2,
        out_shape=[jax.ShapeDtypeStruct(k.shape, k.dtype)] * 2,
        cost_estimate=cost(q, k, kind, products=4, moved=[*arrays, k, k]),
        compiler_params=tile.compiler_params,
        interpret=interpret,
    )(*arrays)
