"""The logit lens: what the model would say if it stopped after each layer (nostalgebraist, 2020)."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gemma_jax.generate.checks import check_ids
from gemma_jax.interp.activations import capture, stream_sites
from gemma_jax.model import Gemma
from gemma_jax.nn.decoder import Decoder

LOGIT_ROWS = 64  # places whose logits are held at once: 64 MiB of float32 for Gemma's vocabulary


@dataclass(frozen=True)
class Lens:
    """Tokens that layers lean to. Row 0 is the stream before the first layer, row i after i layers."""

    ids: Int[Array, "L+1 B T k"]
    logprobs: Float[Array, "L+1 B T k"]  # natural logarithm


def logit_lens(gemma: Gemma, tokens: Int[Array, "B T"], keep: int | Sequence[int] = 5, **inputs: Any) -> Lens:
    """Final norm and head on the stream between all layers.

    Args:
        keep: how many of the most likely tokens; or the ids whose log-probabilities are wanted.
        inputs: images, mask and edits, as for `capture`; edits of `final` and `logits` have no part in it.

    The last row is what the model says; not so with AltUp (3n), where the lens sees the active stream alone. Never are
    the logits of more than LOGIT_ROWS places held.
    """
    vocab_size, ids = gemma.config.vocab_size, None
    if isinstance(keep, int | np.integer):
        if not 0 < keep <= vocab_size:
            raise ValueError(f"keep is {keep}; wanted 1 to {vocab_size} tokens, or a list of ids")
    else:
        check_ids(keep, vocab_size, "keep")
        ids = jnp.asarray(keep, jnp.int32)
    sites = stream_sites(gemma.config.num_layers)
    found = capture(gemma, tokens, sites, **inputs)
    states = jnp.stack([found[name] for name in sites])
    count = int(keep) if ids is None else len(keep)  # pyright: ignore
    with gemma.scope():
        best, logprobs = _look(gemma.model, states.reshape(-1, states.shape[-1]), ids, count)
    shape = (*states.shape[:-1], count)
    return Lens(best.reshape(shape), logprobs.reshape(shape))


@functools.partial(jax.jit, static_argnames="count")
def _look(
    model: Decoder, states: Float[Array, "R D"], ids: Int[Array, " k"] | None, count: int
) -> tuple[Int[Array, "R k"], Float[Array, "R k"]]:
    def one(state: jax.Array) -> tuple[jax.Array, jax.Array]:
        logprobs = jax.nn.log_softmax(model.logits(model.final_norm(state)))
        if ids is not None:
            return ids, logprobs[ids]
        best, chosen = jax.lax.top_k(logprobs, count)
        return chosen, best

    return jax.lax.map(one, states, batch_size=LOGIT_ROWS)
