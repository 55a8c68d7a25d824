"""Kernels of layers as int8 with a scale for each output: half of bfloat16's bytes for serving, on any mesh.

Activations stay floats: a product is x codes * scales. Token tables, norms and towers stay floats too.
"""

import functools
import re
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from gemma_jax.nn.paths import parameters

DTYPE = "int8"  # what `load` calls it
ADVICE = "load the model with dtype='bfloat16' or 'float32'"
LARGEST = 127
Module = TypeVar("Module", bound=nnx.Module)
_KERNELS = re.compile(r"layers_\d+/(attn|mlp)/[^/]+/kernel")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8:
    """The value of a parameter, in the place of a float array [*inputs, *outputs]."""

    codes: Any  # int8 [*inputs, *outputs]
    scales: Any  # [*outputs], in the dtype of activations

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the float array."""
        return self.codes.shape

    @property
    def dtype(self) -> jnp.dtype:
        """Of what comes out."""
        return self.scales.dtype

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.codes.size

    @property
    def nbytes(self) -> int:
        """As it is held."""
        return self.codes.nbytes + self.scales.nbytes

    @property
    def encodings(self) -> list[str]:
        """As of `Stored`."""
        return [DTYPE]

    def __getitem__(self, index: Any) -> "Int8":
        """Only all of it, which is what `param[...]` asks for."""
        if index is not ...:
            raise TypeError(f"an int8 weight has no parts, so not [{index!r}]; {ADVICE}")
        return self

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise TypeError(f"weights are int8 with scales, not an array; {ADVICE}")

    def floats(self) -> jax.Array:
        """The float array that it stands for."""
        return self.codes.astype(self.dtype) * self.scales


def is_quantised(path: str) -> bool:
    """Whether the weight of a path is int8 in a quantised model: kernels of attention and ffws are."""
    return _KERNELS.fullmatch(path) is not None


def quantise(param: nnx.Param) -> None:
    """Turns a parameter's floats into int8, where they lie; the floats are let go.

    Each output's scale is its largest magnitude / 127, rounded to the floats' dtype before codes are rounded by it.
    """
    value, num_inputs = param.get_raw_value(), param.get_metadata("inputs")
    places = None
    if isinstance(value.sharding, NamedSharding):
        places = Int8(value.sharding, NamedSharding(value.sharding.mesh, PartitionSpec()))
    param.set_raw_value(_program(num_inputs, places)(value))


def quantised(model: Module) -> Module:
    """The model with its kernels in int8; `model` stays as it is."""
    found = jax.tree.map(lambda x: x, model)
    for path, param in parameters(found).items():
        if is_quantised(path):
            quantise(param)
    return found


def abstract(model: Module) -> Module:
    """The quantised form of a model of which nothing but shapes is known."""
    found = jax.tree.map(lambda x: x, model)
    for path, param in parameters(found).items():
        if is_quantised(path):
            shape_only = functools.partial(_quantised, num_inputs=param.get_metadata("inputs"))
            param.set_raw_value(jax.eval_shape(shape_only, param.get_raw_value()))
    return found


@functools.cache
def _program(num_inputs: int, places: Int8 | None) -> Any:
    return jax.jit(lambda value: _quantised(value, num_inputs), out_shardings=places)


def _quantised(value: jax.Array, num_inputs: int) -> Int8:
    wide = value.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=tuple(range(num_inputs)))
    scales = jnp.where(largest > 0, largest / LARGEST, 1).astype(value.dtype)
    codes = jnp.clip(jnp.round(wide / scales.astype(jnp.float32)), -LARGEST, LARGEST)
    return Int8(codes.astype(jnp.int8), scales)
