"""Edits of a forward pass: what `Taps` applies at a site. Their arrays are data, so new values compile nothing anew.

All take `site`, a name or a pattern of `nn/sites.py`, and `positions`, the places they touch: absolute positions in
each row, whatever chunk, bucket or cache brings them. None is all places, `range(3, 7)` or `slice(3, 7)` these four,
`slice(3, None)` all from 3 on, and a list or an array of whole numbers just those. Padding is touched by none.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Int

from gemma_jax.configs.config import DecoderConfig
from gemma_jax.nn import sites
from gemma_jax.nn.masks import Places
from gemma_jax.nn.sites import along

FARTHEST = np.iinfo(np.int32).max


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Spans:
    """Positions as stretches from `start` up to, not including, `stop`."""

    start: jax.Array | np.ndarray  # int32 [n]
    stop: jax.Array | np.ndarray

    @staticmethod
    def of(positions: Any) -> "Spans | None":
        """From what a user writes. Raises TypeError or ValueError for what names no positions."""
        if positions is None or isinstance(positions, Spans):
            return positions
        if isinstance(positions, slice | range):
            start, stop = positions.start or 0, FARTHEST if positions.stop is None else positions.stop
            if (positions.step or 1) != 1 or start < 0 or stop < start:
                raise ValueError(f"positions is {positions!r}; wanted a stretch that counts up by 1 from 0 or later")
            return Spans(np.asarray([start], np.int32), np.asarray([stop], np.int32))
        array = positions if isinstance(positions, jax.Array) else np.asarray(positions)
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise TypeError(
                f"positions is {positions!r}; wanted None, range(3, 7), slice(3, None), or a list of whole numbers"
            )
        if isinstance(array, np.ndarray) and (array < 0).any():
            raise ValueError(f"positions is {positions!r}; they count from 0")
        return Spans(array.astype(np.int32), array.astype(np.int32) + 1)

    def hold(self, positions: Int[Array, "B T"]) -> Bool[Array, "B T"]:
        """True at the positions that are meant."""
        each = positions[..., None]
        return jnp.any((each >= self.start) & (each < self.stop), axis=-1)


class Edit:
    """What all edits share. `new` gives values for all places; they go where `positions` says."""

    site: str
    positions: Any

    def __post_init__(self) -> None:
        object.__setattr__(self, "positions", Spans.of(self.positions))
        for name in ("vector", "values", "mean", "units"):  # to JAX a list is not an array, but a tree of numbers
            if isinstance(value := getattr(self, name, None), list | tuple):
                object.__setattr__(self, name, np.asarray(value))

    def __call__(self, x: jax.Array, where: Places) -> jax.Array:
        is_meant = where.positions >= 0
        if self.positions is not None:
            is_meant &= self.positions.hold(where.positions)
        return jnp.where(along(is_meant, x), self.new(x, where).astype(x.dtype), x)

    def new(self, x: jax.Array, where: Places) -> jax.Array:
        raise NotImplementedError

    def idle(self) -> list[tuple[Any, float]]:
        """Values and the number that makes the edit change nothing if all of one are it."""
        return []

    def check(self, shape: tuple[int, ...], batch: int) -> None:
        """Raises ValueError unless the edit fits a site with values [batch, T, *shape]."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Add(Edit):
    """Adds scale * vector, in float32 before it is rounded to the site's dtype: steering."""

    site: str = field(metadata={"static": True})
    vector: Any  # [D], or what the site has in place of D, or what broadcasts to it
    scale: Any = 1.0
    positions: Any = None

    def new(self, x: jax.Array, where: Places) -> jax.Array:
        wide = jnp.promote_types(x.dtype, jnp.float32)
        return x.astype(wide) + jnp.asarray(self.scale, wide) * jnp.asarray(self.vector, wide)

    def idle(self) -> list[tuple[Any, float]]:
        return [(self.vector, 0.0), (self.scale, 0.0)]

    def check(self, shape: tuple[int, ...], batch: int) -> None:
        _check_broadcast(self, "vector", self.vector, shape)
        _check_broadcast(self, "scale", self.scale, ())


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Patch(Edit):
    """Puts values in: `values[:, p]` at position p. Beyond the last of them it does nothing.

    What `capture` gave of rows without padding, or with padding on the right, fits as it is.
    """

    site: str = field(metadata={"static": True})
    values: Any  # [B or 1, T, ...]
    positions: Any = None

    def new(self, x: jax.Array, where: Places) -> jax.Array:
        values, length = jnp.asarray(self.values), np.shape(self.values)[1]
        values = jnp.broadcast_to(values, (x.shape[0], *values.shape[1:]))
        index = along(jnp.clip(where.positions, 0, length - 1), x)
        chosen = jnp.take_along_axis(values, index, axis=1).astype(x.dtype)
        return jnp.where(along(where.positions < length, x), chosen, x)

    def check(self, shape: tuple[int, ...], batch: int) -> None:
        got = np.shape(self.values)
        if len(got) < 2 or got[0] not in (1, batch) or got[1] == 0 or got[2:] != shape:
            first = "1" if batch == 1 else f"1 or {batch}"
            wanted = ", ".join([first, "T", *map(str, shape)])
            raise ValueError(f"Patch at {self.site!r}: values has shape {got}; wanted [{wanted}]")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scale(Edit):
    """Multiplies by `factor`: all of a site, or what `units` lists: heads of `heads`, neurons of `mlp_hidden`."""

    site: str = field(metadata={"static": True})
    factor: Any
    units: Any = None  # int [n]
    positions: Any = None

    def new(self, x: jax.Array, where: Places) -> jax.Array:
        wide = jnp.promote_types(x.dtype, jnp.float32)
        return _in_units(self.units, (x.astype(wide) * jnp.asarray(self.factor, wide)).astype(x.dtype), x)

    def idle(self) -> list[tuple[Any, float]]:
        return [(self.factor, 1.0)]

    def check(self, shape: tuple[int, ...], batch: int) -> None:
        _check_broadcast(self, "factor", self.factor, ())
        _check_units(self, self.units, shape)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Ablate(Edit):
    """Puts zero, or `mean`, in place of all of a site or of the heads or neurons that `units` lists.

    Ablate("layers.3.*_out") takes out layer 3: attention and ffw add nothing to the stream.
    """

    site: str = field(metadata={"static": True})
    units: Any = None  # int [n]
    mean: Any = 0.0  # a number, [D], or what the site has in place of D
    positions: Any = None

    def new(self, x: jax.Array, where: Places) -> jax.Array:
        return _in_units(self.units, jnp.broadcast_to(jnp.asarray(self.mean, x.dtype), x.shape), x)

    def check(self, shape: tuple[int, ...], batch: int) -> None:
        _check_broadcast(self, "mean", self.mean, shape)
        _check_units(self, self.units, shape)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Apply(Edit):
    """Calls `function(x, *operands)`, pure JAX, which gives an array of x's shape.

    The function is part of the program: use one object again and again (not a new lambda each time, which compiles
    anew) and hand arrays that change as `operands`.
    """

    site: str = field(metadata={"static": True})
    function: Callable[..., jax.Array] = field(metadata={"static": True})
    operands: tuple[Any, ...] = ()
    positions: Any = None

    def new(self, x: jax.Array, where: Places) -> jax.Array:
        new = self.function(x, *self.operands)
        if np.shape(new) != x.shape:
            raise ValueError(f"Apply at {self.site!r}: the function gave shape {np.shape(new)} for {x.shape}")
        return jnp.asarray(new)


