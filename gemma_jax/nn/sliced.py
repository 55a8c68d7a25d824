"""A MatFormer slice as a decoder made of another's weights (arXiv:2310.07707; gemma3n.md, 3.1)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from gemma_jax.configs.slicing import Slicing
from gemma_jax.nn.decoder import Decoder
from gemma_jax.nn.layers import Layout
from gemma_jax.nn.paths import parameters, path_within


def cut(whole: Decoder, slicing: Slicing) -> Decoder:
    """The slice of a decoder. Works on traced weights too: gradients of a slice are gradients of the whole.

    Raises ConfigError for a slice that the model has not; see `Slicing.apply`.
    """
    config, kept = slicing.apply(whole.config), slicing.kept(whole.config)
    layout = Layout(whole.embedder.dims, is_fused=whole.layers[0].mlp.is_fused)
    dtype = whole.final_norm.scale.dtype
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), dtype=dtype, layout=layout))
    theirs = parameters(whole)
    for path, param in parameters(model).items():
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
            value = jnp.take(value, jnp.asarray(kept), axis=axis)
        else:
            parts = jnp.split(value, 2, axis=axis) if letter == "E" else [value]
            first = [jax.lax.slice_in_dim(part, 0, size // len(parts), axis=axis) for part in parts]
            value = jnp.concatenate(first, axis=axis) if len(first) > 1 else first[0]
    return value
