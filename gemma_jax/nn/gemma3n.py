"""What Gemma 3n adds to a block: streams that take turns (AltUp), LAuReL, and an embedding for every layer.

Each stands behind a switch of the config and works without the others. Letters as in `nn/layers.py`.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from gemma_jax.configs.config import DecoderConfig
from gemma_jax.nn.layers import ACTIVATION, RMSNorm, dimension_sizes, product, weight, wide

FLOOR = 1e-5  # of a mean square that is divided by


class AltUp(nnx.Module):
    """Alternating updates: a block computes one of A streams, the others are predicted and corrected from it.

    Source: arXiv:2301.13310, with the router and norms of Gemma 3n (gemma3n.md, 2.3).
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        assert config.altup is not None
        self.config, self.width = config.altup, config.width
        sizes = dimension_sizes(config)
        self.router_norm = RMSNorm("D", config.width, config.norm, dtype)
        self.w_router = weight(rngs, "D A", sizes, dtype)
        self.prediction = weight(rngs, "A A A", sizes, dtype, inputs=None)  # of [router, stream made, stream read]
        self.correction = weight(rngs, "A A", sizes, dtype, inputs=None)  # of [router, stream corrected]
        if self.config.has_corrected_scale:
            self.correct_scale = nnx.Param(jnp.ones((config.width,), dtype), dims="D")

    def predict(self, x: Float[Array, "A B T D"]) -> Float[Array, "A B T D"]:
        """The streams as the block finds them: each plus a mixture of all, chosen by the active one."""
        mixture = jnp.einsum(
            "BTP,POJ->BTOJ", self._routed(x[self.config.active_stream]), self._clipped(self.prediction)
        )
        return x + jnp.einsum("BTOJ,JBTD->OBTD", mixture.astype(x.dtype), x)

    def correct(self, predicted: Float[Array, "A B T D"], y: Float[Array, "B T D"]) -> Float[Array, "A B T D"]:
        """The streams once the block has made `y` of the active one: each gets a share of what was mispredicted."""
        shares = jnp.einsum("BTP,PO->OBT", self._routed(y), self._clipped(self.correction)) + 1.0
        return predicted + shares[..., None].astype(y.dtype) * (y - predicted[self.config.active_stream])

    def gated(self, x: Float[Array, "A B T D"]) -> Float[Array, "B T D"]:
        """What the gate of the layer's own embedding sees of the corrected streams."""
        active = x[self.config.active_stream]
        return active * self.correct_scale[...].astype(x.dtype) if self.config.has_corrected_scale else active

    def _routed(self, x: Float[Array, "B T D"]) -> Float[Array, "B T A"]:
        normed = self.router_norm(x) * jnp.asarray(1 / self.width, x.dtype)
        return jnp.tanh(product(normed, self.w_router).astype(wide(x)))

    def _clipped(self, coefficients: nnx.Param) -> jax.Array:
        value, clip = coefficients[...].astype(wide(coefficients[...])), self.config.coefficient_clip
        return value if clip is None else jnp.clip(value, -clip, clip)


class Laurel(nnx.Module):
    """A learned residual of low rank beside attention: n + norm(n w_left w_right) (arXiv:2411.07501)."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        sizes = dimension_sizes(config)
        self.w_left = weight(rngs, "D W", sizes, dtype)
        self.w_right = weight(rngs, "W D", sizes, dtype)
        self.norm = RMSNorm("D", config.width, config.norm, dtype)

    def __call__(self, n: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return n + self.norm(product(product(n, self.w_left), self.w_right))


class PerLayerInput(nnx.Module):
    """Brings a token's embedding for this layer into the stream, through a gate that the stream controls."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        sizes, self.activation = dimension_sizes(config), config.activation
        self.w_gate = weight(rngs, "D P", sizes, dtype)
        self.w_proj = weight(rngs, "P D", sizes, dtype)
        self.norm = RMSNorm("D", config.width, config.norm, dtype)

    def __call__(self, x: Float[Array, "B T D"], piece: Float[Array, "B T P"]) -> Float[Array, "B T D"]:
        """What is to be added."""
        gate = ACTIVATION[self.activation](product(x, self.w_gate))
        return self.norm(product(gate * piece, self.w_proj))


def as_large(y: Float[Array, "B T D"], x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """`y` with the root mean square of `x`; that of `y` is taken to be at least 1e-5 ** 0.5."""
    own, wanted = (jnp.mean(jnp.square(one.astype(wide(one))), axis=-1, keepdims=True) for one in (y, x))
    return (y * jnp.sqrt(wanted / jnp.maximum(own, FLOOR))).astype(x.dtype)
