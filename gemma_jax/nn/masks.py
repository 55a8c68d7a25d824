"""Who may look at whom. One rule, from positions alone, for padding, packing, chunked prefill and ring caches."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Places:
    """Where tokens stand: their positions, counted from 0 in each document, and for packed rows their document."""

    positions: jax.Array  # int32 [B, T]; -1 marks padding or an empty slot
    segments: jax.Array | None = None  # int32 [B, T]; None: one document a row
    blocks: jax.Array | None = None  # int32 [B, T]; from 1 on the image that a token is a part of, 0 for text
    # A promise that lets kernels compute masks from columns: real tokens stand first in each row, without a gap, the
    # positions of a document go up by one from column to column, and its columns stand together.
    is_dense: bool = field(default=False, metadata={"static": True})

    def column(self, index: Int[Array, " B"]) -> "Places":
        """One column of each row, [B, 1], which is of no image."""
        chosen = (
            None if one is None else jnp.take_along_axis(one, index[:, None], axis=1)
            for one in (self.positions, self.segments)
        )
        return Places(*chosen)  # pyright: ignore[reportArgumentType]

    @staticmethod
    def of(mask: Bool[Array, "B T"], *, is_dense: bool = False) -> "Places":
        """Counts the real tokens of each row; padding may stand left or right, or, if it `is_dense`, right alone."""
        return Places(jnp.where(mask, jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, -1), is_dense=is_dense)

    @staticmethod
    def plain(batch: int, length: int) -> "Places":
        """Rows without padding."""
        return Places(jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length)), is_dense=True)


def visible(query: Places, key: Places, window: int | None, is_causal: bool = True) -> Bool[Array, "B T S"]:
    """True where a query may look: at real keys of its document, not ahead, and fewer than `window` tokens back.

    Exactly `window` keys are seen, the query itself included. The tokens of an image see each other, also ahead; keys
    without `blocks` (those of a cache) are of no image at hand. Without causality (EmbeddingGemma) a window is
    symmetric: window // 2 tokens to each side and the query. Source: Gemma 3 report, sec. 2; gemma3.md, 3.6.
    """
    distance = query.positions[:, :, None] - key.positions[:, None, :]
    seen = jnp.broadcast_to(key.positions[:, None, :] >= 0, distance.shape)
    if is_causal:
        ahead = distance < 0
        if query.blocks is not None and key.blocks is not None:
            same = query.blocks[:, :, None] == key.blocks[:, None, :]
            ahead &= ~(same & (query.blocks > 0)[:, :, None])
        seen &= ~ahead
        seen = seen if window is None else seen & (distance < window)
    elif window is not None:
        seen &= jnp.abs(distance) <= window // 2
    if query.segments is not None and key.segments is not None:
        seen &= query.segments[:, :, None] == key.segments[:, None, :]
    return seen
