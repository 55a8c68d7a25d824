"""How likely a text is: the log-probability of each token given those before it, in bounded memory."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gemma_jax.generate.checks import check_prompts
from gemma_jax.generate.engine import chunk_sizes
from gemma_jax.nn import logical
from gemma_jax.nn.cache import Cache, capacity_bucket, empty_cache
from gemma_jax.nn.decoder import Decoder
from gemma_jax.nn.masks import Places


@dataclass(frozen=True)
class Score:
    """A scored text. The first token (BOS) conditions the others and has no log-probability of its own."""

    tokens: list[int]
    logprobs: list[float]  # natural logarithm, of tokens[1:]

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood of a token, in nats."""
        return -math.fsum(self.logprobs) / len(self.logprobs)

    @property
    def perplexity(self) -> float:
        """exp(nll)."""
        return math.exp(self.nll)


@functools.partial(jax.jit, static_argnames="is_first", donate_argnames="cache")
def score_chunk(
    model: Decoder,
    tokens: Int[Array, "1 T"],
    targets: Int[Array, "1 T"],
    count: Int[Array, ""],
    cache: Cache,
    is_first: bool,
) -> tuple[Cache, Float[Array, " T"]]:
    """Log-probability of each target after its token; only the first `count` columns are real."""
    column = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
    positions = jnp.where(column < count, cache.lengths[:, None] + column, -1)
    x, cache_after = model.hidden(tokens, Places(positions, is_dense=True), cache, is_cache_empty=is_first)
    assert cache_after is not None
    return cache_after, logical.replicated(-model.losses(x[0], targets[0]))


def score(model: Decoder, tokens: Sequence[int], chunk: int | None = None) -> Score:
    """Scores one sequence of at least two tokens. Raises ValueError as generation does for bad ids and lengths."""
    check_prompts(model.config, [tokens])
    if len(tokens) < 2:
        raise ValueError(f"{len(tokens)} token has nothing to be scored against; give at least two, BOS included")
    cache = empty_cache(model.config, 1, capacity_bucket(len(tokens)), model.final_norm.scale.dtype)
    sizes = chunk_sizes(len(tokens) - 1, chunk)
    padded = np.zeros((1, len(tokens) + max(sizes)), np.int32)
    padded[0, : len(tokens)] = tokens
    logprobs, start = [], 0
    for size in sizes:
        count = min(size, len(tokens) - 1 - start)
        inputs, targets = padded[:, start : start + size], padded[:, start + 1 : start + 1 + size]
        cache, values = score_chunk(model, inputs, targets, np.int32(count), cache, start == 0)
        logprobs += np.asarray(values[:count]).tolist()
        start += size
    return Score([int(token) for token in tokens], logprobs)
