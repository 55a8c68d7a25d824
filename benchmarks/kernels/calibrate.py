"""The estimate beside published times: how far the method can be trusted, and in which direction.

The times are printed in jax's guide "Matrix Multiplication" (docs/pallas/tpu/matmul.ipynb, read at commits 1082251 and
d0d0815 of jax-ml/jax), for bfloat16 products on a v5e. We did not measure them. They contain the dispatch from Python,
as the guide says. Two of the six are used up: one gives STEP_SECONDS, one the dispatch; the other four are the test.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from benchmarks import tables
from benchmarks.kernels import run
from benchmarks.kernels.case import Blocks, Case, Program
from benchmarks.kernels.estimate import Part

KERNEL = "calibration"


@dataclass(frozen=True)
class Published:
    """A time of the notebook."""

    size: int
    blocks: Blocks
    milliseconds: float


SMALL: Blocks = {"rows": 128, "inner": 128, "columns": 128}
LARGE: Blocks = {"rows": 512, "inner": 1024, "columns": 1024}
TIMES = (
    Published(1024, SMALL, 0.29767),
    Published(4096, SMALL, 11.7715),
    Published(8192, SMALL, 91.8358),  # gives the step: it is nothing but 64**3 of them
    Published(1024, LARGE, 0.12709),  # gives the dispatch: its cycles take a tenth of it
    Published(4096, LARGE, 0.88909),
    Published(8192, LARGE, 6.09943),
)
GIVES_STEP, GIVES_DISPATCH = 2, 3


def _kernel(x_ref, y_ref, out_ref, sums_ref):
    @pl.when(pl.program_id(2) == 0)
    def _():
        sums_ref[...] = jnp.zeros_like(sums_ref)

    sums_ref[...] += jnp.dot(x_ref[...], y_ref[...], preferred_element_type=jnp.float32)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        out_ref[...] = sums_ref[...].astype(out_ref.dtype)


def program(size: int, blocks: Blocks) -> Program:
    """The notebook's product of two square matrices."""
    rows, inner, columns = blocks["rows"], blocks["inner"], blocks["columns"]
    square = jax.ShapeDtypeStruct((size, size), jnp.bfloat16)
    grid = (size // rows, size // columns, size // inner)
    call = pl.pallas_call(
        _kernel,
        name="calibration_matmul",
        grid=grid,
        in_specs=[
            pl.BlockSpec((rows, inner), lambda i, j, k: (i, k)),
            pl.BlockSpec((inner, columns), lambda i, j, k: (k, j)),
        ],
        out_specs=pl.BlockSpec((rows, columns), lambda i, j, k: (i, j)),
        out_shape=square,
        scratch_shapes=[pltpu.VMEM((rows, columns), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
    )
    ends = math.prod(grid[:2])
    return Program(
        function=call,
        arguments=(square, square),
        parts=(Part(pattern="calibration_matmul", runs={"?#[12]$": ends}),),
        flops=2 * size**3,
        min_bytes=3 * 2 * size**2,
    )


def cases() -> list[Case]:
    """One for each published time."""
    return [
        Case(kernel=KERNEL, shape=f"{i}", build=functools.partial(program, each.size), choices=(each.blocks,))
        for i, each in enumerate(TIMES)
    ]


def text() -> str:
    """The table: what was published, what we estimate, and the gap, as it is and less the dispatch."""
    times = []
    with run.Compiler() as compiler:
        for case, each in zip(cases(), TIMES, strict=True):
            record = compiler.figures(case, "v5e", each.blocks)
            if "error" in record:
                raise RuntimeError(f"{case.name}: {record['error']}")
            times.append(record["milliseconds"])
    return table(times)


def table(times: Sequence[Mapping[str, float]]) -> str:
    """The text, from the least times of each of TIMES."""
    longest = [max(each.values()) for each in times]
    dispatch = TIMES[GIVES_DISPATCH].milliseconds - longest[GIVES_DISPATCH]
    rows = []
    for i, (each, least, most) in enumerate(zip(TIMES, times, longest, strict=True)):
        used = {GIVES_STEP: "gives the step", GIVES_DISPATCH: "gives the dispatch"}.get(i)
        cells = [tables.number(value) for value in (each.milliseconds, least["compute"], least["steps"], most)]
        gap, net = most / each.milliseconds - 1, most / (each.milliseconds - dispatch) - 1
        cells += [used, "–"] if used else [f"{gap:+.0%}", f"{net:+.0%}"]
        rows.append([f"{each.size}^3, blocks {' x '.join(map(str, each.blocks.values()))}", *cells])
    header = ["product on v5e", "published ms", "cycles, ms", "steps, ms", "longest, ms"]
    header += ["longest against published", "less dispatch"]
    note = "Published: jax's guide to matrix products in Pallas, by `timeit`, so with Python's dispatch; all else is a "
    note += f"static estimate. The dispatch, {dispatch:.3f} ms, and the step of 0.35 µs are taken from one row each."
    return f"{tables.table(header, rows)}\n\n{note}"
