"""Names and places: which tensor of a file a weight of ours lies in, and how. What tables are made of, and their use.

Our names and shapes are those of the specification of weight names: kernels stand (in, out) with heads split out, norm
scales as the family stores them. The tables of the families are in `families`.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gemma_checkpoints.encodings import Encoding
from gemma_checkpoints.reader import CheckpointError, Reader

Region = tuple[slice, ...]  # of an array, one slice a dimension, each with a start and a stop


@dataclass(frozen=True)
class Entry:
    """One weight: `path` and `shape` are ours, `source` is the file's tensor that it lies in (without prefixes)."""

    path: str
    shape: tuple[int, ...]
    source: str
    axes: str = ""  # our dimensions and the file's, as "D N H -> (N H) D"; empty: they are the same
    index: tuple[int, ...] = ()  # which one, if the tensor stacks several weights along its first dimensions
    stack: tuple[int, ...] = ()  # how many it stacks along each of them
    offset: float = 0.0  # added to the stored values: GGUF stores 1 + scale
    has_spare_rows: bool = False  # the file may have more rows than we: padding of the vocabulary
    num_spare_rows: int = 0  # that are written: copies of the first
    is_optional: bool = False  # the file may lack it; then it is zero

    @property
    def source_shape(self) -> tuple[int, ...]:
        """The shape of the file's tensor, all that it stacks included."""
        sizes = (math.prod(self.shape[axis] for axis in group) for group in self._groups)
        return (*self.stack, *sizes)

    @property
    def written_shape(self) -> tuple[int, ...]:
        """As `source_shape`, with the spare rows."""
        rows, *rest = self.source_shape
        return (rows + self.num_spare_rows, *rest)

    def source_view(self, ours: np.ndarray) -> np.ndarray:
        """An array of ours (or a region of it) seen as the file stores it; writing to the view writes to the array."""
        if not self.axes:
            return ours
        order = [axis for group in self._groups for axis in group]
        moved = ours.transpose(order)
        merged = [math.prod(ours.shape[axis] for axis in group) for group in self._groups]
        view = moved.reshape(merged)
        assert not view.size or np.shares_memory(view, ours), f"{self.axes} of an array with strides {ours.strides}"
        return view

    def source_region(self, region: Region) -> tuple[Region, tuple[int, ...]]:
        """What has to be read for a region of ours: the smallest region around it that is one in the file, too, and
        where that begins in the file's tensor.
        """
        around, start = list(region), list(self.index)
        for group in self._groups:
            first = 0
            for position, axis in enumerate(group):
                rest = math.prod(self.shape[after] for after in group[position + 1 :])
                first += around[axis].start * rest
                if around[axis].stop - around[axis].start > 1:  # what follows must be whole
                    for after in group[position + 1 :]:
                        around[after] = slice(0, self.shape[after])
                    break
            start.append(first)
        return tuple(around), tuple(start)

    def has_rows(self, num_inputs: int) -> bool:
        """Whether each row of the file's tensor (its last dimension) holds what one output of a kernel needs: the first
        `num_inputs` of our dimensions. With 0, whether it is a row of a table: all of our dimensions but the first.
        """
        count, order = len(self.shape), [axis for group in self._groups for axis in group]
        wanted = [*range(num_inputs, count), *range(num_inputs)]
        last = tuple(range(num_inputs)) if num_inputs else tuple(range(1, count))
        return order == wanted and self._groups[-1] == last and not self.offset

    def stored(self, ours: np.ndarray) -> np.ndarray:
        """What the file holds for an array of ours (of a stack: this one's part)."""
        source = self.source_view(ours)
        if self.num_spare_rows:
            return np.concatenate([source, np.repeat(source[:1], self.num_spare_rows, axis=0)])
        return source.astype(np.float32) - np.float32(self.offset) if self.offset else source

    @property
    def _groups(self) -> tuple[tuple[int, ...], ...]:
        return _groups(self.axes) if self.axes else tuple((axis,) for axis in range(len(self.shape)))


@functools.cache
def _groups(axes: str) -> tuple[tuple[int, ...], ...]:
    """For each dimension of the file which of ours it is made of: "D N H -> (N H) D" is ((1, 2), (0,)); "1" is ()."""
    ours, theirs = (side.split() if i == 0 else side for i, side in enumerate(axes.split(" -> ")))
    groups = re.findall(r"\(([^)]*)\)|(\S+)", str(theirs))
    named = [tuple(several.split()) if several else () if one == "1" else (one,) for several, one in groups]
    assert sorted(name for group in named for name in group) == sorted(ours), f"{axes!r} does not name all dimensions"
    return tuple(tuple(list(ours).index(name) for name in group) for group in named)


@dataclass(frozen=True)
class Table:
    """The weights of one model in one kind of file."""

    format: str
    entries: tuple[Entry, ...]
    ignored: tuple[tuple[str, str], ...] = ()  # pattern of a name, and the reason
    normalised: Callable[[str], str] = str  # the name in a file without what varies between a family's files
    written: Callable[[str], str] = str  # the full name under which an entry's `source` is written

    def is_ignored(self, name: str) -> bool:
        return any(re.fullmatch(pattern, name) for pattern, _ in self.ignored)

    def without(self, *rooms: str) -> "Table":
        """Only the entries whose path begins with none of `rooms`, such as "vision/"."""
        kept = tuple(entry for entry in self.entries if not entry.path.startswith(rooms))
        return Table(self.format, kept, self.ignored, self.normalised, self.written)


