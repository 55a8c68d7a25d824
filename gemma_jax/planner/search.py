"""Which meshes a model fits, and the smallest topology of a chip: by arithmetic first, the best are compiled."""

import itertools
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from gemma_jax.nn.logical import LogicalAxisError, ReplicationWarning
from gemma_jax.parallel import hardware
from gemma_jax.parallel.hardware import CHIPS, Chip, Topology
from gemma_jax.parallel.rules import SERVE, TRAIN
from gemma_jax.planner import arithmetic
from gemma_jax.planner.plan import Plan, Question, checked, plan

COMPILED = 2  # candidates of a topology that are compiled
ROOM = 0.98  # of what programs can have: at least the rest is temporaries
SEARCHED = {"decode": ("data", "seq", "model"), "prefill": ("data", "seq", "model"), "train": ("fsdp", "seq", "model"),
            "lora": ("fsdp", "seq", "model")}  # fmt: skip


@dataclass(frozen=True)
class Candidate:
    """A mesh that holds a model, by arithmetic."""

    mesh: str
    held: Mapping[str, int]  # bytes of one device, by what

    @property
    def nbytes(self) -> int:
        """All that one device holds."""
        return sum(self.held.values())


def search(question: Question, chip: Chip, most_devices: int) -> list[Plan]:
    """Plans of the smallest topology of a chip that holds a question's model, the fastest by its roofline first.

    Compiled are the meshes that hold least on a device, `COMPILED` of them.
    The question's topology and mesh do not matter. Empty if none of up to `most_devices` holds it.
    Raises as `plan`.
    """
    names = hardware.names(chip)
    for topology in map(hardware.topology, names):
        if topology.num_devices > most_devices:
            break
        found = []
        for candidate in candidates(question, topology)[:COMPILED]:
            made = plan(replace(question, topology=topology.name, mesh=candidate.mesh))
            found += [made] if made.fits else []
        if found:
            return sorted(found, key=lambda plan: sum(p.roofline.seconds_without_overlap for p in plan.programs))
    return []


def candidates(question: Question, topology: Topology) -> list[Candidate]:
    """Meshes of all devices of a topology that hold the model, those that hold least on a device first.

    Left out are those on which devices would do the same work. Raises as `plan` for what no mesh changes.
    """
    found = []
    for sizes in meshes_of(topology.num_devices, SEARCHED[question.purpose]):
        held = held_bytes(question, topology, sizes)
        if held is not None and sum(held.values()) <= ROOM * topology.chip.usable_bytes:
            name = ",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1)
            found.append(Candidate(name or "model=1", held))
    return sorted(found, key=lambda candidate: candidate.nbytes)


def held_bytes(question: Question, topology: Topology, sizes: Mapping[str, int]) -> dict[str, int] | None:
    """What a device of a mesh holds; None if the mesh does not divide the model, or its devices do the same work."""
    config, context = checked(question)
    if question.ple == "host" and math.prod(sizes.values()) > 1:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("error", ReplicationWarning)
        try:
            _check_tokens(question, context, sizes)
            if question.purpose == "train":
                return arithmetic.trained(config, TRAIN, sizes)
            if question.purpose == "lora":
                return arithmetic.adapted(config, TRAIN, sizes, question.dtype, question.rank)
            given = question.batch, context, question.dtype, question.ple
            return arithmetic.served(config, SERVE, sizes, *given)
        except (LogicalAxisError, ReplicationWarning):
            return None


def _check_tokens(question: Question, context: int, sizes: Mapping[str, int]) -> None:
    """Raises LogicalAxisError for rows and tokens that do not divide."""
    rows = math.prod(sizes.get(axis, 1) for axis in ("replica", "data", "fsdp"))
    if question.batch % rows or (question.purpose != "decode" and context % sizes.get("seq", 1)):
        raise LogicalAxisError(f"{question.batch} rows of {context} tokens on {dict(sizes)}")


def meshes_of(num_devices: int, axes: tuple[str, ...]) -> Iterator[dict[str, int]]:
    """All ways to divide devices between axes."""
    divisors = [size for size in range(1, num_devices + 1) if num_devices % size == 0]
    for sizes in itertools.product(divisors, repeat=len(axes)):
        if math.prod(sizes) == num_devices:
            yield dict(zip(axes, sizes, strict=True))


def larger(topology: Topology) -> list[Topology]:
    """Those of the same chip with more devices, smallest first."""
    known = map(hardware.topology, hardware.names(CHIPS[topology.chip.name]))
    return [one for one in known if one.num_devices > topology.num_devices]