def prepared(config: DecoderConfig, edits: Sequence[Edit], batch: int) -> tuple[Edit, ...]:
    """The edits as arrays on the device, without those that by their own values do nothing (zero vector, factor 1).

    So steering with a zero vector is the plain forward. Raises TypeError or ValueError for what is no edit, has no
    site, or does not fit its site.
    """
    edits = edits if isinstance(edits, Edit) else tuple(edits)
    if isinstance(edits, Edit) or not all(isinstance(edit, Edit) for edit in edits):
        raise TypeError(f"edits is {edits!r}; wanted a list of Add, Patch, Scale, Ablate and Apply")
    shapes = sites.shapes(config)
    for edit in edits:
        for name in sites.find(config, [edit.site]):
            if name.endswith(sites.MAPS):
                raise ValueError(f"{edit.site!r} names {name}: attention maps can be captured, not changed")
            edit.check(shapes[name], batch)
    kept = [edit for edit in edits if not any(_is_all(value, idle) for value, idle in edit.idle())]
    return tuple(jax.tree.map(jnp.asarray if isinstance(edit, Apply) else _array, edit) for edit in kept)


def _array(value: Any) -> jax.Array:
    # of numbers one dtype: 2, 2.0 and numpy's 2.0 would each compile a program of its own
    return jnp.asarray(value, None if np.ndim(value) else jnp.float32)


def _is_all(value: Any, number: float) -> bool:
    return not isinstance(value, Tracer) and bool(jnp.all(jnp.asarray(value) == number))


def _in_units(units: Any, new: jax.Array, x: jax.Array) -> jax.Array:
    if units is None:
        return new
    is_meant = jnp.zeros(x.shape[2], bool).at[jnp.asarray(units)].set(True)
    return jnp.where(is_meant.reshape(-1, *[1] * (x.ndim - 3)), new, x)


def _check_broadcast(edit: Edit, what: str, value: Any, shape: tuple[int, ...]) -> None:
    got = np.shape(value)
    if len(got) > len(shape) or any(a not in (1, b) for a, b in zip(got[::-1], shape[::-1], strict=False)):
        wanted = f"[{', '.join(map(str, shape))}]" if shape else "a number"
        raise ValueError(f"{type(edit).__name__} at {edit.site!r}: {what} has shape {got}; wanted {wanted}")


def _check_units(edit: Edit, units: Any, shape: tuple[int, ...]) -> None:
    if units is None or isinstance(units, Tracer):
        return
    array = np.asarray(units)
    if array.ndim != 1 or array.dtype.kind not in "iu" or (array < 0).any() or (array >= shape[0]).any():
        raise ValueError(
            f"{type(edit).__name__} at {edit.site!r}: units is {array.tolist()}; "
            f"wanted a list of numbers, 0 to {shape[0] - 1}"
        )