class Weights:
    """The weights in an open checkpoint, by our paths.

    Raises: CheckpointError that lists all tensors that are missing, unknown or of another shape than the table's,
        naming the file; before anything is read.
    """

    def __init__(self, reader: Reader, table: Table):
        self.reader, self.entries = reader, {entry.path: entry for entry in table.entries}
        self._names = _matched(reader, table)

    def paths(self) -> list[str]:
        """All paths, in the order in which they lie in the files; first those that they lack."""
        return sorted(self.entries, key=lambda path: (*self._where(path), self.entries[path].index))

    def source_name(self, path: str) -> str | None:
        """The full name of the file's tensor that a weight lies in; None for an optional one that is not there."""
        return self._names.get(self.entries[path].source)

    def read(self, path: str, out: np.ndarray, region: Region | None = None) -> None:
        """Fills `out`, of any real dtype, with a weight or a region of it.

        `out` has the weight's (or region's) shape; dimensions that lie together in the file must be together in it.
        Raises CheckpointError if the file is damaged.
        """
        entry = self.entries[path]
        if entry.source not in self._names:
            out[...] = 0
            return
        region = region or tuple(slice(0, size) for size in entry.shape)
        around, start = entry.source_region(region)
        is_same = around == region
        target = out if is_same else np.empty([part.stop - part.start for part in around], out.dtype)
        view = entry.source_view(target)
        if entry.offset:
            values = np.empty(view.shape, np.float32)
            self._fill(entry, values, start)
            view[...] = values + np.float32(entry.offset)
        else:
            self._fill(entry, view, start)
        if not is_same:
            cut = (slice(r.start - a.start, r.stop - a.start) for r, a in zip(region, around, strict=True))
            out[...] = target[tuple(cut)]

    def encoding(self, path: str) -> Encoding | None:
        """How the file stores a weight; None for an optional one that is not there."""
        name = self.source_name(path)
        return None if name is None else self.reader.tensors[name].encoding

    def read_rows(self, path: str, out: np.ndarray) -> None:
        """Fills uint8 `out` [rows, bytes of a row] with all rows of a weight as they are stored, undecoded; see
        `Entry.has_rows`. Raises as `Reader.read_rows`.
        """
        entry, member = self.entries[path], 0
        for place, count in zip(entry.index, entry.stack, strict=True):
            member = member * count + place
        rows_each = math.prod(entry.source_shape[len(entry.stack) : -1])
        self.reader.read_rows(self._names[entry.source], out, member * rows_each)

    def _fill(self, entry: Entry, view: np.ndarray, start: Sequence[int]) -> None:
        self.reader.read(self._names[entry.source], out=view.reshape((1,) * len(entry.stack) + view.shape), start=start)

    def _where(self, path: str) -> tuple[str, int]:
        name = self.source_name(path)
        if name is None:
            return "", 0
        info = self.reader.tensors[name]
        return str(info.file), info.offset


def _matched(reader: Reader, table: Table) -> dict[str, str]:
    """From the source name of each entry to the full name in the file."""
    problems: list[str] = []
    names: dict[str, str] = {}
    wanted = {entry.source: entry for entry in table.entries}
    for name in reader.tensors:
        short = table.normalised(name)
        if short in names:
            problems.append(f"{names[short]!r} and {name!r} are the same weight")
        elif short in wanted:
            names[short] = name
        elif not table.is_ignored(short):
            problems.append(f"{name!r} is unknown")
    for source, entry in wanted.items():
        if source not in names:
            if not entry.is_optional:
                problems.append(f"{source!r} is missing")
            continue
        stored, ours = reader.tensors[names[source]].shape, entry.source_shape
        has_room = entry.has_spare_rows and stored[1:] == ours[1:] and stored[:1] >= ours[:1]
        if stored != ours and not has_room:
            problems.append(f"{names[source]!r} has shape {list(stored)}, but the config says {list(ours)}")
    if problems:
        shown = problems[:20] + ([f"and {len(problems) - 20} more"] if len(problems) > 20 else [])
        raise CheckpointError(f"the tensors of {reader.path} do not fit its config:\n  " + "\n  ".join(shown))
    return names


class Assembly:
    """Puts weights together into the tensors of a table, for a writer: several may lie in one."""

    def __init__(self, table: Table):
        self.table, self._entries = table, {entry.path: entry for entry in table.entries}
        self._members: dict[str, int] = {}
        for entry in table.entries:
            self._members[entry.source] = self._members.get(entry.source, 0) + 1
        self._begun: dict[str, tuple[np.ndarray, int]] = {}

    def add(self, path: str, ours: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """The full name and values of the file's tensor, once all its members have come."""
        entry = self._entries[path]
        values = entry.stored(ours)
        if not entry.stack:
            yield self.table.written(entry.source), values
            return
        if entry.source not in self._begun:
            self._begun[entry.source] = np.empty(entry.written_shape, values.dtype), self._members[entry.source]
        whole, missing = self._begun[entry.source]
        whole[entry.index] = values
        self._begun[entry.source] = whole, missing - 1
        if missing == 1:
            yield self.table.written(entry.source), self._begun.pop(entry.source)[0]
