"""A model's programs compiled for chips that need not be there: do they fit, what do they send, how long at least.

    found = plan(Question(model="gemma-3-27b", topology="v5e:4x4", mesh="model=16", context=131_072, batch=8))
    print(report.table(found))

Bytes of weights and caches are exact, those of temporaries are the compiler's; times are estimates: see `roofline`.
"""

import math
import re
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.sharding import Mesh

from gemma_jax import configs
from gemma_jax.configs.config import DecoderConfig
from gemma_jax.parallel import hardware, hlo, roofline
from gemma_jax.parallel import mesh as meshes
from gemma_jax.parallel.hardware import GiB, Topology
from gemma_jax.parallel.hlo import Collective, Operations
from gemma_jax.parallel.mesh import MeshError
from gemma_jax.parallel.partition import Partition
from gemma_jax.parallel.roofline import Roofline, Work
from gemma_jax.parallel.rules import SERVE, TRAIN
from gemma_jax.planner import programs
from gemma_jax.planner.programs import Program, Setting

DTYPES = ("bfloat16", "float32", "int8")
_LIMIT = re.compile(r"Used ([\d.]+)([KMG]) of ([\d.]+)([KMG]) hbm")
_TEMPORARIES = re.compile(r"required for HLO temporaries \(([\d.]+)([KMG])\) exceeds available HBM")
_UNITS = {"K": 2**10, "M": 2**20, "G": GiB}


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is to be planned. `config`: of a model that has no name here, or one that was changed."""

    model: str
    topology: str
    mesh: str | None = None  # None: all devices along `model`, to train along `fsdp`
    purpose: str = "decode"  # one of programs.PURPOSES
    context: int | None = None  # tokens of a row; None: what the model was trained for
    batch: int = 1  # rows in all
    dtype: str = "bfloat16"
    ple: str = "device"
    chunk: int | None = None  # tokens of a row taken at once in prefill; None: the engine's
    rank: int = 16  # of an adapter
    is_text_only: bool = False
    is_compiled: bool = True  # False: arithmetic alone
    config: DecoderConfig | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Exchange:
    """Collectives of one kind along the same axes: of one device, in one run of the program."""

    kind: str
    axes: tuple[str, ...] | None  # None: not known
    count: int | None
    nbytes: int | None


@dataclass(frozen=True, kw_only=True)
class ProgramPlan:
    """What one program takes of each device. None: not known, because it was not compiled or did not fit."""

    name: str
    held: Mapping[str, int]  # bytes of weights, cache, optimizer and inputs: by arithmetic
    arguments: int | None  # the same, by the compiler
    temporaries: int | None
    peak: int | None
    operations: Operations | None
    attention_flops: int  # of one device, by arithmetic: the compiler does not count those of kernels
    exchanges: tuple[Exchange, ...] | None
    roofline: Roofline
    tokens: int
    compile_seconds: float | None
    problem: str | None = None  # why it is not compiled

    @property
    def needed(self) -> int:
        """Bytes of one device at least."""
        return sum(self.held.values()) if self.peak is None else self.peak


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The answer."""

    question: Question
    topology: Topology
    mesh: Mapping[str, int]  # axes of more than one device
    context: int
    programs: tuple[ProgramPlan, ...]
    host_bytes: int  # of one device's host memory
    notes: tuple[str, ...]

    @property
    def usable(self) -> int:
        """Bytes of one device that programs can have."""
        return self.topology.chip.usable_bytes

    @property
    def fits(self) -> bool:
        """Whether every program fits; one that was not compiled by what it holds alone."""
        return all(program.needed <= self.usable and program.problem is None for program in self.programs)

    @property
    def largest(self) -> ProgramPlan:
        """The program that needs most."""
        return max(self.programs, key=lambda program: program.needed)


def plan(question: Question) -> Plan:
    """Compiles and reads the programs of a question.

    Raises: ConfigError for an unknown model; ValueError for a topology, mesh, or other value that cannot be
        (MeshError, LogicalAxisError among them); RuntimeError where the compiler is not installed.
    """
    given, topology = settled(question)
    mesh = given.partition.mesh
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        asked = programs.PURPOSES[question.purpose](given)
        found = []
        for program in asked:
            found.append(_planned(program, given, topology, question.is_compiled))
            if found[-1].problem is not None:
                break  # nothing is learnt from the others
    notes = dict.fromkeys(str(one.message) for one in caught if issubclass(one.category, UserWarning))
    return Plan(
        question=question,
        topology=topology,
        mesh={axis: size for axis, size in mesh.shape.items() if size > 1},
        context=given.context,
        programs=tuple(found),
        host_bytes=programs.host_bytes(asked[0].held["weights"]),
        notes=tuple(notes),
    )


def settled(question: Question) -> tuple[Setting, Topology]:
    """The model, mesh and sizes that a question means. Raises as `plan`."""
    topology = hardware.topology(question.topology)
    config, context = checked(question)
    axis = "fsdp" if question.purpose in programs.TRAINING else "model"
    wanted = f"{axis}={topology.num_devices}" if question.mesh is None else question.mesh
    sizes = meshes.parse(wanted)
    if math.prod(sizes.values()) != topology.num_devices:
        raise MeshError(f"the mesh {wanted} has {math.prod(sizes.values())} devices and {topology.name} has "
                        f"{topology.num_devices}; make the sizes multiply to that")  # fmt: skip
    if question.ple == "host" and topology.num_devices > 1:
        raise ValueError(f"ple is 'host', which is for one device; {topology.name} has {topology.num_devices}")
    mesh = meshes.make(sizes, hardware.devices(topology))
    rules = TRAIN if question.purpose in programs.TRAINING else SERVE
    target = topology.chip.name if topology.chip.platform == "tpu" else topology.chip.platform
    return Setting(
        config=config, partition=Partition(mesh, rules), target=target, batch=question.batch, context=context,
        dtype=question.dtype, ple=question.ple, chunk=question.chunk, rank=question.rank,
    ), topology  # fmt: skip


