"""The embedder of Gemma 3n's images and sound: what a tower gives, and tokens with rows of their own, in the decoder's
width (specification of Gemma 3n, section 4.2).

Dimension letters: S rows of the table, C the tower's width, D the decoder's.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from gemma_jax.configs.config import NormConfig
from gemma_jax.nn.layers import RMSNorm, rms_scaled

NORM = NormConfig(is_zero_centred=False)


class Embedder(nnx.Module):
    """Norms, turns into the decoder's width and norms again, without a weight; nothing is scaled by sqrt(D).

    `first_id` is the token that the first row of the table stands for.
    """

    def __init__(self, num_tokens: int, width: int, out_width: int, first_id: int, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.first_id = first_id
        self.embedding = _random(rngs, "S C", (num_tokens, width), width, dtype)
        self.hard_norm, self.soft_norm = RMSNorm("C", width, NORM, dtype), RMSNorm("C", width, NORM, dtype)
        self.w_proj = _random(rngs, "C D", (width, out_width), width, dtype)

    def soft(self, x: Float[Array, "*batch C"]) -> Float[Array, "*batch D"]:
        """Of what a tower gives. Gemma 3n multiplies an image's by sqrt(C) before, a clip's not."""
        return self._projected(self.soft_norm(x))

    def hard(self, ids: Int[Array, "*batch"]) -> Float[Array, "*batch D"]:
        """Of tokens of the table; an id outside it is the caller's error and gives the first or the last row."""
        rows = jnp.take(self.embedding[...], ids - self.first_id, axis=0, mode="clip")
        return self._projected(self.hard_norm(rows))

    def _projected(self, x: Float[Array, "*batch C"]) -> Float[Array, "*batch D"]:
        return rms_scaled(x @ self.w_proj[...], NORM.epsilon).astype(x.dtype)


def _random(rngs: nnx.Rngs, dims: str, shape: tuple[int, int], fan_in: int, dtype: jnp.dtype) -> nnx.Param:
    return nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * fan_in**-0.5, dims=dims)
