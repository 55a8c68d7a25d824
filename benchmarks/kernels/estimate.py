"""From a kernel's schedule to cycles of a whole call: a static estimate, a lower bound.

Method. Each straight segment takes max(bundles, cycles its products keep the MXUs busy). The kernel's outermost loop is
its grid: it runs once for each step. A conditional part runs as often as `Part.runs` says for its label; of those it
does not name, parts without matrix products (copies in and out, first and last steps) are taken to run each time, and
of those with products beside each other only the longest. Inner loops must be named, in `runs` or `trips`. Waits for
copies, and what XLA does around the kernel, are not in the figure: `bound` compares the cycles' time with the time to
move the bytes of the kernel's blocks (as its cost estimate states them; where there is none, inputs and results once)
and with the least time of the grid's steps, and of the kernel's own waits for copies.
"""

import linecache
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.kernels.bundles import Block
from benchmarks.kernels.dump import Schedule
from benchmarks.kernels.generations import STEP_SECONDS, Generation


@dataclass(frozen=True, kw_only=True)
class Part:
    """One kernel of a program."""

    pattern: str  # of the kernel's whole name
    steps: int | None = None  # of the grid; None takes them from the program
    waits: int = 0  # for copies that the kernel itself starts, each as long as a step at least
    runs: Mapping[str, float] = field(default_factory=dict)  # pattern of `labels` -> runs in the call
    trips: Mapping[str, float] = field(default_factory=dict)  # the same for loops, for each run of what holds them
    main_flops: float | None = None  # that a step with the main block must do, where there is one kind of such steps


@dataclass(frozen=True)
class Visit:
    """A block, and how often it runs in the call."""

    block: Block
    label: str
    runs: float
    depth: int
    is_assumed: bool  # nobody said how often

    @property
    def cycles(self) -> float:
        return self.block.cycles * self.runs


def labels(tree: Block) -> dict[int, str]:
    """How blocks are called, by their id.

    Loops are "loop 0" (the grid), "loop 1"... and their source line; a branch is the source line of its condition and
    "#1", "#2"... Both count in program order, and end in "products" if they hold such themselves. Do not trust the
    source line alone: of a differentiated function the compiler knows only the line of its call, and of two opposite
    conditions it may keep one.
    """
    found: dict[int, str] = {}
    num_loops = num_branches = 0
    for block in tree.walk():
        text = linecache.getline(*block.place).strip() if block.place else ""
        end = " products" if block.matmul_cycles else ""
        if block.kind == "loop":
            found[id(block)] = f"loop {num_loops} {text}".strip() + end
            num_loops += 1
        elif text:
            num_branches += 1
            found[id(block)] = f"{text} #{num_branches}{end}"
        else:
            found[id(block)] = block.kind
    return found


def visits(tree: Block, steps: int, part: Part) -> list[Visit]:
    """How often each block runs in a call.

    Of the names that match a label the first counts. Raises ValueError for an inner loop that `part` does not name, and
    for a name that names nothing, unless it begins with "?".
    """
    called = labels(tree)
    runs, trips = (
        {key: next((n for n in names if re.search(n.removeprefix("?"), text)), None) for key, text in called.items()}
        for names in (part.runs, part.trips)
    )
    found: list[Visit] = []
    unknown = {*part.runs, *part.trips} - {*runs.values(), *trips.values()}
    unknown = {name for name in unknown if not name.startswith("?")}

    def visit(block: Block, count: float, depth: int, is_assumed: bool) -> None:
        found.append(Visit(block, called[id(block)], count, depth, is_assumed))
        rivals = [inner for inner in block.blocks if inner.kind == "branch" and has_products(inner)]
        rivals = [inner for inner in rivals if runs[id(inner)] is None]
        for inner in block.blocks:
            name, trip = runs[id(inner)], trips[id(inner)]
            if name is not None:
                visit(inner, part.runs[name], depth + 1, False)
            elif inner.kind == "loop":
                is_grid = called[id(inner)].split()[1] == "0" and steps > 1
                if trip is None and not is_grid:
                    unknown.add(called[id(inner)])
                inside = count * part.trips[trip] if trip is not None and not is_grid else steps
                visit(inner, inside, depth + 1, False)
            else:
                is_run = inner not in rivals or inner is max(rivals, key=_whole_cycles)
                visit(inner, count if is_run else 0.0, depth + 1, inner in rivals and len(rivals) > 1)

    visit(tree, 1.0, 0, False)
    if unknown:
        raise ValueError(f"`runs` and `trips` want names of what there is; see {sorted(unknown)} in: {show(found)}")
    return found