def checked(question: Question) -> tuple[DecoderConfig, int]:
    """The model, and the tokens of a row. Raises ConfigError and ValueError as `plan`."""
    config = configs.get(question.model) if question.config is None else question.config
    config = config.decoder if question.is_text_only else config
    context = config.context if question.context is None else question.context
    if question.purpose not in programs.PURPOSES:
        raise ValueError(f"there is no plan for {question.purpose!r}; wanted {', '.join(programs.PURPOSES)}")
    if question.dtype not in DTYPES:
        raise ValueError(f"dtype is {question.dtype!r}; wanted {' or '.join(DTYPES)}")
    if question.dtype == "int8" and question.purpose in programs.TRAINING:
        raise ValueError("dtype is 'int8', which is for serving; wanted 'bfloat16' or 'float32' to train in")
    if not 1 <= context <= config.context or min(question.batch, question.chunk or 1, question.rank) < 1:
        raise ValueError(
            f"context {context}, batch {question.batch}, chunk {question.chunk}, rank {question.rank}: wanted at most "
            f"the {config.context} tokens that {config.name} reads, and at least one of each"
        )
    if question.ple not in ("device", "host") or (question.ple == "host" and config.per_layer_embedding is None):
        raise ValueError(f"ple is {question.ple!r}; wanted 'device', or 'host' of a model with per-layer embeddings")
    if question.ple == "host" and question.purpose in programs.TRAINING:
        raise ValueError("ple is 'host', with which no training runs here; wanted 'device'")
    if not config.attention.is_causal:
        raise ValueError(f"{config.name} makes embeddings; plans are of models that continue text")
    return config, context


def _planned(program: Program, given: Setting, topology: Topology, is_compiled: bool) -> ProgramPlan:
    mesh, usable = given.partition.mesh, topology.chip.usable_bytes
    held = {name: programs.device_bytes(tree) for name, tree in program.held.items()}
    attention = 4 * program.pairs * given.config.attention.head_dim // mesh.size
    known: dict[str, Any] = {"name": program.name, "held": held, "attention_flops": attention, "tokens": program.tokens}
    unknown = dict.fromkeys(("arguments", "temporaries", "peak", "operations", "exchanges", "compile_seconds"))
    alone = _roofline(program, None, None, topology, mesh, attention)
    if not is_compiled:
        return ProgramPlan(**known, **unknown, roofline=alone)
    if sum(held.values()) > usable:
        return ProgramPlan(**known, **unknown, roofline=alone, problem="what lies in memory is more than there is")
    start = time.perf_counter()
    try:
        compiled, text = hlo.compile_readable(program.lower(), topology.chip.platform)
    except jax.errors.JaxRuntimeError as error:
        peak = needed(str(error), sum(held.values()))
        if peak is None:
            raise
        return ProgramPlan(
            **known, **{**unknown, "peak": peak, "temporaries": peak - sum(held.values())}, roofline=alone,
            problem=f"the compiler needs {peak / GiB:.2f} GiB of a device",
        )  # fmt: skip
    seconds = time.perf_counter() - start
    sizes: Any = compiled.memory_analysis()
    peak = sizes.peak_memory_in_bytes - sizes.host_argument_size_in_bytes  # libtpu counts the host's in
    collectives = hlo.collectives(text, dict(mesh.shape))
    operations = hlo.operations(text)
    return ProgramPlan(
        **known, arguments=sizes.argument_size_in_bytes, temporaries=sizes.temp_size_in_bytes,
        peak=peak, operations=operations, exchanges=_summed(collectives),
        roofline=_roofline(program, operations, collectives, topology, mesh, attention), compile_seconds=seconds,
    )  # fmt: skip


def needed(message: str, held: int) -> int | None:
    """Bytes of a device that a program would need, from the compiler's words when it does not fit; None: other words.

    `held` is what lies there before it runs.
    """
    if found := _TEMPORARIES.search(message):
        return held + int(float(found[1]) * _UNITS[found[2]])
    found = _LIMIT.search(message)
    return None if found is None else int(float(found[1]) * _UNITS[found[2]])


def _roofline(
    program: Program,
    operations: Operations | None,
    collectives: tuple[Collective, ...] | None,
    topology: Topology,
    mesh: Mesh,
    attention_flops: int,
) -> Roofline:
    """With the operations of attention by arithmetic, where it is by kernels or loops that the compiler counts not."""
    if operations is not None and operations.uncounted:
        by_type = Counter(operations.by_type) + Counter({"bf16": attention_flops})
        operations = Operations(dict(by_type), {}, operations.at_most)
    work = Work(operations=operations, hbm_bytes=program.traffic, collectives=collectives)
    return roofline.roofline(work, topology, mesh)


def _summed(collectives: Iterable[Collective]) -> tuple[Exchange, ...]:
    """The largest first; those along no axis, which stay on their device, left out."""
    groups: dict[tuple[str, tuple[str, ...] | None], list[Collective]] = defaultdict(list)
    for one in collectives:
        if one.axes != ():
            groups[one.kind, one.axes].append(one)
    found = []
    for (kind, axes), members in groups.items():
        counts = [one.executions.count for one in members]
        sizes = [one.total_bytes for one in members]
        is_known = None not in counts
        found.append(Exchange(kind, axes, sum(filter(None, counts)) if is_known else None,
                              sum(filter(None, sizes)) if is_known else None))  # fmt: skip
    return tuple(sorted(found, key=lambda one: -(one.nbytes or 0)))
