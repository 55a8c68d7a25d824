"""The weights of a smaller model that lie in a larger one's checkpoint: read by the part, the rest is never touched."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gemma_checkpoints.names import Entry, Region, Weights


@dataclass(frozen=True)
class Part:
    """Where a weight lies in a larger one: `path` there, and of some axes the places that are taken, in order.

    Of other axes that are shorter here the first places are.
    """

    path: str
    chosen: Mapping[int, Sequence[int]]


class Subset:
    """Reads like `Weights`. `parts` says for each path of the smaller model where it lies in `whole`."""

    def __init__(self, whole: Weights, entries: Mapping[str, Entry], parts: Mapping[str, Part]):
        self.whole, self.entries, self.parts, self.reader = whole, dict(entries), dict(parts), whole.reader

    def paths(self) -> list[str]:
        """All paths, in the order in which they lie in the files."""
        order = {path: i for i, path in enumerate(self.whole.paths())}
        return sorted(self.entries, key=lambda path: order[self.parts[path].path])

    def source_name(self, path: str) -> str | None:
        """As `Weights.source_name`."""
        return self.whole.source_name(self.parts[path].path)

    def read(self, path: str, out: np.ndarray, region: Region | None = None) -> None:
        """As `Weights.read`; runs of neighbouring places are read at once."""
        region = region or tuple(slice(0, size) for size in self.entries[path].shape)
        part = self.parts[path]
        runs = [list(_runs(part.chosen[i], r) if i in part.chosen else [(r, 0)]) for i, r in enumerate(region)]
        for chosen in itertools.product(*runs):
            there = tuple(place for place, _ in chosen)
            here = tuple(slice(at, at + place.stop - place.start) for place, at in chosen)
            self.whole.read(part.path, out[here], there)


def _runs(places: Sequence[int], region: slice) -> Iterator[tuple[slice, int]]:
    """Neighbouring places within a region, as slices, and where each begins in what is read."""
    wanted = places[region.start : region.stop]
    begin = 0
    for i in range(1, len(wanted) + 1):
        if i == len(wanted) or wanted[i] != wanted[i - 1] + 1:
            yield slice(wanted[begin], wanted[i - 1] + 1), begin
            begin = i
