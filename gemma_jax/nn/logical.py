"""Which mesh axes the dimensions of an array lie on: dimensions have logical names, a table of rules gives these axes.

    with logical.scope(mesh, rules):            # what is traced in here is for this mesh
        x = logical.constrain(x, "batch", "act_seq", "act_embed")

Outside of a scope every function here does nothing, so the model is written once. The tables are in `parallel.rules`.
Mesh axes are of kind Auto: XLA places what no rule names. Source of the idea: flax's logical axes, T5X.
"""

import contextlib
import functools
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, Mesh, PartitionSpec

Axes = tuple[str, ...]
Tree = TypeVar("Tree")

# a weight's letters (see `nn.layers`) that lie on a mesh; all others are whole everywhere
# (towers name theirs by other letters, without D: they lie whole)
WEIGHT_NAMES = {"D": "embed", "N": "q_heads", "K": "kv_heads", "F": "ffw", "V": "vocab", "R": "ple_rows"}
FUSED = ("M", "E")  # of weights that stand behind each other: no axis divides all of them


class LogicalAxisError(ValueError):
    """A rule that cannot hold: it names the dimension, its size, and the mesh axes that do not divide it."""


class ReplicationWarning(UserWarning):
    """A rule does not hold, and every device along its axes does the same work."""


@dataclass(frozen=True)
class Rules:
    """Mesh axes of each logical name. An axis serves the first dimension of an array that has it and is divided by it.

    `whole` names dimensions that lie whole on all devices where their axes do not divide them, without a word: the
    design provides for it. For other activations that is a `ReplicationWarning`, for weights a `LogicalAxisError`.
    """

    name: str
    axes: tuple[tuple[str, Axes], ...]
    whole: frozenset[str] = frozenset()
    is_ring: bool = False  # global layers pass keys on from device to device instead of gathering them

    @classmethod
    def of(
        cls, name: str, axes: Mapping[str, str | Sequence[str]], whole: Sequence[str] = (), **others: Any
    ) -> "Rules":
        """Rules from a mapping; an axis may be given for a tuple of one."""
        pairs = ((key, (value,) if isinstance(value, str) else tuple(value)) for key, value in axes.items())
        return cls(name, tuple(pairs), frozenset(whole), **others)

    def axes_of(self, name: str) -> Axes:
        """The axes of a name. Raises LogicalAxisError for a name that the table has not."""
        found = dict(self.axes)
        if name not in found:
            raise LogicalAxisError(f"the rules {self.name!r} have no {name!r}; they have {', '.join(found)}")
        return found[name]

    def spec(
        self, names: Sequence[str | None], shape: Sequence[int], sizes: Mapping[str, int], *, is_weight: bool = False
    ) -> PartitionSpec:
        """The axes of each dimension of an array, on a mesh of `sizes`. Raises LogicalAxisError: see the class."""
        used: set[str] = set()
        found: list[Axes | None] = []
        for name, size in zip(names, shape, strict=True):
            axes = () if name is None else self._held(name, size, sizes, used, is_weight)
            used.update(axes)
            found.append(axes or None)
        return PartitionSpec(*found)

    def _held(self, name: str, size: int, sizes: Mapping[str, int], used: set[str], is_weight: bool) -> Axes:
        axes = tuple(a for a in self.axes_of(name) if sizes.get(a, 1) > 1 and a not in used)
        count = math.prod(sizes[a] for a in axes)
        if size % count == 0:
            return axes
        if name in self.whole or (name == "act_seq" and size == 1):  # of one token there are no parts
            return ()
        where = " x ".join(f"{a}={sizes[a]}" for a in axes)
        message = f"{name} is {size}, which {where} of the mesh does not divide (rules {self.name!r})"
        if is_weight:
            raise LogicalAxisError(f"{message}; choose another mesh, or other axes for {name!r}")
        warnings.warn(f"{message}: all devices along it do the same work", ReplicationWarning, stacklevel=2)
        return ()


_rules = jax.make_user_context(None)  # a part of the key under which JAX keeps compiled programs


@contextlib.contextmanager
def scope(mesh: Mesh, rules: Rules) -> Iterator[None]:
    """Programs traced and called inside are for this mesh."""
    with jax.set_mesh(mesh), _rules(rules):
        yield


def current() -> Rules | None:
    """The rules in scope, inside a program that XLA divides; None outside of a scope and in one device's program."""
    rules = _rules.value
    if rules is None or any(kind == AxisType.Manual for kind in jax.sharding.get_abstract_mesh().axis_types):
        return None
    return rules


def sizes() -> dict[str, int]:
    """The mesh in scope: devices along each axis."""
    return dict(jax.sharding.get_abstract_mesh().shape)


def count(axes: Axes) -> int:
    """Devices along some axes of the mesh in scope."""
    return math.prod(sizes().get(axis, 1) for axis in axes)


