"""Attention of one query, or a few, to a cache of keys and values, on TPU: it reads as much of the cache as is in use.

The cache stays in HBM. The kernel copies it chunk by chunk into a few buffers in VMEM, always some chunks ahead of
the one at work, across the ends of sequences too; a chunk beyond a sequence's length is never asked for. So time and
traffic follow the real lengths, and no schedule is built outside the kernel. A window's ring and a global cache differ
only in which position a slot holds.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from gemma_kernels.tpu import decode_kernel
from gemma_kernels.tpu.decode_kernel import LANES, Call


@dataclass(frozen=True, kw_only=True)
class DecodeBlocks:
    """How the work is cut up. VMEM holds 2 * buffers * rows * K / head_groups * keys * H values of the cache."""

    keys: int  # slots of one chunk, which is copied and used at once; a cache of fewer slots is one chunk
    rows: int = 1  # sequences side by side: many short chains of work at once, but all as long as the longest
    buffers: int = 2  # chunks in VMEM at once: the one at work, and those on their way
    parts: int = 1  # parts of each sequence's chunks; on a chip of two cores that act as one, two parts use both
    head_groups: int = 1  # groups of key heads that take turns; each core may take one of them instead of a part

    def __post_init__(self):
        if min(self.keys, self.rows, self.buffers - 1, self.parts, self.head_groups) < 1:
            raise ValueError(f"{self}: buffers must be 2 at least, all else 1")


def decode_attention(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K S H"] | Int[Array, "B K S H"],
    v: Float[Array, "B K S H"] | Int[Array, "B K S H"],
    positions: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    *,
    window: int | None,
    blocks: DecodeBlocks,
    softcap: float | None = None,
    scales: tuple[Float[Array, "B K S"], Float[Array, "B K S"]] | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> Float[Array, "B N T H"]:
    """Attention of scaled queries to the slots that they see; a query that sees none gives 0.

    `reference.decode_mask` says which position a slot holds: `lengths` counts the stored tokens, the queries among
    them, and a position of -1 is padding. Slots that hold nothing yet are neither read nor trusted to be finite.
    `scales` are those of int8 keys and values, one per token and head; they multiply logits and weights.
    """
    options = {"window": window, "softcap": softcap, "interpret": interpret}
    wants_sums = blocks.parts > 1
    out, *sums = _call(q, (k, v, *(scales or ())), positions, lengths, blocks, wants_sums=wants_sums, **options)
    if wants_sums:
        out = merged_parts(out, sums[0][..., 0])[0]
    return out.reshape(q.shape).astype(q.dtype)


def decode_attention_parts(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K S H"] | Int[Array, "B K S H"],
    v: Float[Array, "B K S H"] | Int[Array, "B K S H"],
    positions: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    *,
    window: int | None,
    blocks: DecodeBlocks,
    softcap: float | None = None,
    scales: tuple[Float[Array, "B K S"], Float[Array, "B K S"]] | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[Float[Array, "B N T H"], Float[Array, "B N T"]]:
    """`decode_attention` in float32, and the logarithm of each softmax's sum (MASKED where nothing is seen).

    Results over parts of a cache, stacked, make the whole by `merged_parts`.
    """
    options = {"window": window, "softcap": softcap, "interpret": interpret}
    out, sums = _call(q, (k, v, *(scales or ())), positions, lengths, blocks, wants_sums=True, **options)
    out, sums = merged_parts(out, sums[..., 0])
    return out.reshape(q.shape), sums.reshape(q.shape[:-1])


def merged_parts(
    outs: Float[Array, "parts *rows H"], log_sums: Float[Array, "parts *rows"]
) -> tuple[Float[Array, "*rows H"], Float[Array, "*rows"]]:
    """One attention from those over disjoint sets of keys: the mean of `outs`, weighted by their softmax's sums."""
    if outs.shape[0] == 1:
        return outs[0], log_sums[0]
    peak = jnp.max(log_sums, axis=0)
    weights = jnp.exp(log_sums - peak)
    total = jnp.sum(weights, axis=0)
    return jnp.sum(outs * (weights / total)[..., None], axis=0), peak + jnp.log(total)


def _check(q: jax.Array, cache: Sequence[jax.Array], positions: jax.Array, lengths: jax.Array, blocks: DecodeBlocks):
    """Refuses what the kernel does not serve."""
    k, v, *scales = cache
    (rows, heads, queries, width), (key_heads, slots) = q.shape, k.shape[1:3]
    wanted = [("k", k, (rows, key_heads, slots, width)), ("v", v, k.shape)]
    wanted += [("positions", positions, (rows, queries)), ("lengths", lengths, (rows,))]
    wanted += [("scales", scale, k.shape[:3]) for scale in scales]
    for name, given, shape in wanted:
        if given.shape != shape:
            raise ValueError(f"{name} has shape {given.shape}; q of shape {q.shape}, k of {k.shape} want {shape}")
    if heads % key_heads or key_heads % blocks.head_groups:
        raise ValueError(
            f"{heads} query heads, {key_heads} key heads, {blocks.head_groups} head_groups: each must divide the former"
        )
    if k.dtype != v.dtype or (k.dtype == jnp.int8) != bool(scales):
        raise ValueError(f"k and v are {k.dtype} and {v.dtype}; give both in one dtype, and scales with int8 only")
    tile = _tile(cache)
    if slots > blocks.keys and (slots % tile or blocks.keys % LANES):
        raise ValueError(
            f"a cache of {slots} slots in chunks of {blocks.keys}: chunks must be a multiple of {LANES} slots, the "
            f"cache of {tile}; allocate more slots, or choose chunks of {slots}"
        )


