"""Plans as tables for people, as JSON for machines, and as pictures."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gemma_jax.parallel.hardware import GiB
from gemma_jax.planner.plan import Exchange, Plan, ProgramPlan

ESTIMATE = "estimate: work over the peaks of the hardware, nothing was run"


def table(plan: Plan, changes: Sequence[str] = ()) -> str:
    """The whole plan in lines; `changes` is what would make it fit."""
    question, chip = plan.question, plan.topology.chip
    mesh = ",".join(f"{axis}={size}" for axis, size in plan.mesh.items()) or "one device"
    sizes = f"{plan.context:,} tokens x {question.batch} rows, {question.dtype}"
    lines = [
        f"{question.model} on {plan.topology.name} ({mesh}): {question.purpose}, {sizes}",
        f"{chip.name}: {chip.usable_bytes / GiB:.2f} GiB a device for programs",
    ]
    for program in plan.programs:
        lines += ["", f"{program.name}", *(f"  {line}" for line in _program_lines(program, plan.usable))]
    lines += [""] + [f"note: {note}" for note in plan.notes]
    if plan.host_bytes:
        lines.append(f"in the host's memory: {plan.host_bytes / GiB:.3f} GiB")
    needed = f"{plan.largest.needed / GiB:.2f} of {plan.usable / GiB:.2f} GiB"
    is_exact = all(program.peak is not None for program in plan.programs)
    verb = "fits" if is_exact else "may fit, without temporaries"
    lines.append(f"{verb}: {needed}" if plan.fits else f"does not fit: {needed}")
    return "\n".join([*lines, *(f"  {change}" for change in changes)])


def _program_lines(program: ProgramPlan, usable: int) -> list[str]:
    lines = [f"{name:<14} {_gib(size)}" for name, size in program.held.items() if size >= GiB / 1000]
    if program.temporaries is not None:
        lines.append(f"{'temporaries':<14} {_gib(program.temporaries)}")
    if program.peak is not None:
        lines.append(f"{'peak':<14} {_gib(program.peak)}  {100 * program.peak / usable:.0f} %")
    if program.problem is not None:
        lines.append(program.problem)
    if program.operations is not None:
        counted = sum(program.operations.by_type.values())
        attention = f", and {program.attention_flops:.3g} of attention by arithmetic"
        lines.append(f"operations     {counted:.3g}{attention if program.operations.uncounted else ''}")
    lines += [_exchange_line(exchange) for exchange in program.exchanges or ()]
    return lines + _time_lines(program)


def _exchange_line(exchange: Exchange) -> str:
    axes = "axes not known" if exchange.axes is None else "along " + ", ".join(exchange.axes)
    count = "often" if exchange.count is None else f"{exchange.count:,} x"
    size = "bytes not known" if exchange.nbytes is None else f"{exchange.nbytes / 1e6:,.3f} MB"
    return f"{exchange.kind:<18} {count:>8} {size:>16} {axes}"


def _time_lines(program: ProgramPlan) -> list[str]:
    found = program.roofline
    if program.operations is None:
        return ["operations, collectives and times: not known, for it is not compiled"]
    parts = {"compute": found.compute, "memory": found.memory, "communication": found.communication}
    text = ", ".join(f"{name} {_ms(seconds)}" for name, seconds in parts.items())
    rate = program.tokens / found.seconds if found.seconds else 0.0
    lines = [f"at least {_ms(found.seconds)}, bound by {found.bound}: {text} ({ESTIMATE})",
             f"at most {rate:,.0f} tokens/s (estimate)"]  # fmt: skip
    lines += [f"not counted: {what}" for what in dict.fromkeys(found.unknown)]
    if program.compile_seconds is not None:
        lines.append(f"compiled in {program.compile_seconds:.0f} s")
    return lines


def _gib(size: int) -> str:
    return f"{size / GiB:8.3f} GiB"


def _ms(seconds: float | None) -> str:
    return "unknown" if seconds is None else f"{1000 * seconds:.3g} ms"


def as_data(plan: Plan, changes: Sequence[str] = ()) -> dict[str, Any]:
    """For JSON: bytes, seconds and counts as numbers; what is not known is null."""
    question = {key: value for key, value in dataclasses.asdict(plan.question).items() if key != "config"}
    return {
        "question": question,
        "topology": plan.topology.name,
        "devices": plan.topology.num_devices,
        "mesh": dict(plan.mesh),
        "context": plan.context,
        "usable_bytes": plan.usable,
        "host_bytes": plan.host_bytes,
        "fits": plan.fits,
        "changes": list(changes),
        "notes": list(plan.notes),
        "programs": [_program_data(program) for program in plan.programs],
    }


def _program_data(program: ProgramPlan) -> dict[str, Any]:
    data = dataclasses.asdict(dataclasses.replace(program, roofline=None))  # pyright: ignore[reportArgumentType]
    found = program.roofline
    by_axes = {",".join(axes): seconds for axes, seconds in found.by_axes.items()}
    data["roofline"] = {
        "is_estimate": True,
        "seconds": found.seconds,
        "bound": found.bound,
        "compute_seconds": found.compute,
        "memory_seconds": found.memory,
        "communication_seconds": found.communication,
        "communication_seconds_by_axes": by_axes,
        "unknown": list(dict.fromkeys(found.unknown)),
    }
    return {**data, "needed_bytes": program.needed}


def plot(plans: Sequence[Plan], path: Path) -> None:
    """Bars of what lies in a device's memory, beside what there is. Raises RuntimeError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError("a plot needs matplotlib: pip install matplotlib") from error
    rows = [(plan, program) for plan in plans for program in plan.programs]
    figure = Figure(figsize=(9, 1.2 + 0.5 * len(rows)), layout="constrained")
    axes = figure.subplots()
    labels = [f"{plan.question.model}, {plan.topology.name}\n{program.name}" for plan, program in rows]
    starts = [0.0] * len(rows)
    for part in ("weights", "adapter", "optimizer", "cache", "inputs", "temporaries"):
        sizes = [(program.temporaries or 0 if part == "temporaries" else program.held.get(part, 0)) / GiB
                 for _, program in rows]  # fmt: skip
        if any(sizes):
            axes.barh(labels, sizes, left=starts, label=part)
        starts = [start + size for start, size in zip(starts, sizes, strict=True)]
    for place, (plan, _) in enumerate(rows):
        axes.plot([plan.usable / GiB] * 2, [place - 0.45, place + 0.45], color="black")
    axes.invert_yaxis()
    axes.set_xlabel("GiB of a device; the black line is what programs can have")
    axes.legend()
    figure.savefig(path)
