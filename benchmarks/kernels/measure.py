"""Compiles one case and reads its schedule: in a process whose environment `dump.set_environment` has set."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from benchmarks.kernels import aot, dump, estimate
from benchmarks.kernels.case import Blocks, Case, Program
from benchmarks.kernels.generations import GENERATIONS, Generation


def figures(case: Case, generation_name: str, blocks: Blocks, folder: Path) -> dict[str, Any]:
    """Static estimates of one case on one generation, as JSON."""
    generation = GENERATIONS[generation_name]
    program = case.build(blocks)
    dump.clear(folder)
    done = aot.compiled(program.function, program.arguments, generation)
    kernels = list(_kernels(program, done.calls, generation, folder))
    dump.clear(folder)
    return {
        "case": case.name,
        "generation": generation.name,
        "blocks": dict(blocks),
        "compile_seconds": round(done.seconds, 2),
        "temp_bytes": done.temp_bytes,
        "flops": program.flops,
        "min_bytes": program.min_bytes,
        **estimate.call_figures(kernels, program.flops, program.min_bytes, generation),
        "kernels": kernels,
    }


def _kernels(program: Program, calls: aot.Calls, generation: Generation, folder: Path) -> Iterator[Mapping[str, Any]]:
    for part in program.parts:
        for schedule in dump.schedules(folder, part.pattern, generation):
            call = _call(calls, schedule.name)
            steps = _steps(call, schedule.name) if part.steps is None else part.steps
            figures = estimate.kernel_figures(schedule, part, steps, generation)
            yield {**figures, "moved_bytes": None if call is None else call.moved_bytes}


def _call(calls: aot.Calls, name: str) -> aot.Call | None:
    """The call of a kernel in the program. Differentiation puts words around a kernel's name."""
    return next((calls[key][0] for key in sorted(calls, key=len, reverse=True) if key in name), None)


def _steps(call: aot.Call | None, name: str) -> int:
    if call is None or not all(isinstance(size, int) for size in call.grid):
        raise ValueError(f"the call of {name} is {call}, with jax {jax.__version__}; give Part.steps")
    return math.prod(call.grid)
