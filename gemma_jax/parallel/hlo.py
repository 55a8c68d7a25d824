"""What a program sends between devices and how many operations its matrix products take, read from its HLO text."""

import math
import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

import jax
import jaxlib.version
import numpy as np

from gemma_jax.parallel import hlo_text
from gemma_jax.parallel.hlo_text import Computation, Executions, Instruction, Program

Kind = Literal[
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "collective-permute",
    "all-to-all",
    "ragged-all-to-all",
    "collective-broadcast",
    "send",
]
KINDS: tuple[str, ...] = get_args(Kind)

# Without this libtpu repeats one collective in several fused computations, and none of the counts is right.
COUNTABLE = {"xla_tpu_enable_async_collective_fusion": "false"}

OPTIONS = {"tpu": COUNTABLE, "gpu": {"xla_gpu_autotune_level": 0}}  # to autotune takes a GPU

_PAIRS = re.compile(r"source_target_pairs=\{([\d,{} ]*)\}(?:, |$)")
_LISTED = re.compile(r"replica_groups=\{((?:\{[\d, ]*\},?)*)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}")
_FREE_CALLS = ("Sharding", "SPMD", "xla.sdy.", "annotate_device_placement", "MoveTo", "AllocateBuffer", "ConcatBitcast")
_FREE_CALLS += ("AssumeGatherIndicesInBound", "GatherScatterIndicesBitpacked")  # marks of libtpu for its gathers


class UnreadableProgram(RuntimeError):
    """XLA cannot print the program: its collectives and operations are unknown."""


@dataclass(frozen=True)
class Collective:
    """One exchange of a program, as often as it runs.

    nbytes: of one execution on one device, over all operands: of an all-gather its results, of others the operands.
    axes: of the mesh, along which data moves; () where each device keeps to itself, None where the text does not tell.
    group_size: devices that exchange with each other; of a permute, those along its axes.
    """

    kind: Kind
    nbytes: int
    executions: Executions
    axes: tuple[str, ...] | None
    group_size: int
    source: str  # the operation in our code

    @property
    def total_bytes(self) -> int | None:
        """Bytes of all executions on one device; None where it is not known how many there are."""
        return None if self.executions.count is None else self.nbytes * self.executions.count


@dataclass(frozen=True)
class Operations:
    """Multiplications and additions of matrix products and convolutions on one device, loops included.

    by_type: by the element type of the left operand; of a Pallas kernel what its own `CostEstimate` says.
    uncounted: instructions of unknown cost, by the target of a custom call, or "loop" for products in loops of unknown
    length; what those take is not in `by_type`. at_most: some are in branches that need not be taken.
    """

    by_type: Mapping[str, int]
    uncounted: Mapping[str, int]
    at_most: bool


