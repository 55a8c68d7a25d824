"""A decoder of which nothing but shapes and dtypes is known: to be filled, or to be planned."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gemma_jax.configs.config import DecoderConfig
from gemma_jax.nn.decoder import Decoder
from gemma_jax.nn.layers import PLAIN_LAYOUT, Layout


class _Undrawn:
    """In place of `nnx.Rngs`, whose counter takes the longer in a traced program the more was traced before: of a 27B
    that is 18 of 21 s.
    """

    def params(self) -> jax.Array:
        return jax.random.key(0)


def shapes(config: DecoderConfig, dtype: jnp.dtype | str = "float32", layout: Layout = PLAIN_LAYOUT) -> Decoder:
    """`Decoder(config, ...)` with ShapeDtypeStructs for weights. Raises as `Decoder`."""
    undrawn: Any = _Undrawn()
    return nnx.eval_shape(lambda: Decoder(config, rngs=undrawn, dtype=dtype, layout=layout))
