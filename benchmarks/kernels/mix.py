"""Our mixtures of streams, as AltUp has them before a block and after it, and their gradients."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.kernels.case import Blocks, Entry, Program
from benchmarks.kernels.estimate import Part
from gemma_kernels.tpu.mix_streams import MixBlocks, mix_streams

SIZES = (64, 32, 128, 256)
ROWS = 16  # of bfloat16 that one turn of the kernels' loop takes
KINDS = ("forward", "backward")


def choices(kind: str) -> tuple[Blocks, ...]:
    """Tokens of one step."""
    return tuple({kind: size} for size in SIZES)


@dataclass(frozen=True, kw_only=True)
class MixShape:
    """Tokens in bfloat16, each with as many vectors of some width as there are streams, and others."""

    name: str
    tokens: int
    streams: int
    outputs: int
    has_other: bool = False
    has_added: bool = False
    width: int = 2048
    is_quick: bool = False

    @property
    def inputs(self) -> int:
        """Vectors that are mixed."""
        return self.streams + self.has_other

    def entry(self, kind: str) -> Entry:
        shape = {"width": self.width, "vectors": self.inputs + self.outputs}
        return Entry(kernel="mix_streams", shape=shape, parts=(kind,))


SHAPES = (
    MixShape(name="3n-predict-4k", tokens=4096, streams=4, outputs=1),
    MixShape(name="3n-correct-4k", tokens=4096, streams=4, outputs=4, has_other=True, has_added=True, is_quick=True),
)


def program(shape: MixShape, kind: str, blocks: Blocks) -> Program:
    """One of the kernels. Gradients need all that went in but `added`, and what is sent back of the results."""
    block = blocks[kind]

    def mixed(*arrays: Any) -> jax.Array:
        return mix_streams(*arrays, blocks=MixBlocks(block, block))

    def gradients(d_out: jax.Array, *arrays: Any) -> Any:
        return jax.vjp(mixed, *arrays)[1](d_out)

    def vectors(*sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*sizes, shape.tokens, shape.width), jnp.bfloat16)

    coefficients = jax.ShapeDtypeStruct((shape.tokens, shape.outputs, shape.inputs), jnp.float32)
    other, added = (vectors() if has else None for has in (shape.has_other, shape.has_added))
    given = coefficients, vectors(shape.streams), other, added
    is_forward = kind == "forward"
    moved = shape.inputs * (1 if is_forward else 2) + shape.outputs + shape.has_added
    return Program(
        function=mixed if is_forward else gradients,
        arguments=given if is_forward else (vectors(shape.outputs), *given),
        parts=(Part(pattern=f".*mix_streams_{kind}_*", trips={"^loop 1": block / ROWS}),),
        flops=2 * coefficients.size * shape.width * (1 if is_forward else 2),
        min_bytes=2 * moved * shape.tokens * shape.width + 4 * coefficients.size * (1 if is_forward else 2),
    )
