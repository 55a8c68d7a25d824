"""`Edited`: a decoder and edits of its forward pass, in the decoder's place wherever one is called."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from gemma_jax.configs.config import DecoderConfig
from gemma_jax.nn.cache import Cache
from gemma_jax.nn.decoder import Decoder, Inserted
from gemma_jax.nn.edits import Edit, prepared
from gemma_jax.nn.layers import RMSNorm
from gemma_jax.nn.masks import Places
from gemma_jax.nn.sites import Taps


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Edited:
    """Calls the decoder with `edits` at their sites. Weights and the edits' arrays are leaves, the rest is static."""

    decoder: Decoder
    edits: tuple[Edit, ...]

    @property
    def config(self) -> DecoderConfig:
        return self.decoder.config

    @property
    def final_norm(self) -> RMSNorm:
        return self.decoder.final_norm

    def __call__(self, tokens: Int[Array, "B T"], *places: Any) -> Float[Array, "B T V"]:
        return self.decoder(tokens, *places, taps=self._taps())

    def hidden(
        self, tokens: Int[Array, "B T"], where: Places, cache: Cache | None = None, **options: Any
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        return self.decoder.hidden(tokens, where, cache, taps=self._taps(), **options)

    def hidden_states(
        self, tokens: Int[Array, "B T"], where: Places, inserted: Inserted | None = None
    ) -> Float[Array, "L+1 B T D"]:
        return self.decoder.hidden_states(tokens, where, inserted, taps=self._taps())

    def logits_at(self, x: Float[Array, "B T D"], positions: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        """Logits of some places of each row."""
        return self._taps().at(Places(positions))("logits", self.decoder.logits(x))

    def _taps(self) -> Taps:
        return Taps(self.decoder.config, self.edits)


def edited(decoder: Decoder, edits: Sequence[Edit], batch: int) -> Decoder | Edited:
    """The decoder with edits of `batch` rows, or itself if they leave it as it is. Raises as `prepared` does."""
    ready = prepared(decoder.config, edits, batch)
    return Edited(decoder, ready) if ready else decoder
