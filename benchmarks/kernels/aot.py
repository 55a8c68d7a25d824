"""Compiles a function for one TensorCore of a chip that need not be there."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.kernels.generations import Generation


@dataclass(frozen=True)
class Call:
    """What a Pallas call says of itself."""

    grid: tuple[Any, ...]
    moved_bytes: int | None  # between HBM and the core, by its cost estimate


Calls = dict[str, list[Call]]


@dataclass(frozen=True)
class Compiled:
    """A program, and what compiling it says and costs."""

    program: jax.stages.Compiled
    seconds: float  # lowering and compiling
    temp_bytes: int  # of HBM, beside arguments and results
    calls: Calls  # of Pallas kernels, by the kernel's name, in program order


def compiled(function: Callable[..., Any], arguments: Sequence[Any], generation: Generation) -> Compiled:
    """The function for arguments of which shapes and dtypes count (arrays, or jax.ShapeDtypeStruct, nested)."""
    device = topologies.get_topology_desc(generation.topology, "tpu").devices[0]
    mesh = Mesh(np.array([device]), ("one",))
    where = NamedSharding(mesh, PartitionSpec())
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tuple(arguments))
    with jax.set_mesh(mesh):  # a kernel may ask of what generation the chip is
        traced = jax.jit(function).trace(*shapes)
        start = time.perf_counter()
        program = traced.lower().compile()
        seconds = time.perf_counter() - start
    memory = program.memory_analysis()
    assert memory is not None
    return Compiled(program, seconds, memory.temp_size_in_bytes, calls(traced.jaxpr.jaxpr))


def calls(jaxpr: Any) -> Calls:
    """Those in a jaxpr, and in all jaxprs inside it."""
    found: Calls = {}
    _collect(jaxpr, found)
    return found


def _collect(jaxpr: Any, found: Calls) -> None:
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            cost = equation.params["cost_estimate"]
            call = Call(tuple(equation.params["grid_mapping"].grid), None if cost is None else cost.bytes_accessed)
            found.setdefault(equation.params["name"], []).append(call)
            continue
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                _collect(getattr(inner, "jaxpr", inner), found)
