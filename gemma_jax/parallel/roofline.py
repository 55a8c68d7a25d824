"""The least time a step can take on given hardware: by its operations, its memory, and its exchanges. An estimate.

Nothing here is measured: each part is an amount of work over a peak of `hardware`. Latencies, padding, imbalance and
what a compiler does not overlap come on top. Sources: How to Scale Your Model, jax-ml.github.io/scaling-book, chapters
on rooflines and sharding (times of collectives on rings).
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from jax.sharding import Mesh

from gemma_jax.parallel import hardware
from gemma_jax.parallel.hardware import Chip, Topology
from gemma_jax.parallel.hlo import Collective, Operations

_INT8 = ("s8", "u8", "s4", "u4")


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one device does in one step. None: not known."""

    operations: Operations | None
    hbm_bytes: Mapping[str, int]  # read or written, by what for: "weights", "cache", "activations"
    collectives: tuple[Collective, ...] | None


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """Seconds of one step, each part as if it were alone; estimates. None: not known."""

    compute: float | None
    memory: float
    communication: float | None
    by_axes: Mapping[tuple[str, ...], float]  # communication along axes of the mesh
    unknown: tuple[str, ...]  # what the numbers leave out, in words

    @property
    def seconds(self) -> float:
        """Of those parts that are known the longest: all at the same time."""
        return max(self.compute or 0.0, self.memory, self.communication or 0.0)

    @property
    def seconds_without_overlap(self) -> float:
        """The parts that are known, one after another."""
        return (self.compute or 0.0) + self.memory + (self.communication or 0.0)

    @property
    def bound(self) -> str:
        """The longest part: "compute", "memory" or "communication"."""
        parts = {"compute": self.compute, "memory": self.memory, "communication": self.communication}
        return max(parts, key=lambda part: parts[part] or 0.0)


def roofline(work: Work, topology: Topology, mesh: Mesh) -> Roofline:
    """The least seconds of a step on each device of the mesh."""
    unknown: list[str] = []
    by_axes = None if work.collectives is None else _communication(work.collectives, topology, mesh, unknown)
    if by_axes is None:
        unknown.append("without a compiled program its communication is not known")
    return Roofline(
        compute=_compute(work.operations, topology.chip, unknown),
        memory=sum(work.hbm_bytes.values()) / topology.chip.hbm_bandwidth,
        communication=None if by_axes is None else sum(by_axes.values()),
        by_axes=by_axes or {},
        unknown=tuple(unknown),
    )


def _compute(operations: Operations | None, chip: Chip, unknown: list[str]) -> float | None:
    if operations is None:
        unknown.append("without a compiled program its operations are not known")
        return None
    for name, count in operations.uncounted.items():
        unknown.append(f"operations of {count} x {name}")
    seconds = 0.0
    for kind, count in operations.by_type.items():
        peak = chip.int8_flops if kind in _INT8 else chip.bf16_flops  # float32 at its default precision is one pass
        if peak is None:
            unknown.append(f"the peak of {chip.name} for {kind}; taken as that for bfloat16")
        seconds += count / (peak or chip.bf16_flops)
    return seconds


def _communication(
    collectives: tuple[Collective, ...], topology: Topology, mesh: Mesh, unknown: list[str]
) -> dict[tuple[str, ...], float]:
    by_axes: dict[tuple[str, ...], float] = defaultdict(float)
    for collective in collectives:
        if collective.executions.count is None:
            unknown.append(f"how often the {collective.kind} of {collective.source} runs")
        elif collective.axes is None:
            unknown.append(f"the axes of the {collective.kind} of {collective.source}")
        elif collective.axes:
            each = seconds(collective, topology, hardware.bandwidth(topology, mesh, collective.axes))
            by_axes[collective.axes] += each * collective.executions.count
    return dict(by_axes)


def seconds(collective: Collective, topology: Topology, bandwidth: float) -> float:
    """One execution, where each device receives at `bandwidth` bytes a second from those it exchanges with."""
    size, group = collective.nbytes, collective.group_size
    received = size * (group - 1) / group  # by each device, of an all-gather and a reduce-scatter
    match collective.kind:
        case "all-reduce":
            return 2 * received / bandwidth  # a reduce-scatter and an all-gather
        case "all-to-all" | "ragged-all-to-all" if topology.chip.platform == "tpu":
            return size * group / 4 / bandwidth  # half of all data crosses the middle of a ring
        case "collective-permute" | "collective-broadcast" | "send":
            return size / min(bandwidth, topology.chip.link_bandwidth)  # over one link
        case _:
            return received / bandwidth
