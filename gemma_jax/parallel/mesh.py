"""Meshes of devices: named axes in the order of their wires, written as "data=2,model=4"."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from gemma_jax.parallel.rules import AXES


class MeshError(ValueError):
    """A mesh that cannot be: it names the axes, their sizes and the devices there are."""


def parse(text: str) -> dict[str, int]:
    """Sizes of axes, as in "data=2,model=4"; the others are 1. Raises MeshError that names what is wrong."""
    sizes: dict[str, int] = {}
    for part in filter(None, text.replace(" ", "").split(",")):
        name, _, size = part.partition("=")
        if name not in AXES or name in sizes or not size.isdecimal() or int(size) < 1:
            raise MeshError(f"mesh has {part!r}; wanted axis=size, each axis once, of {', '.join(AXES)}, "
                            "as in 'data=2,model=4'")  # fmt: skip
        sizes[name] = int(size)
    if not sizes:
        raise MeshError(f"mesh is {text!r}, without an axis; wanted some of {', '.join(AXES)}, as in 'data=2,model=4'")
    return sizes


def _is_size(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and bool(value >= 1)


def make(sizes: str | Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of all AXES, those not named of size 1, whose inner axes are the devices next to each other.

    Args:
        sizes: "data=2,model=4", or a mapping.
        devices: None: all that JAX has, of all processes. On several slices, or hosts of GPUs, `replica` and `data` go
            between them: `mesh_utils` places devices by their coordinates.

    Raises MeshError for what are no sizes, and if they do not multiply to the number of devices.
    """
    if not isinstance(sizes, str | Mapping) or not sizes:
        raise MeshError(f"mesh is {sizes!r}; wanted sizes of some of {', '.join(AXES)}, as in 'data=2,model=4'")
    wanted = parse(sizes) if isinstance(sizes, str) else dict(sizes)
    wrong = [name for name, size in wanted.items() if name not in AXES or not _is_size(size)]
    if wrong:
        raise MeshError(
            f"mesh has {wrong[0]}={wanted[wrong[0]]!r}; wanted whole numbers from 1 on for {', '.join(AXES)}"
        )
    devices = jax.devices() if devices is None else devices
    shape = tuple(wanted.get(axis, 1) for axis in AXES)
    if math.prod(shape) != len(devices):
        axes = " x ".join(f"{axis}={size}" for axis, size in wanted.items())
        raise MeshError(f"mesh {axes} has {math.prod(shape)} devices, but there are {len(devices)}; "
                        "make the sizes multiply to that")  # fmt: skip
    num_slices = len({getattr(device, "slice_index", 0) or 0 for device in devices})
    if num_slices > 1:
        inner = (1, *shape[1:]) if shape[0] == num_slices else None
        if inner is None:
            raise MeshError(
                f"the devices are in {num_slices} slices, so 'replica' has to be {num_slices}, not {shape[0]}"
            )
        outer = (num_slices, *[1] * (len(shape) - 1))
        placed = mesh_utils.create_hybrid_device_mesh(inner, outer, devices)
    else:
        placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check(mesh: Mesh, axes: Collection[str], rules: str) -> None:
    """Raises MeshError for a mesh of the user's own that rules with these `axes` cannot be for."""
    unused = [name for name, size in mesh.shape.items() if size > 1 and name not in axes]
    if unused:
        raise MeshError(
            f"mesh has {unused[0]}={mesh.shape[unused[0]]}, an axis that none of the rules {rules!r} names, so its "
            f"devices would all do the same work; they name {', '.join(axes)}"
        )
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise MeshError(
            f"the mesh has axes of kind {', '.join(kind.name for kind in mesh.axis_types)}; wanted Auto, as "
            "gemma_jax.parallel.mesh.make makes them (jax.make_mesh: give axis_types)"
        )