def compile_readable(lowered: jax.stages.Lowered, platform: str) -> tuple[jax.stages.Compiled, Program]:
    """Compiles for "tpu", "gpu" or "cpu", and reads the program as the compiler itself wrote it.

    The compiler's text is there also where jaxlib cannot print the program, as 0.10.2 some of v6e, v5p and tpu7x.

    Raises UnreadableProgram where neither gives a text, as with a compiled program from a cache.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True, **OPTIONS.get(platform, {})}
        compiled = lowered.compile(compiler_options=options)
        written = [path.read_text() for path in Path(folder).glob("*after_optimizations.txt")]
    return compiled, hlo_text.parse(max(written, key=len) if written else _printed(compiled))


def _printed(compiled: jax.stages.Compiled) -> str:
    try:
        printed, reason = compiled.as_text(), "this backend has none"
    except jax.errors.JaxRuntimeError as error:
        printed, reason = None, str(error).splitlines()[0][:200]
    if not printed:
        version = jaxlib.version.__version__
        raise UnreadableProgram(
            f"the compiler wrote no text of this program and jaxlib {version} prints none ({reason}): its collectives "
            "and operations are unknown. Turn the compilation cache off, or use jaxlib 0.12"
        )
    return printed


def collectives(program: Program, mesh_axes: Mapping[str, int]) -> tuple[Collective, ...]:
    """Every exchange between devices, each instruction once, in no order that matters.

    Args:
        mesh_axes: sizes by name, in the mesh's order (`dict(mesh.shape)`); XLA numbers devices as the mesh does.

    Raises ValueError for a program of another number of devices, or one compiled for TPU without the options COUNTABLE.
    """
    wanted = math.prod(mesh_axes.values())
    if program.num_devices not in (None, wanted):
        raise ValueError(f"the program is for {program.num_devices} devices, the mesh {dict(mesh_axes)} has {wanted}")
    found = []
    for name, runs in hlo_text.executions(program).items():
        for instruction in program.computations[name].values():
            kind = instruction.opcode.removesuffix("-start")
            if kind not in KINDS:
                continue
            if "async_collective_fusion" in name:
                raise ValueError(
                    f"{instruction.name} is in {name}, which repeats a collective that stands elsewhere too; compile "
                    f"with compiler_options={COUNTABLE} to have each once"
                )
            if "all-reduce-scatter" in name:  # so libtpu writes a reduce-scatter: an all-reduce and a slice, fused
                kind = "reduce-scatter"
            found.append(_collective(kind, instruction, program.computations[name], runs, mesh_axes))
    return tuple(found)


def _collective(
    kind: str, instruction: Instruction, computation: Computation, runs: Executions, mesh_axes: Mapping[str, int]
) -> Collective:
    if kind == "all-gather":
        size = _gathered_bytes(instruction)
    else:
        size = sum(hlo_text.nbytes(computation[name].result) for name in instruction.operands)
    groups = _groups(instruction, mesh_axes)
    axes = None if groups is None else _axes(groups, mesh_axes)
    if kind == "collective-permute" and axes is not None:
        group_size = math.prod(mesh_axes[axis] for axis in axes)
    else:
        group_size = len(groups[0]) if groups is not None and len(groups) else math.prod(mesh_axes.values())
    source = re.search(r'op_name="([^"]*)"', instruction.attributes)
    return Collective(cast(Kind, kind), size, runs, axes, group_size, source[1] if source else instruction.name)


def _gathered_bytes(instruction: Instruction) -> int:
    """Of an all-gather its results, of its asynchronous start the second part: (operands, results)."""
    if instruction.opcode == "all-gather":
        return hlo_text.nbytes(instruction.result)
    return hlo_text.nbytes(hlo_text.split(instruction.result[1:-1])[1])


def _groups(instruction: Instruction, mesh_axes: Mapping[str, int]) -> Sequence[Sequence[int]] | None:
    """Devices that exchange, by their place in the mesh; of a permute (source, target); None where not known."""
    attributes = instruction.attributes
    if pairs := _PAIRS.search(attributes):
        return [tuple(map(int, pair.split(","))) for pair in re.findall(r"\{([\d, ]+)\}", pairs[1])]
    if listed := _LISTED.search(attributes):
        everything = [range(math.prod(mesh_axes.values()))]
        return [tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d, ]+)\}", listed[1])] or everything
    if iota := _IOTA.search(attributes):
        shape, dims, order = ([int(size) for size in part.split(",")] if part else None for part in iota.groups())
        assert shape is not None
        assert dims is not None
        return np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(shape).tolist()
    if named := _NAMED.search(attributes):
        return _named_groups(named[1], named[2])
    return None


def _named_groups(mesh: str, axes: str) -> Sequence[Sequence[int]] | None:
    """Groups of `mesh['a'=2,'b'=4] {'b'}`; 'b':(2)2 is the part of size 2 of b that follows one of size 2."""
    if "device_ids" in mesh:
        return None
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    parts: list[tuple[str, int, int]] = []
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes):
        parts.append((name, int(before or 1), int(size or sizes[name])))
    dims, moved = [], []
    for name, size in sizes.items():
        start = 1
        for _, before, part in sorted(part for part in parts if part[0] == name):
            dims.append(before // start)
            moved.append(len(dims))
            dims.append(part)
            start = before * part
        dims.append(size // start)
    stay = [index for index in range(len(dims)) if index not in moved]
    group = math.prod(dims[index] for index in moved)
    return np.arange(math.prod(dims)).reshape(dims).transpose(stay + moved).reshape(-1, group).tolist()


def _axes(groups: Sequence[Sequence[int]], mesh_axes: Mapping[str, int]) -> tuple[str, ...]:
    """The axes along which devices of one group differ."""
    varies = np.zeros(len(mesh_axes), bool)
    for group in groups:
        places = np.stack(np.unravel_index(np.asarray(group), tuple(mesh_axes.values())))
        varies |= (places != places[:, :1]).any(axis=1)
    return tuple(axis for axis, moves in zip(mesh_axes, varies, strict=True) if moves)


def operations(program: Program) -> Operations:
    """What matrix products and convolutions take; elementwise work is not counted."""
    by_type: Counter[str] = Counter()
    uncounted: Counter[str] = Counter()
    at_most = False
    for name, runs in hlo_text.executions(program).items():
        computation = program.computations[name]
        for instruction in computation.values():
            counted = _operations(instruction, computation)
            if isinstance(counted, str):
                uncounted[counted] += 1
            elif counted is not None and runs.count is None:
                uncounted["loop"] += 1
            elif counted is not None and runs.count is not None:
                at_most |= runs.is_at_most
                by_type[counted[0]] += counted[1] * runs.count
    return Operations(dict(by_type), dict(uncounted), at_most)


def _operations(instruction: Instruction, computation: Computation) -> tuple[str, int] | str | None:
    """Element type and operations; the target of a call that does not tell; None for what has no products."""
    if instruction.opcode == "custom-call":
        target = re.findall(r'custom_call_target="([^"]*)"', instruction.attributes)[0]
        estimate = re.search(r'"cost_estimate":\{"flops":"(\d+)"', instruction.attributes)
        if estimate is None:
            is_free = target.startswith(_FREE_CALLS) or instruction.called("called_computations")  # those are read
            return None if is_free else target
        kinds = [kind for name in instruction.operands for kind, _ in hlo_text.arrays(computation[name].result)]
        return next((kind for kind in kinds if kind.startswith(("bf", "f"))), kinds[0]), int(estimate[1])
    # XLA writes the product of a matrix and one vector as multiply and reduce
    is_vector_product = instruction.opcode == "reduce" and 'dot_general"' in instruction.attributes
    if instruction.opcode not in ("dot", "convolution") and not is_vector_product:
        return None
    kind, shape = hlo_text.arrays(computation[instruction.operands[0]].result)[0]
    if is_vector_product:
        return kind, 2 * math.prod(shape)
    return kind, _dot(instruction, shape) if instruction.opcode == "dot" else _convolution(instruction, computation)


def _dot(instruction: Instruction, left: tuple[int, ...]) -> int:
    contracted = re.findall(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
    over = math.prod(left[int(dim)] for dims in contracted for dim in dims.split(",") if dim)
    return 2 * over * math.prod(hlo_text.arrays(instruction.result)[0][1])


def _convolution(instruction: Instruction, computation: Computation) -> int:
    """Products of input and kernel, not of padding: XLA writes a batched matrix product as a dilated convolution."""
    types = [*(computation[name].result for name in instruction.operands[:2]), instruction.result]
    labels = re.findall(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)[0]
    inputs, kernel, result = (
        dict(zip(label, hlo_text.arrays(type_text)[0][1], strict=True))
        for label, type_text in zip(labels, types, strict=True)
    )
    positions = 1
    for dim, window in enumerate(_windows(instruction, len(result) - 2)):
        positions *= _window_positions(inputs[str(dim)], kernel[str(dim)], result[str(dim)], window)
    return 2 * result["b"] * result["f"] * kernel["i"] * positions


def _windows(instruction: Instruction, num_dims: int) -> list[dict[str, int]]:
    """Stride, padding before, and dilation of input and kernel, for each spatial dimension."""
    found = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    fields = dict(part.split("=") for part in found[1].split()) if found else {}
    windows = []
    for dim in range(num_dims):
        values = {key: fields[key].split("x")[dim] for key in fields}
        keys = {"stride": 1, "pad": 0, "lhs_dilate": 1, "rhs_dilate": 1}
        windows.append({key: int(values.get(key, str(default)).split("_")[0]) for key, default in keys.items()})
    return windows


def _window_positions(inputs: int, kernel: int, result: int, window: Mapping[str, int]) -> int:
    """Pairs of a result and a kernel position whose input is neither padding nor the zeros of dilation."""
    starts = np.arange(result) * window["stride"] - window["pad"]
    count = 0
    for position in range(kernel):
        at = starts + position * window["rhs_dilate"]
        is_input = (at >= 0) & (at < (inputs - 1) * window["lhs_dilate"] + 1) & (at % window["lhs_dilate"] == 0)
        count += int(is_input.sum())
    return count
