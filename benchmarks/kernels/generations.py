"""The TPU generations kernels are compiled for, one TensorCore each.

Sources: cloud.google.com/tpu/docs (v5e, v5p, v6e, tpu7x: peak bfloat16 operations and HBM bandwidth per chip; v5p and
tpu7x chips have two cores). The cycles a `vmatmul` keeps its MXU busy follow from these peaks and the clock.
"""

from collections.abc import Mapping
from dataclasses import dataclass

STEP_SECONDS = (
    0.35e-6  # a grid step's least time: 92 ms for 64**3 steps, the 128-blocks of jax's Pallas matmul notebook
)


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What a static estimate needs to know of one TensorCore."""

    name: str
    topology: str  # as libtpu names it
    num_mxus: int
    matmul_flops: int  # bfloat16 operations of all MXUs in one cycle
    matmul_cycles: Mapping[str, int]  # cycles that one `vmatmul` keeps its MXU busy, by operand type
    gigahertz: float
    hbm_gigabytes: float  # a second
    delay_slots: int  # bundles after a branch that run in any case

    def seconds(self, cycles: float) -> float:
        """Cycles as time."""
        return cycles / self.gigahertz * 1e-9

    def floor_seconds(self, num_bytes: float) -> float:
        """The least time to move bytes between HBM and the core."""
        return num_bytes / self.hbm_gigabytes * 1e-9


_SMALL = {"bf16": 16, "f32": 8, "s8": 16, "u8": 16, "s4": 16}
_LARGE = {"bf16": 8, "f32": 4, "s8": 8, "u8": 8, "s4": 8}

GENERATIONS = {
    generation.name: generation
    for generation in (
        Generation(
            name="v5e",
            topology="v5e:2x2",
            num_mxus=4,
            matmul_flops=4 * 2 * 128**2,
            matmul_cycles=_SMALL,
            gigahertz=1.5,
            hbm_gigabytes=819,
            delay_slots=4,
        ),
        Generation(
            name="v5p",
            topology="v5p:2x2x1",
            num_mxus=4,
            matmul_flops=4 * 2 * 128**2,
            matmul_cycles=_SMALL,
            gigahertz=1.75,
            hbm_gigabytes=2765 / 2,
            delay_slots=4,
        ),
        Generation(
            name="v6e",
            topology="v6e:2x2",
            num_mxus=2,
            matmul_flops=2 * 4 * 256**2,
            matmul_cycles=_LARGE,
            gigahertz=1.75,
            hbm_gigabytes=1640,
            delay_slots=4,
        ),
        Generation(
            name="tpu7x",
            topology="tpu7x:2x2x1",
            num_mxus=2,
            matmul_flops=2 * 4 * 256**2,
            matmul_cycles=_LARGE,
            gigahertz=2.2,
            hbm_gigabytes=7380 / 2,
            delay_slots=1,
        ),
    )
}
