"""What is learnt from: rows of text, and the loss of each next token."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from gemma_jax.nn.decoder import Decoder
from gemma_jax.nn.masks import Places
from gemma_jax.nn.scanned import ScannedDecoder


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Rows of text to learn from."""

    tokens: jax.Array  # int [B, T]
    where: Places | None = None  # None: rows without padding, a document each

    def check(self) -> None:
        """Raises TypeError for tokens that are no array, ValueError for shapes and dtypes that are no batch."""
        tokens, where = self.tokens, self.where
        if not isinstance(tokens, jax.Array | np.ndarray):
            raise TypeError(f"tokens are a {type(tokens).__name__}; wanted an array, integers [B, T]")
        if tokens.ndim != 2 or tokens.shape[1] < 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(f"tokens are {tokens.dtype}{list(tokens.shape)}; wanted integers [B, T], T from 2 on")
        for name in ("positions", "segments", "blocks"):
            value = None if where is None else getattr(where, name)
            if value is not None and value.shape != tokens.shape:
                raise ValueError(
                    f"where.{name} is {list(value.shape)}, the tokens {list(tokens.shape)}; wanted the same"
                )


def next_token_loss(model: Decoder | ScannedDecoder, batch: Batch, *, is_remat: bool = False) -> Float[Array, ""]:
    """Mean negative log-likelihood of the real targets, in nats; 0 if there are none.

    `is_remat`: for gradients the streams between layers are kept alone, and layers are computed again.
    """
    where = batch.where or Places.plain(*batch.tokens.shape)
    x, _ = model.hidden(batch.tokens, where, is_remat=is_remat)
    # the last column, which has no target, stays: a mesh divides all T columns or none
    is_real = jnp.pad(is_target(where), [(0, 0), (0, 1)])
    nll = jnp.where(is_real, model.losses(x, jnp.where(is_real, jnp.roll(batch.tokens, -1, axis=1), 0)), 0.0)
    return jnp.sum(nll) / jnp.maximum(jnp.sum(is_real), 1)


def is_target(where: Places) -> Bool[Array, "B T-1"]:
    """True where the next column holds the next token of the same document: neither padding nor another's first."""
    before, after = where.positions[:, :-1], where.positions[:, 1:]
    follows = (before >= 0) & (after == before + 1)
    return follows if where.segments is None else follows & (where.segments[:, :-1] == where.segments[:, 1:])
