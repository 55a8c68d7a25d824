"""A mesh with the rules for it: where each array of a model lies."""

import contextlib
from dataclasses import dataclass
from typing import TypeVar

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gemma_jax.nn import logical
from gemma_jax.nn.logical import LogicalAxisError, Rules
from gemma_jax.nn.paths import parameters
from gemma_jax.nn.quantised import Int8
from gemma_jax.parallel import mesh as meshes
from gemma_jax.parallel.mesh import MeshError
from gemma_jax.parallel.rules import AXES, SERVE

Module = TypeVar("Module", bound=nnx.Module)


@dataclass(frozen=True)
class Partition:
    """Raises `MeshError` for a mesh with an axis that no rule names or that is not of kind Auto, and for rules that
    name axes which are none; `logical.LogicalAxisError`, naming the dimension, for a model whose weights the mesh does
    not divide, and for rules that divide rings.
    """

    mesh: Mesh
    rules: Rules = SERVE

    def __post_init__(self) -> None:
        named = {axis: name for name, axes in self.rules.axes for axis in axes}
        meshes.check(self.mesh, tuple(named), self.rules.name)
        for axis, name in named.items():
            if axis not in AXES and axis not in self.mesh.axis_names:
                known = ", ".join(dict.fromkeys((*self.mesh.axis_names, *AXES)))
                raise MeshError(f"the rules {self.rules.name!r} put {name!r} on {axis!r}; wanted some of {known}")
        cut = [axis for axis in self.rules.axes_of("kv_win") if self.mesh.shape.get(axis, 1) > 1]
        if cut:
            raise LogicalAxisError(f"the rules {self.rules.name!r} put 'kv_win' on {cut[0]}={self.mesh.shape[cut[0]]}, "
                                   "but local layers' rings lie whole; give it no axes")  # fmt: skip

    def scope(self) -> contextlib.AbstractContextManager[None]:
        """Programs traced and called inside run on the mesh by these rules."""
        return logical.scope(self.mesh, self.rules)

    def weight(self, dims: str, shape: tuple[int, ...]) -> NamedSharding:
        """Where a weight lies, by the letters of its dimensions; a `Placement` of `gemma_jax.load`."""
        return NamedSharding(self.mesh, logical.weight_spec(self.rules, dims, shape, self.mesh.shape))

    def whole(self) -> NamedSharding:
        """All of an array on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    def weights(self, model: Module) -> Module:
        """Of each parameter of a model, abstract or not, its sharding: a tree of the model's structure."""
        found = jax.tree.map(lambda leaf: self.whole(), model)
        for path, param in parameters(found).items():
            value = parameters(model)[path].get_raw_value()
            there = self.weight(param.get_metadata("dims"), value.shape)
            param.set_raw_value(Int8(there, self.whole()) if isinstance(value, Int8) else there)
        return found

    def placed(self, model: Module) -> Module:
        """The same model with its weights on the mesh."""
        return jax.device_put(model, self.weights(model))
