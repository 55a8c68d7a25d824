"""A MatFormer slice as a decoder made of another's weights (arXiv:2310.07707; gemma3n.md, 3.1)."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gemma_jax.configs.slicing import Slicing
from gemma_jax.nn import host
from gemma_jax.nn.adapted import refuse_adapted
from gemma_jax.nn.cache import Cache
from gemma_jax.nn.decoder import Decoder, Inserted
from gemma_jax.nn.layers import RMSNorm, Table
from gemma_jax.nn.masks import Places
from gemma_jax.nn.paths import parameters, path_within
from gemma_jax.nn.shapes import shapes
from gemma_jax.nn.stored import refuse_stored


def cut(whole: Decoder, slicing: Slicing, *, shares_tables: bool = False) -> Decoder:
    """The slice of a decoder. Works on traced weights too: gradients of a slice are gradients of the whole.

    With `shares_tables` the table of per-layer embeddings stays whole, and its rows are cut when they are read.
    Raises ConfigError for a slice that the model has not; see `Slicing.apply`. ValueError for tables that are mapped
    from a checkpoint and not shared.
    """
    whole, slicing = composed(whole, slicing)
    refuse_stored(whole, "a slice")
    refuse_adapted(whole, "a slice")
    if not shares_tables and whole.embedder.fetch is not None:
        raise ValueError(
            "the per-layer embeddings are mapped from a checkpoint; load the slice itself with slicing=, or give "
            "copy=False"
        )
    config, kept = slicing.apply(whole.config), slicing.kept(whole.config)
    dtype = whole.final_norm.scale.dtype
    model = shapes(config, dtype, whole.layout)
    if shares_tables:
        model.embedder, model.kept = whole.embedder, kept
    theirs = parameters(whole)
    for path, param in parameters(model).items():
        if shares_tables and path.startswith("embedder/"):
            continue
        source = theirs[path_within(path, kept)]
        shape = param.get_raw_value().shape
        param.set_raw_value(_part(source.get_raw_value(), source.get_metadata("dims"), shape, kept))
    return model


def _part(value: jax.Array, dims: str, shape: Sequence[int], kept: Sequence[int]) -> jax.Array:
    """The part of a parameter: the kept layers' of pieces (L), the first units of an ffw (F; in E gate and up)."""
    for axis, (letter, size) in enumerate(zip(dims.split(), shape, strict=True)):
        if value.shape[axis] == size:
            continue
        if letter == "L":
            value = host.kept(value, kept, axis)
        else:
            parts = jnp.split(value, 2, axis=axis) if letter == "E" else [value]
            first = [jax.lax.slice_in_dim(part, 0, size // len(parts), axis=axis) for part in parts]
            value = jnp.concatenate(first, axis=axis) if len(first) > 1 else first[0]
    return value


class SharedSlice(Decoder):
    """A slice without weights of its own: a program reads the whole's, and cuts them where it computes with them.

    XLA for TPU reads the cut parts in place. For CPU it copies them, for as long as a program runs.
    """

    def __init__(self, whole: Decoder, slicing: Slicing):
        refuse_stored(whole, "a slice")
        self.config, self.whole, self.slicing = slicing.apply(whole.config), whole, slicing

    def decoder(self) -> Decoder:
        """The slice with weights of its own."""
        return cut(self.whole, self.slicing)

    def _lent(self) -> Decoder:
        return cut(self.whole, self.slicing, shares_tables=True)

    @property
    def final_norm(self) -> RMSNorm:
        return self.whole.final_norm

    @property
    def embedder(self) -> Table:
        """Of the whole: with the pieces of all its layers."""
        return self.whole.embedder

    def see(self, *pixels: Any, **options: Any) -> Float[Array, "B M D"]:
        return self.whole.see(*pixels, **options)

    def pool(self, x: Float[Array, "B T D"], mask: Bool[Array, "B T"]) -> Float[Array, "B E"]:
        return self.whole.pool(x, mask)

    def logits(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        return self.whole.logits(x)

    def losses(self, x: Float[Array, "*batch D"], targets: Int[Array, "*batch"]) -> Float[Array, "*batch"]:
        return self.whole.losses(x, targets)

    def hidden(
        self, tokens: Int[Array, "B T"], where: Places, cache: Cache | None = None, **options: Any
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        return self._lent().hidden(tokens, where, cache, **options)

    def hidden_states(
        self, tokens: Int[Array, "B T"], where: Places, inserted: Inserted | None = None, taps: Any = None
    ) -> Float[Array, "L+1 B T D"]:
        return self._lent().hidden_states(tokens, where, inserted, taps)


def composed(model: Decoder, slicing: Slicing) -> tuple[Decoder, Slicing]:
    """A model with weights of its own and what slice of it is a slice of `model`, which may be a slice itself."""
    if not isinstance(model, SharedSlice):
        return model, slicing
    return model.whole, model.slicing.then(slicing, model.whole.config)


def standing(model: Decoder) -> Decoder:
    """The model with weights of its own."""
    return model.decoder() if isinstance(model, SharedSlice) else model
