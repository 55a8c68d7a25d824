"""What Gemma 3n adds to a block: streams that take turns (AltUp), LAuReL, and an embedding for every layer.

Each stands behind a switch of the config and works without the others. Letters as in `nn/layers.py`.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from gemma_jax.configs.config import DecoderConfig
from gemma_jax.nn import kernels
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

    def mixture(self, x: Float[Array, "A B T D"]) -> Float[Array, "B T A A"]:
        """Coefficients [made, read] of predictions: each stream plus a mixture of all that the active one chooses."""
        routed = self._routed(x[self.config.active_stream])
        mixture = jnp.einsum("BTP,POJ->BTOJ", routed, self._clipped(self.prediction))
        return mixture + jnp.eye(len(x), dtype=mixture.dtype)

    def predicted(self, x: Float[Array, "A B T D"], mixture: Float[Array, "B T A A"]) -> Float[Array, "B T D"]:
        """The active stream as the block finds it. The others need not exist before `corrected`."""
        active = self.config.active_stream
        return kernels.mix_streams(mixture[:, :, active : active + 1], x)[0]

    def shares(self, y: Float[Array, "B T D"]) -> Float[Array, "B T A"]:
        """How much each stream gets of what was mispredicted, once the block has made `y` of the active one."""
        return jnp.einsum("BTP,PO->BTO", self._routed(y), self._clipped(self.correction)) + 1.0

    def gated(
        self, predicted: Float[Array, "B T D"], y: Float[Array, "B T D"], shares: Float[Array, "B T A"]
    ) -> Float[Array, "B T D"]:
        """What the gate of the layer's own embedding sees: the active stream, corrected."""
        share = shares[..., self.config.active_stream, None].astype(y.dtype)
        active = predicted + share * (y - predicted)
        return active * self.correct_scale[...].astype(y.dtype) if self.config.has_corrected_scale else active

    def corrected(
        self,
        x: Float[Array, "A B T D"],
        mixture: Float[Array, "B T A A"],
        y: Float[Array, "B T D"],
        shares: Float[Array, "B T A"],
        added: Float[Array, "B T D"] | None,
    ) -> Float[Array, "A B T D"]:
        """The streams behind the block: prediction + share * (y - the active prediction), + `added` but for the first.

        Predicted anew from `x` in the same pass: all streams are read once and written once.
        """
        shares = shares[..., None]
        of_streams = mixture - shares * mixture[:, :, self.config.active_stream, None]
        return kernels.mix_streams(jnp.concatenate([of_streams, shares], axis=-1), x, y, added)

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
