"""The eyes and ears that stand before a decoder, and what brings their vectors into its stream."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from gemma_jax.configs.config import DecoderConfig, VisionConfig
from gemma_jax.nn.audio.conformer import Conformer, filled
from gemma_jax.nn.soft_tokens import Embedder
from gemma_jax.nn.vision.mobilenet_v5 import MobileNetV5
from gemma_jax.nn.vision.siglip import Projector, Siglip


class Senses(nnx.Module):
    """Towers, if the config has any: SigLIP (Gemma 3), MobileNetV5 and the conformer (3n)."""

    config: DecoderConfig

    def _build_senses(self, config: DecoderConfig, rngs: nnx.Rngs, dtype: jnp.dtype) -> None:
        if isinstance(config.vision, VisionConfig):
            self.vision = Siglip(config.vision, rngs=rngs, dtype=dtype)
            self.mm = Projector(config.vision, config.width, config.norm, rngs=rngs, dtype=dtype)
        elif config.vision is not None:
            self.vision = MobileNetV5(config.vision, rngs=rngs, dtype=dtype)
            sizes = config.vision.num_hard_tokens, config.vision.width, config.width, config.vision.first_token
            self.mm = Embedder(*sizes, rngs=rngs, dtype=dtype)
        if config.audio is not None:
            self.audio = Conformer(config.audio, rngs=rngs, dtype=dtype)
            sizes = config.audio.num_hard_tokens, config.audio.width, config.width, config.audio.first_token
            self.audio_mm = Embedder(*sizes, rngs=rngs, dtype=dtype)

    def see(self, pixels: Float[Array, "B height width 3"], *, is_tower_trained: bool = False) -> Float[Array, "B M D"]:
        """The soft tokens of images, in the size that the config's tower wants; for SigLIP pixels are between -1 and 1,
        for MobileNetV5 between 0 and 1.

        No gradient reaches the tower unless `is_tower_trained`: Gemma 3 was trained with a frozen one (report, sec. 2).
        """
        seen = self.vision(pixels)
        seen = seen if is_tower_trained else jax.lax.stop_gradient(seen)
        if isinstance(self.mm, Embedder):
            return self.mm.soft(seen * math.sqrt(seen.shape[-1]))  # matters only against the norm's epsilon
        return self.mm(seen)

    def hear(
        self,
        features: Float[Array, "B T F"],
        is_valid: Bool[Array, "B T"],
        counts: Int[Array, " B"] | None = None,
        *,
        is_tower_trained: bool = False,
    ) -> Float[Array, "B M D"]:
        """The soft tokens of clips, from their log-mel features: always as many, filled up with the embedding of the
        last hard token (gemma3n.md, 6.4). `counts` says how many frames each clip has; None: all.
        """
        assert self.config.audio is not None
        heard, is_real = self.audio(features, is_valid, counts)
        heard = heard if is_tower_trained else jax.lax.stop_gradient(heard)
        if counts is not None:  # what fills up clips of several lengths may fill more places than there are
            heard, is_real = (x[:, : self.config.audio.num_soft_tokens] for x in (heard, is_real))
        filling = self.audio_mm.hard(jnp.asarray(self.config.audio.padding_token))
        return filled(self.audio_mm.soft(heard), is_real, filling, self.config.audio.num_soft_tokens)

    def with_hard_tokens(self, tokens: Int[Array, "B T"], x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The stream with the rows of 3n's hard tokens in their places, such as an image's end; they are not scaled."""
        for name in ("mm", "audio_mm"):
            embedder = getattr(self, name, None)
            if not isinstance(embedder, Embedder):
                continue
            first, count = embedder.first_id, embedder.embedding.shape[0]
            is_hard = (tokens >= first) & (tokens < first + count)

            def place(x: jax.Array, embedder: Embedder = embedder, is_hard: jax.Array = is_hard) -> jax.Array:
                return jnp.where(is_hard[..., None], embedder.hard(tokens).astype(x.dtype), x)

            x = jax.lax.cond(jnp.any(is_hard), place, lambda x: x, x)  # text has none, nor has what is drawn
        return x
