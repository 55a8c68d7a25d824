"""MatFormer: smaller models that lie within a larger one, as an operation on its parameters (arXiv:2310.07707).

    from gemma_jax import matformer

    small = matformer.slice(gemma, matformer.E2B)                        # of E4B: what was released as E2B
    small = matformer.slice(gemma, ffw=[16384] * 5 + [8192] * 30)        # mix and match
    small = gemma_jax.load("google/gemma-3n-e4b-it", slicing=matformer.E2B)   # reads no more than the slice
    named = matformer.read_slicings("configs.csv")                       # the published file

A slice keeps some layers, and the first units of each one's ffw; nothing else changes its width. It is a model like any
other: it runs, trains, is saved and converted. `gemma-jax slice` makes one from file to file.
"""

from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from gemma_jax.configs.slicing import E2B, Slicing, read_slicings
from gemma_jax.model import Gemma
from gemma_jax.nn.decoder import Decoder
from gemma_jax.nn.layers import Layout
from gemma_jax.nn.paths import parameters, path_within

__all__ = ["E2B", "Slicing", "read_slicings", "slice"]


def slice(
    gemma: Gemma,
    slicing: Slicing | None = None,
    *,
    ffw: int | Iterable[int] | None = None,
    skip: Iterable[int] = (),
) -> Gemma:
    """A smaller model within a larger one.

    Args:
        slicing: or else:
        ffw: the width of all kept layers, or of each of them; None: as they are.
        skip: layers to leave out.

    What is not cut is shared with `gemma`, not copied; what is cut is a copy, sharded as the whole is.
    Raises: ConfigError for a slice that the model has not; see `Slicing.apply`.
    """
    if slicing is not None and (ffw is not None or tuple(skip)):
        raise ValueError("give a slicing, or ffw and skip, not both")
    if gemma.model.embedder.fetch is not None:
        raise ValueError("the per-layer embeddings are mapped from a checkpoint; load the slice itself with slicing=")
    slicing = slicing or Slicing.of(skip, ffw)
    config, kept, whole = slicing.apply(gemma.config), slicing.kept(gemma.config), gemma.model
    layout = Layout(whole.embedder.dims, is_fused=whole.layers[0].mlp.is_fused)
    dtype = whole.final_norm.scale.dtype
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), dtype=dtype, layout=layout))
    theirs = parameters(whole)
    for path, param in parameters(model).items():
        source = theirs[path_within(path, kept)]
        shape = param.get_raw_value().shape
        param.set_raw_value(_cut(source.get_raw_value(), source.get_metadata("dims"), shape, kept))
    return Gemma(config, model, gemma.tokenizer)


def _cut(value: jax.Array, dims: str, shape: Sequence[int], kept: Sequence[int]) -> jax.Array:
    """The part of a parameter: the kept layers' of pieces (L), the first units of an ffw (F; in E gate and up)."""
    for axis, (letter, size) in enumerate(zip(dims.split(), shape, strict=True)):
        if value.shape[axis] == size:
            continue
        if letter == "L":
            value = jnp.take(value, jnp.asarray(kept), axis=axis)
        else:
            parts = jnp.split(value, 2, axis=axis) if letter == "E" else [value]
            first = [jax.lax.slice_in_dim(part, 0, size // len(parts), axis=axis) for part in parts]
            value = jnp.concatenate(first, axis=axis) if len(first) > 1 else first[0]
    return value
