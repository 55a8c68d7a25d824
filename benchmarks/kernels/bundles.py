"""Reads the final schedule of a TPU kernel: VLIW bundles, the branches and loops between them, spills.

A bundle issues in one cycle or more, so straight code takes at least as many cycles as it has bundles; it also takes at
least the cycles its matrix products keep the MXUs busy. The format is libtpu's own and undocumented: see `dump`.
"""

import collections
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from benchmarks.kernels.generations import Generation

_BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+(?:LB|LH|LE|PB|PF|CT)?\s*:\s*[> ]*\{", re.M)
_COMMENT = re.compile(r"/\*.*?\*/", re.S)
_REGION = re.compile(r"Start(?:/End empty)? region (\d+)")
_BRANCH = re.compile(r"sbr\.rel\s*(\(!?%p\w+\))?\s*target = \$region(\d+)")
_PLACE = re.compile(r'sbr\.rel[^;]*?loc\("([^"]+)":(\d+)')
_OPERATION = re.compile(r"\s*(?:%\w+\s*=\s*)?([a-z][\w.]*)")
_KINDS = ("bf16", "f32", "s8", "u8", "s4")

Units = dict[str, int]  # uses of each kind of slot


@dataclass(frozen=True)
class Bundle:
    """One line of a schedule."""

    address: int
    operations: tuple[str, ...]
    regions: tuple[int, ...] = ()  # that begin here
    target: int | None = None  # the region a branch goes to
    place: tuple[str, int] | None = None  # file and line of a branch's condition


@dataclass
class Segment:
    """Straight code: runs from its first bundle to its last."""

    num_bundles: int
    matmuls: dict[str, int]  # by operand type
    matmul_cycles: float  # that these keep the MXUs busy
    units: Units

    @property
    def cycles(self) -> float:
        """At least."""
        return max(self.num_bundles, self.matmul_cycles)


@dataclass(eq=False)
class Block:
    """A kernel, a loop's body or a conditional part of it: straight segments, and blocks inside."""

    kind: Literal["kernel", "loop", "branch"]
    start: int
    end: int  # the first address after it
    place: tuple[str, int] | None = None
    segments: list[Segment] = field(default_factory=list)
    blocks: list["Block"] = field(default_factory=list)

    @property
    def cycles(self) -> float:
        """Of its own segments, run once."""
        return sum(segment.cycles for segment in self.segments)

    @property
    def num_bundles(self) -> int:
        return sum(segment.num_bundles for segment in self.segments)

    @property
    def matmul_cycles(self) -> float:
        return sum(segment.matmul_cycles for segment in self.segments)

    def units(self, name: str) -> int:
        """Uses of one kind of slot by its own segments."""
        return sum(segment.units.get(name, 0) for segment in self.segments)

    def walk(self) -> Iterator["Block"]:
        """Itself and all blocks inside, in program order."""
        yield self
        for block in self.blocks:
            yield from block.walk()


def read_bundles(text: str) -> list[Bundle]:
    """The bundles of a file `*final_bundles.txt`."""
    found = list(_BUNDLE.finditer(text))
    ends = [match.start() for match in found[1:]] + [len(text)]
    return [_bundle(match[1], text[match.end() : end]) for match, end in zip(found, ends, strict=True)]


def _bundle(address: str, body: str) -> Bundle:
    code = _COMMENT.sub(" ", body)
    branch, place = _BRANCH.search(code), _PLACE.search(body)
    operations = (_OPERATION.match(part) for part in code.split(";;"))
    return Bundle(
        int(address, 16),
        tuple(match[1] for match in operations if match),
        tuple(int(region) for region in _REGION.findall(body)),
        int(branch[2]) if branch else None,
        (place[1], int(place[2])) if branch and place else None,
    )


def read_units(text: str) -> list[Units]:
    """How each bundle uses its slots, from a file `*per-bundle-utilization.txt`."""
    lines = text.splitlines()
    names = [name.strip() for name in lines[1].split(",")]
    return [dict(zip(names, map(int, line.split()), strict=True)) for line in lines[4:] if line.strip()]


def block_tree(bundles: Sequence[Bundle], units: Sequence[Units], generation: Generation) -> Block:
    """The bundles as nested blocks. `units` may be empty, else there is one for each bundle."""
    root = Block("kernel", 0, bundles[-1].address + 1)
    for block in sorted(_blocks(bundles, generation), key=lambda block: (block.start, -block.end, block.kind)):
        parent = root
        while inner := next((b for b in parent.blocks if b.start <= block.start < b.end), None):
            parent = inner
        block.end = min(block.end, parent.end)  # where branches cross, the later one is cut
        parent.blocks.append(block)
    by_address = {bundle.address: (bundle, units[i] if units else {}) for i, bundle in enumerate(bundles)}
    for block in root.walk():
        edges = [block.start, *(edge for inner in block.blocks for edge in (inner.start, inner.end)), block.end]
        for start, end in zip(edges[::2], edges[1::2], strict=True):
            rows = [by_address[address] for address in range(start, end) if address in by_address]
            if rows:
                block.segments.append(_segment(rows, generation))
    return root


def _blocks(bundles: Sequence[Bundle], generation: Generation) -> Iterator[Block]:
    """Loops, from backward branches, and parts that forward branches skip; in no order, not nested yet."""
    starts: dict[int, int] = {}
    for bundle in bundles:
        for region in bundle.regions:
            starts.setdefault(region, bundle.address)
    for bundle in bundles:
        target = None if bundle.target is None else starts.get(bundle.target)
        if target is None:
            continue
        after = bundle.address + 1 + generation.delay_slots
        if target <= bundle.address:
            yield Block("loop", target, after, bundle.place)
        elif target > after:
            yield Block("branch", after, target, bundle.place)


def _segment(rows: Sequence[tuple[Bundle, Units]], generation: Generation) -> Segment:
    kinds = (matmul_kind(operation) for bundle, _ in rows for operation in bundle.operations)
    matmuls = collections.Counter(kind for kind in kinds if kind)
    busy = (
        sum(
            generation.matmul_cycles.get(kind, generation.matmul_cycles["bf16"]) * count
            for kind, count in matmuls.items()
        )
        / generation.num_mxus
    )
    units = collections.Counter[str]()
    for _, used in rows:
        units.update(used)
    return Segment(len(rows), dict(matmuls), busy, dict(units))


def matmul_kind(operation: str) -> str | None:
    """The operand type of a matrix product; None for any other operation."""
    if not operation.startswith("vmatmul"):
        return None
    return next((kind for kind in _KINDS if f".{kind}" in operation), "bf16")