def parts(name: str) -> int:
    """Into how many parts the mesh in scope divides dimensions of a name; 1 outside of a scope."""
    rules = current()
    return 1 if rules is None else count(rules.axes_of(name))


def is_spread() -> bool:
    """Whether the mesh in scope has devices of several processes, which then have to call the same programs."""
    return current() is not None and bool(jax.sharding.get_mesh().is_multi_process)


def spec(names: Sequence[str | None], shape: Sequence[int]) -> PartitionSpec:
    """Where an array lies in the scope."""
    rules = current()
    assert rules is not None
    return rules.spec(names, shape, sizes())


def axes_at(spec: PartitionSpec, dimension: int) -> Axes:
    """The axes of one dimension."""
    found = spec[dimension]
    return () if found is None else (found,) if isinstance(found, str) else tuple(found)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """`x`, lying where the rules say; one name for each of the last dimensions, None for one that is not divided."""
    if current() is None:
        return x
    return jax.lax.with_sharding_constraint(x, spec((None,) * (x.ndim - len(names)) + names, x.shape))


def replicated(tree: Any) -> Any:
    """Arrays, whole on every device, so that each process can read them."""
    if current() is None:
        return tree
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, PartitionSpec()), tree)


def zeros(shape: Sequence[int], dtype: Any, *names: str | None) -> jax.Array:
    """Zeros that are made where they lie."""
    if current() is None:
        return jnp.zeros(shape, dtype)
    return _zeros(tuple(shape), jnp.dtype(dtype), names)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _zeros(shape: tuple[int, ...], dtype: jnp.dtype, names: tuple[str | None, ...]) -> jax.Array:
    return constrain(jnp.zeros(shape, dtype), *names)


def weight_names(dims: str) -> tuple[str | None, ...]:
    """Logical names of a weight's dimensions. A vector is whole everywhere. Raises LogicalAxisError for a fused one."""
    letters = dims.split()
    if len(letters) == 1 or not set(letters) & {"D", "R", "r"}:  # r: an adapter's rank
        return (None,) * len(letters)
    if set(letters) & set(FUSED):
        raise LogicalAxisError(f"a weight of dimensions {dims!r} is several in one, which no axis divides; on a mesh "
                               "use a model whose weights stand apart (PLAIN_LAYOUT)")  # fmt: skip
    return tuple(WEIGHT_NAMES.get(letter) for letter in letters)


def weight_spec(rules: Rules, dims: str, shape: Sequence[int], sizes: Mapping[str, int]) -> PartitionSpec:
    """Where a weight lies, perhaps one of a stack. Raises LogicalAxisError for a rule that cannot hold."""
    names = weight_names(dims)
    return rules.spec((None,) * (len(shape) - len(names)) + names, shape, sizes, is_weight=True)


def at_use(param: nnx.Param, value: jax.Array) -> jax.Array:
    """A weight as it is used: gathered along D, if it lies divided along it (FSDP, ZeRO-3: arXiv:1910.02054).

    Its gradient is scattered again, each device keeps the part that it holds of the weight.
    """
    rules, dims = current(), param.get_metadata("dims", None)
    if rules is None or dims is None:
        return value
    rest = weight_spec(rules, dims, value.shape, sizes())
    pairs = zip(weight_names(dims), rest, strict=True)
    whole = PartitionSpec(*(None if name == "embed" else axes for name, axes in pairs))
    return _gathered(value, rest, whole)


def at_rest(tree: Tree, like: Any = None) -> Tree:
    """A tree whose parameters lie where weights do.

    `like`: the parameters, for what an optimizer keeps of each. What has another shape than all of them (factored
    moments) is XLA's to place.
    """
    rules = current()
    if rules is None:
        return tree
    shapes = None if like is None else {(p.get_metadata("dims"), p.get_raw_value().shape) for p in _parameters(like)}

    def placed(leaf: Any) -> Any:
        if not isinstance(leaf, nnx.Param):
            return leaf
        value, dims = leaf.get_raw_value(), leaf.get_metadata("dims")
        if shapes is not None and (dims, getattr(value, "shape", None)) not in shapes:
            return leaf
        return leaf.replace(jax.lax.with_sharding_constraint(value, weight_spec(rules, dims, value.shape, sizes())))

    return jax.tree.map(placed, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Param))


def _parameters(tree: Any) -> list[nnx.Param]:
    leaves = jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Param))
    return [leaf for leaf in leaves if isinstance(leaf, nnx.Param)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gathered(value: jax.Array, rest: PartitionSpec, whole: PartitionSpec) -> jax.Array:
    return jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(value, rest), whole)


def _gathered_forward(value: jax.Array, rest: PartitionSpec, whole: PartitionSpec) -> tuple[jax.Array, None]:
    return _gathered(value, rest, whole), None


def _gathered_backward(rest: PartitionSpec, whole: PartitionSpec, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    return (jax.lax.with_sharding_constraint(gradient, rest),)


_gathered.defvjp(_gathered_forward, _gathered_backward)
