"""Which kernel serves an operation: by what the program is compiled for, the shapes at hand, and a checked-in table.

The choice is made while tracing. `using` overrides what it is made for; JAX's caches of traces know of it, so one
function may run under several targets.
"""

import contextlib
import functools
import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jax

GENERATIONS = ("v5e", "v5p", "v6e", "tpu7x")  # those that there are tables for, by the names of their topologies
DEVICE_KINDS: Mapping[str, str] = {  # beginnings of JAX's names of devices, the longer ones first
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5p": "v5p",
    "TPU v5": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
    "TPU v7x": "tpu7x",
}
REFERENCE, INTERPRET, GPU, CPU = "reference", "interpret", "gpu", "cpu"
TARGETS = (REFERENCE, INTERPRET, GPU, CPU, *GENERATIONS)

_chosen_target: Any = jax.make_user_context(None)
_recorder: Any = jax.make_user_context(None)


def using(target: str | None) -> AbstractContextManager[None]:
    """A context in which programs are traced for `target` instead of for the device that JAX computes on.

    "reference": no kernel anywhere, plain XLA. "interpret": the TPU kernels, interpreted on any device, for tests.
    "v5e", "v5p", "v6e", "tpu7x", "gpu", "cpu": as on that device, to compile for one that is not there. None: the
    default. Raises ValueError for another name.
    """
    if target is not None and target not in TARGETS:
        raise ValueError(f"the kernels' target is {target!r}; wanted one of {', '.join(TARGETS)}")
    return _chosen_target(target)


def target() -> str:
    """What programs are traced for now: one of `TARGETS`. A TPU older than our tables gets "reference"."""
    chosen = _chosen_target.value
    default = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    return _device_target(default) if chosen is None else chosen


def _device_target(device: Any) -> str:
    kind = device.device_kind if hasattr(device, "device_kind") else _first_device(device).device_kind
    platform = device.platform if hasattr(device, "platform") else _first_device(device).platform
    if platform != "tpu":
        return platform if platform in (GPU, CPU) else GPU if platform in ("cuda", "rocm") else REFERENCE
    return next((name for start, name in DEVICE_KINDS.items() if kind.startswith(start)), REFERENCE)


@functools.cache
def _first_device(platform: str | None) -> Any:
    return jax.local_devices(backend=platform)[0]


@dataclass(frozen=True)
class Choice:
    """What serves an operation. Print it to know."""

    operation: str
    kernel: str | None  # "tpu", "gpu" or "native" (C++ on CPU); None: plain XLA
    reason: str
    blocks: Mapping[str, Any] | None = None  # of the kernel's own fields, from the table
    is_interpreted: bool = False

    def __str__(self) -> str:
        blocks = "" if self.blocks is None else " " + json.dumps(dict(self.blocks), sort_keys=True)
        return f"{self.operation}: {self.kernel or 'XLA'}{blocks} ({self.reason})"

    def __hash__(self) -> int:
        return hash(str(self))


class _Notes:
    """Choices made; as the value of a context each object makes JAX trace anew."""

    def __init__(self):
        self.choices: list[Choice] = []


@contextlib.contextmanager
def recorded() -> Iterator[list[Choice]]:
    """A context that collects the choices made in it, one for each use in a program that is traced there."""
    notes = _Notes()
    with _recorder(notes):
        yield notes.choices


def noted(choice: Choice) -> Choice:
    """The choice, which is told to `recorded`."""
    if _recorder.value is not None:
        _recorder.value.choices.append(choice)
    return choice


@functools.cache
def table(generation: str) -> tuple[Mapping[str, Any], ...]:
    """The entries of a generation: {"kernel": ..., "shape": {...}, "blocks": {...}, ...}, written by a static sweep."""
    text = resources.files("gemma_kernels").joinpath("tables", f"{generation}.json").read_text()
    return tuple(json.loads(text)["entries"])


def nearest(generation: str, kernel: str, shape: Mapping[str, float]) -> Mapping[str, Any] | None:
    """The blocks of the entry whose shape is like `shape`; None if the table has no entry of the kernel.

    Numbers are compared as ratios: one twice as large is as far as one half as large; 0 is far from all others.
    """

    def distance(entry: Mapping[str, Any]) -> float:
        theirs = entry["shape"]
        return sum(_ratio(shape[name], theirs[name]) for name in shape if name in theirs)

    entries = [entry for entry in table(generation) if entry["kernel"] == kernel]
    return min(entries, key=distance)["blocks"] if entries else None


def _ratio(one: float, other: float) -> float:
    if one == other:
        return 0.0
    return 64.0 if min(one, other) <= 0 else max(one, other) / min(one, other) - 1


def is_partitioned() -> bool:
    """Whether the program is for several devices between which XLA divides arrays: a kernel cannot be divided so.

    Inside `jax.shard_map` it is one device's program.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return any(
        size > 1 and kind != jax.sharding.AxisType.Manual
        for size, kind in zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    )
