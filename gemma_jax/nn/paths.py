"""The canonical name of every weight: the same in every file format, stacked or not, fused or not."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from flax import nnx


@dataclass(frozen=True)
class Place:
    """Where a weight stands: in a parameter of its own, perhaps transposed, or as a part of a fused one."""

    name: str  # the parameter's path
    param: nnx.Param
    part: slice | None = None  # along the second dimension

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape, its dimensions in canonical order."""
        return self.view(np.broadcast_to(np.float32(0), self.param.get_raw_value().shape)).shape

    def view(self, buffer: np.ndarray) -> np.ndarray:
        """The weight inside an array that holds the whole parameter; writing to the view writes to the array."""
        if self.param.get_metadata("dims") == "D V":  # a token table is canonically [V, D]
            return buffer.T
        return buffer if self.part is None else buffer[:, self.part]

    def within(self, buffer: np.ndarray, region: tuple[slice, ...]) -> tuple[np.ndarray, tuple[slice, ...]]:
        """The weight's share of a region of the parameter: its view in an array that holds the region, and which region
        of the weight that is (empty where they do not meet).
        """
        if self.param.get_metadata("dims") == "D V":
            return buffer.T, region[::-1]
        if self.part is None:
            return buffer, region
        first, columns, last = region[0], region[1], region[2:]
        start = min(max(columns.start, self.part.start), columns.stop)
        stop = max(min(columns.stop, self.part.stop), start)
        view = buffer[:, start - columns.start : stop - columns.start]
        return view, (first, slice(start - self.part.start, stop - self.part.start), *last)


def parameters(model: nnx.Module) -> dict[str, nnx.Param]:
    """The parameters of a module by path, such as "layers_3/attn/q/kernel" (spec: weight_names.md, 0).

    Attributes become path parts: `layers[3]` is layers_3, `w_q` is q/kernel; all others keep their names. For a model
    that is not fused these are the canonical paths of its weights.
    """
    return {_path(path): node for path, node in nnx.iter_graph(model) if isinstance(node, nnx.Param)}


def weights(model: nnx.Module) -> dict[str, Place]:
    """Where each weight stands, by its canonical path."""
    places: dict[str, Place] = {}
    for path, param in parameters(model).items():
        parts = param.get_metadata("parts", None)
        if parts is None:
            places[path] = Place(path, param)
            continue
        room = path.split("/")[:-2]
        for name, start, stop in parts:
            places["/".join([*room, name, "kernel"])] = Place(path, param, slice(start, stop))
    return places


def path_within(path: str, kept: Sequence[int]) -> str:
    """The path of a slice's weight in the whole model, of which `kept` layers are in the slice."""
    return re.sub(r"^layers_(\d+)(?=/)", lambda match: f"layers_{kept[int(match[1])]}", path)


def _path(path: tuple[object, ...]) -> str:
    parts: list[str] = []
    for key in path:
        if isinstance(key, int):
            parts[-1] += f"_{key}"
        elif str(key).startswith("w_"):
            parts += [str(key).removeprefix("w_"), "kernel"]
        else:
            parts.append(str(key))
    return "/".join(parts)
