"""Weights that stay in memory as a file has them: GGUF's blocks, or bfloat16, beside activations in float32 (CPU).

A matrix is stored by its outputs: a row holds what one output needs, its inputs along the row. The product decodes as
it goes (`gemma_kernels.blocks`), so no float32 copy of a matrix is ever held. A table is stored by its rows.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from gemma_jax.nn.paths import parameters
from gemma_jax.nn.quantised import Int8
from gemma_kernels import blocks

DTYPE = "stored"  # what `load` calls it
ADVICE = "load the model with dtype='float32'"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Piece:
    """Some rows of a matrix in one of `blocks.ENCODINGS`: blocks as uint8 [O, bytes], plain numbers as [O, I]."""

    data: jax.Array
    encoding: str = field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Stored:
    """The value of a parameter, in the place of a float array of `shape`. A fused one has a piece for each weight."""

    pieces: tuple[Piece, ...]
    shape: tuple[int, ...] = field(metadata={"static": True})

    @property
    def dtype(self) -> jnp.dtype:
        """Of what comes out."""
        return jnp.dtype(jnp.float32)

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """As stored."""
        return sum(piece.data.nbytes for piece in self.pieces)

    def __getitem__(self, index: Any) -> "Stored":
        """Only all of it, which is what `param[...]` asks for."""
        if index is not ...:
            raise TypeError(f"a stored weight has no parts, so not [{index!r}]; {ADVICE}")
        return self

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise TypeError(f"weights are stored as {' and '.join(self.encodings)}, not as an array; {ADVICE}")

    @property
    def encodings(self) -> list[str]:
        """Of the pieces, each once."""
        return list(dict.fromkeys(piece.encoding for piece in self.pieces))

    def product(self, x: Float[Array, "*batch I"]) -> Float[Array, "*batch O"]:
        """With every row."""
        return blocks.products(x.astype(jnp.float32), [(piece.data, piece.encoding) for piece in self.pieces])

    def rows(self, index: Int[Array, "B T"]) -> Float[Array, "B T *row"]:
        """Rows of a table; an index outside of it is clamped."""
        (piece,) = self.pieces
        # tied to each other, or XLA takes what only concerns the table out of a loop of steps, and copies all of it
        data, index = jax.lax.optimization_barrier((piece.data, index))
        return blocks.rows(data, piece.encoding, index).reshape(*index.shape, *self.shape[1:])


def refuse_stored(model: nnx.Module, what: str) -> None:
    """Raises ValueError for a model with stored or int8 weights; `what` needs floats."""
    found = [param.get_raw_value() for param in parameters(model).values()]
    encodings = {name for value in found if isinstance(value, Stored | Int8) for name in value.encodings}
    if encodings:
        raise ValueError(f"{what} needs weights in floats, but these are {', '.join(sorted(encodings))}; {ADVICE}")