def has_products(block: Block) -> bool:
    """Whether matrix products are in it or in a block inside."""
    return any(inner.matmul_cycles for inner in block.walk())


def _whole_cycles(block: Block) -> float:
    return sum(inner.cycles for inner in block.walk())


def show(found: Sequence[Visit]) -> str:
    """The blocks as an indented list, for people."""
    rows = [""]
    for visit in found:
        block = visit.block
        rows.append(
            f"{'  ' * visit.depth}{visit.label}: {visit.runs:g} runs{' (assumed)' if visit.is_assumed else ''}, "
            f"{block.num_bundles} bundles, MXU {block.matmul_cycles:g}, {block.units('VSTORE:SPILL')} spills"
        )
    return "\n".join(rows)


def kernel_figures(schedule: Schedule, part: Part, steps: int, generation: Generation) -> dict[str, Any]:
    """What the schedule says of one kernel's call, as JSON.

    The main block is that one, of those with products, in which most cycles are spent.
    """
    found = visits(schedule.tree, steps, part)
    main = max(found, key=lambda visit: (bool(visit.block.matmul_cycles), visit.cycles))
    overhead = [visit for visit in found if not visit.block.matmul_cycles]
    steady = main.block.cycles + sum(visit.block.cycles for visit in overhead[1:] if visit.runs >= main.runs)
    return {
        "name": re.sub(r"\.\d+$", "", schedule.name),
        "steps": steps,
        "waits": part.waits,
        "cycles": round(sum(visit.cycles for visit in found)),
        "vmem_bytes": schedule.vmem_bytes,
        "critical_cycles": schedule.critical_cycles,
        "num_bundles": schedule.num_bundles,
        "main": {
            "label": main.label,
            "runs": main.runs,
            "bundles": main.block.num_bundles,
            "matmul_cycles": main.block.matmul_cycles,
            "stores": main.block.units("VSTORE"),
            "spill_stores": main.block.units("VSTORE:SPILL"),
            "spill_loads": main.block.units("VLOAD:FILL"),
        },
        "others": [
            {"label": visit.label, "runs": visit.runs, "bundles": visit.block.num_bundles}
            for visit in found
            if visit.block.matmul_cycles and visit is not main
        ],
        "overhead_cycles": round(sum(visit.cycles for visit in overhead)),
        "steady_mfu": part.main_flops / (steady * generation.matmul_flops) if part.main_flops else None,
        "assumed": [visit.label for visit in found if visit.is_assumed],
        "tree": show(found),
    }


def call_figures(
    kernels: Sequence[Mapping[str, Any]], flops: float, min_bytes: float, generation: Generation
) -> dict[str, Any]:
    """The figures of a whole call from those of its kernels; static estimates all."""
    cycles = sum(kernel["cycles"] for kernel in kernels)
    stated = [kernel["moved_bytes"] for kernel in kernels]
    moved = sum(stated) if all(stated) else min_bytes
    times = {
        "compute": generation.seconds(cycles),
        "memory": generation.floor_seconds(moved),
        "steps": STEP_SECONDS * sum(kernel["steps"] + kernel["waits"] for kernel in kernels),
    }
    return {
        "cycles": cycles,
        "static_mfu": flops / (cycles * generation.matmul_flops),
        "moved_bytes": moved,
        "milliseconds": {name: seconds * 1e3 for name, seconds in times.items()},
        "floor_milliseconds": generation.floor_seconds(min_bytes) * 1e3,
        "bound": max(times, key=lambda name: times[name]),
    }
