"""Our product with int4 weights in groups of 32: few rows when decoding, many in a prefill."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

import gemma_kernels
from benchmarks.kernels.case import Blocks, Program
from benchmarks.kernels.estimate import Part
from gemma_kernels.tpu.group_quant_matmul import GROUP, QuantMatmulBlocks, group_quant_matmul


@dataclass(frozen=True, kw_only=True)
class QuantShape:
    """M rows of bfloat16 times a matrix of I inputs and O outputs."""

    name: str
    rows: int
    inputs: int
    outputs: int
    is_quick: bool = False

    @property
    def arrays(self) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """x, values and scales, which are bfloat16."""
        return (
            jax.ShapeDtypeStruct((self.rows, self.inputs), jnp.bfloat16),
            jax.ShapeDtypeStruct((self.inputs, self.outputs), jnp.int4),
            jax.ShapeDtypeStruct((self.inputs // GROUP, self.outputs), jnp.bfloat16),
        )

    def dispatched(self) -> Blocks | None:
        """What the model would use."""
        return gemma_kernels.choose_group_quant_matmul(*self.arrays).blocks

    @property
    def choices(self) -> tuple[Blocks, ...]:
        """Whole columns of blocks where they divide the matrix; sums of groups where the rows are few."""
        pairs = [(i, o) for i in (5376, 2560, 1792, 1280, 768, 512) for o in (512, 1024, 2048, 3072, 256)]
        forms = [{"scales_wide": False}, {"scales_wide": True}] + [{"sums_groups": True}] * (self.rows <= 16)
        found = [
            {"rows": min(self.rows, 512), "inputs": i, "outputs": o, **form}
            for i, o in pairs
            for form in forms
            if self.inputs % i == 0 and self.outputs % o == 0
        ]
        return tuple(found)


SHAPES = (
    QuantShape(name="4b-up-1", rows=1, inputs=2560, outputs=10240),
    QuantShape(name="4b-up-8", rows=8, inputs=2560, outputs=10240, is_quick=True),
    QuantShape(name="4b-up-2048", rows=2048, inputs=2560, outputs=10240),
    QuantShape(name="27b-up-8", rows=8, inputs=5376, outputs=21504),
    QuantShape(name="27b-up-2048", rows=2048, inputs=5376, outputs=21504),
)


def program(shape: QuantShape, blocks: Blocks) -> Program:
    """The product."""
    x, values, scales = shape.arrays
    ends = -(-shape.rows // blocks["rows"]) * (shape.outputs // blocks["outputs"])
    return Program(
        function=lambda *arrays: group_quant_matmul(*arrays, blocks=QuantMatmulBlocks(**blocks)),
        arguments=(x, values, scales),
        parts=(Part(pattern="group_quant_matmul", runs={"?#[12]$": ends}),),
        flops=2 * shape.rows * values.size,
        min_bytes=values.size / 2 + 2 * scales.size + 2 * shape.rows * (shape.inputs + shape.outputs),
    )
