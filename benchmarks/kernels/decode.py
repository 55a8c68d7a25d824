"""Our decoding attention: one query for each sequence against a cache that is full."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

import gemma_kernels
from benchmarks.kernels.case import Blocks, Program
from benchmarks.kernels.estimate import Part
from gemma_kernels import Band
from gemma_kernels.tpu.decode_attention import DecodeBlocks, decode_attention

CHOICES: tuple[Blocks, ...] = tuple(
    {"keys": keys, "buffers": buffers} for buffers in (2, 3) for keys in (512, 256, 1024, 128)
)


@dataclass(frozen=True, kw_only=True)
class DecodeShape:
    """B sequences; N query heads share K key heads of width H; S slots, all in use."""

    name: str
    query_heads: int
    key_heads: int
    width: int
    slots: int
    window: int | None = None
    is_int8: bool = False
    sequences: int = 8
    is_quick: bool = False

    @property
    def cache(self) -> jax.ShapeDtypeStruct:
        """Keys, or values."""
        dtype = jnp.int8 if self.is_int8 else jnp.bfloat16
        return jax.ShapeDtypeStruct((self.sequences, self.key_heads, self.slots, self.width), dtype)

    @property
    def query(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.sequences, self.query_heads, 1, self.width), jnp.bfloat16)

    def dispatched(self) -> Blocks | None:
        """What the model would use."""
        return gemma_kernels.choose_decode_attention(self.query, self.cache, Band(self.window)).blocks


def _shapes() -> tuple[DecodeShape, ...]:
    heads = {"1b": (4, 1, 256, 512), "4b": (8, 4, 256, 1024), "27b": (32, 16, 128, 1024)}
    return tuple(
        DecodeShape(
            name=f"{model}-{'ring' if is_ring else 'global-32k'}{'-int8' if is_int8 else ''}",
            query_heads=queries,
            key_heads=keys,
            width=width,
            slots=window if is_ring else 32768,
            window=window if is_ring else None,
            is_int8=is_int8,
            is_quick=model == "4b" and is_ring,
        )
        for model, (queries, keys, width, window) in heads.items()
        for is_ring in (True, False)
        for is_int8 in (False, True)
    )


SHAPES = _shapes()


def program(shape: DecodeShape, blocks: Blocks) -> Program:
    """The kernel against a cache whose lengths are its slots; chunks are the work that is counted."""
    cache, query = shape.cache, shape.query
    scale = jax.ShapeDtypeStruct(cache.shape[:3], jnp.float32)
    scales = (scale, scale) if shape.is_int8 else None
    integers = jax.ShapeDtypeStruct((shape.sequences,), jnp.int32)

    def function(q, k, v, positions, lengths, scales):
        k, v = (pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in (k, v))  # a model's caches do not fit VMEM
        return decode_attention(
            q, k, v, positions[:, None], lengths, window=shape.window, blocks=DecodeBlocks(**blocks), scales=scales
        )

    values = cache.size * 2
    return Program(
        function=function,
        arguments=(query, cache, cache, integers, integers, scales),
        parts=(_part(shape, blocks),),
        flops=4 * shape.sequences * shape.query_heads * shape.slots * shape.width,
        min_bytes=values * cache.dtype.itemsize + (2 * scale.size * 4 if shape.is_int8 else 0) + 4 * query.size,
    )


def _part(shape: DecodeShape, blocks: Blocks) -> Part:
    """Every chunk of every sequence is full; the search for the next chunk goes on once for each sequence."""
    groups = blocks.get("head_groups", 1)
    steps = -(-shape.sequences // blocks.get("rows", 1)) * groups
    chunks = steps * -(-shape.slots // min(blocks["keys"], shape.slots))
    return Part(
        pattern="decode_attention",
        waits=chunks,
        runs={
            "?used > 0": 0,
            "^loop .*while_loop": shape.sequences,
            "^loop .*fori_loop": chunks,
            "?when.step == 0": blocks.get("parts", 1) * groups,
        },
        trips={"?^loop .*_copies": shape.key_heads / groups},  # tpu7x copies several heads by a loop
    )