def _tile(cache: Sequence[jax.Array]) -> int:
    """The slots of one tile of memory, which a copy cannot cut; scales have their slots in lanes."""
    return LANES if len(cache) > 2 else 32 // cache[0].dtype.itemsize


def _call(
    q: jax.Array,
    cache: tuple[jax.Array, ...],
    positions: jax.Array,
    lengths: jax.Array,
    blocks: DecodeBlocks,
    *,
    wants_sums: bool,
    window: int | None,
    softcap: float | None,
    interpret: bool | pltpu.InterpretParams,
) -> list[jax.Array]:
    """The kernel's [parts, B, K, G*T, H], and with `wants_sums` the sums' logarithms in 128 equal lanes."""
    _check(q, cache, positions, lengths, blocks)
    (num_rows, num_heads, num_queries, width), key_heads = q.shape, cache[0].shape[1]
    stacked, heads = num_heads // key_heads * num_queries, key_heads // blocks.head_groups
    call = _plan(q, cache, blocks, window, softcap)
    outs = [(width, jnp.float32 if wants_sums else q.dtype)] + [(LANES, jnp.float32)] * wants_sums
    block = (blocks.rows, heads, stacked)
    return pl.pallas_call(
        functools.partial(decode_kernel.kernel, call=call),
        out_shape=[jax.ShapeDtypeStruct((blocks.parts, num_rows, key_heads, stacked, n), dtype) for n, dtype in outs],
        grid_spec=_grid_spec(call, blocks, cache, (*block, width), [n for n, _ in outs]),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=_cost(q, cache),
        interpret=interpret,
        name="decode_attention",
    )(
        lengths.astype(jnp.int32),
        positions.astype(jnp.int32),
        q.reshape(num_rows, key_heads, stacked, width),
        list(cache),
    )


def _plan(
    q: jax.Array, cache: Sequence[jax.Array], blocks: DecodeBlocks, window: int | None, softcap: float | None
) -> Call:
    """The call as the kernel sees it."""
    key_heads, num_slots = cache[0].shape[1:3]
    return Call(
        num_rows=q.shape[0],
        num_slots=num_slots,
        num_queries=q.shape[2],
        window=window,
        softcap=softcap,
        keys=min(blocks.keys, num_slots),
        rows=blocks.rows,
        buffers=blocks.buffers,
        parts=blocks.parts,
        heads=key_heads // blocks.head_groups,
        tile=_tile(cache),
    )


def _grid_spec(
    call: Call, blocks: DecodeBlocks, cache: Sequence[jax.Array], block: tuple[int, ...], out_widths: Sequence[int]
) -> pltpu.PrefetchScalarGridSpec:
    """Queries and results come block by block; the kernel fetches the cache itself."""
    return pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(blocks.parts, blocks.head_groups, call.num_steps),
        in_specs=[
            pl.BlockSpec(block, lambda part, group, row, *_: (row, group, 0, 0)),
            [pl.BlockSpec(memory_space=pltpu.HBM) for _ in cache],
        ],
        out_specs=[
            pl.BlockSpec((None, *block[:-1], n), lambda part, group, row, *_: (part, row, group, 0, 0))
            for n in out_widths
        ],
        scratch_shapes=[_scratch(call, cache, block)],
    )


def _scratch(call: Call, cache: Sequence[jax.Array], block: tuple[int, ...]) -> dict[str, Any]:
    """What the kernel keeps from step to step: the fields of `decode_kernel.Refs` that are no arguments."""
    # Of the scales each chunk brings all heads': a few of them cannot be cut out of a tile.
    shapes = [(call.heads, call.keys, block[-1])] * 2 + [(cache[0].shape[1], call.keys)] * (len(cache) - 2)
    depth = (call.buffers, call.rows)
    return {
        "buffers": [pltpu.VMEM((*depth, *shape), x.dtype) for shape, x in zip(shapes, cache, strict=True)],
        "arrivals": pltpu.SemaphoreType.DMA((*depth, len(cache))),
        "cursor": pltpu.SMEM((4,), jnp.int32),
        "peak": pltpu.VMEM((*block[:-1], LANES), jnp.float32),
        "total": pltpu.VMEM((*block[:-1], LANES), jnp.float32),
        "out": pltpu.VMEM(block, jnp.float32),
    }


def _cost(q: jax.Array, cache: Sequence[jax.Array]) -> pl.CostEstimate:
    """The cost with a full cache: lengths are not known before the run."""
    logits = q.size // q.shape[-1] * cache[0].shape[2]
    moved = sum(x.size * x.dtype.itemsize for x in (q, q, *cache))
    return pl.CostEstimate(flops=4 * logits * q.shape[-1], transcendentals=logits, bytes_accessed=moved)
