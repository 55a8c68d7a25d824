"""From logits to a token: what the user may ask for, and the same as arrays, one value a row."""

import dataclasses
import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Bool, Float, Int

from gemma_jax.generate import filters
from gemma_jax.nn import logical

MAX_LOGPROBS = 100


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """What a request asks of the sampler. Raises ValueError that names the field, its value and what was wanted.

    The steps follow each other as in Hugging Face: repetition penalty, temperature, top-k, top-p, min-p. Reported
    log-probabilities are those of the model, before any of them.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0  # 0: the most likely token
    top_k: int | None = None  # keep the k most likely tokens, and those equal to the k-th
    top_p: float = 1.0  # keep the most likely tokens that together reach this probability (arXiv:1904.09751)
    min_p: float = 0.0  # keep tokens at least this times as likely as the best (arXiv:2407.01082)
    repetition_penalty: float = 1.0  # above 1: tokens of prompt and answer less likely (arXiv:1909.05858, sec. 4.1)
    seed: int | None = None  # None: a fresh one for each request
    stop: tuple[str, ...] = ()  # texts that end the answer and are not part of it
    logprobs: int | None = None  # 0: of the chosen tokens; n: of the n most likely ones too
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _whole("max_new_tokens", self.max_new_tokens, 1, None)
        _real("temperature", self.temperature, lambda t: t >= 0, "at least 0")
        if self.top_k is not None:
            _whole("top_k", self.top_k, 1, None, hint="; leave it out to keep all tokens")
        _real("top_p", self.top_p, lambda p: 0 < p <= 1, "above 0 and at most 1")
        _real("min_p", self.min_p, lambda p: 0 <= p <= 1, "from 0 to 1")
        _real("repetition_penalty", self.repetition_penalty, lambda p: p > 0, "above 0; 1 leaves logits alone")
        if self.seed is not None:
            _whole("seed", self.seed, 0, 2**63 - 1)
        if self.logprobs is not None:
            _whole("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop is {self.stop!r}; wanted a sequence of non-empty texts")


def _whole(name: str, value: object, low: int, high: int | None, hint: str = "") -> None:
    bound = f"at least {low}" if high is None else f"from {low} to {high}"
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ValueError(f"{name} is {value!r}; wanted a whole number {bound}{hint}")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name} is {value}; wanted {bound}{hint}")


def _real(name: str, value: Any, is_good: Callable[[float], bool], wanted: str) -> None:
    is_number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    if not is_number or not _is_finite(value) or not is_good(float(value)):
        raise ValueError(f"{name} is {value!r}; wanted a number {wanted}")


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False


@dataclass(frozen=True)
class Plan:
    """What the compiled program must contain: one program serves all values of the parameters that share a plan."""

    is_greedy: bool
    filters: bool
    penalises: bool
    num_logprobs: int | None


def plan(rows: Sequence[SamplingParams]) -> Plan:
    """The program that serves all rows of a batch."""
    counts = [row.logprobs for row in rows if row.logprobs is not None]
    return Plan(
        is_greedy=all(row.temperature == 0 for row in rows),
        filters=any(row.temperature > 0 and (row.top_k or row.top_p < 1 or row.min_p > 0) for row in rows),
        penalises=any(row.repetition_penalty != 1 for row in rows),
        num_logprobs=max(counts) if counts else None,
    )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampler:
    """Sampling parameters of a batch, one value a row; `keys` makes a row's draws its own, whatever its neighbours."""

    temperature: jax.Array  # float32 [B]
    top_k: jax.Array  # int32 [B]
    top_p: jax.Array  # float32 [B]
    min_p: jax.Array  # float32 [B]
    repetition_penalty: jax.Array  # float32 [B]
    keys: jax.Array  # uint32 [B, 2]


def sampler(rows: Sequence[SamplingParams], vocab_size: int) -> Sampler:
    """The parameters of a batch as arrays. Rows without a seed get one of their own."""
    seeds = [secrets.randbits(63) if row.seed is None else int(row.seed) for row in rows]
    keys = np.asarray([[seed >> 32, seed & 0xFFFFFFFF] for seed in seeds], np.uint32)
    if logical.is_spread() and any(row.seed is None for row in rows):  # all processes draw the same
        keys = np.asarray(multihost_utils.broadcast_one_to_all(keys))
    return Sampler(
        temperature=jnp.asarray([row.temperature for row in rows], jnp.float32),
        top_k=jnp.asarray([min(row.top_k or vocab_size, vocab_size) for row in rows], jnp.int32),
        top_p=jnp.asarray([row.top_p for row in rows], jnp.float32),
        min_p=jnp.asarray([row.min_p for row in rows], jnp.float32),
        repetition_penalty=jnp.asarray([row.repetition_penalty for row in rows], jnp.float32),
        keys=jnp.asarray(keys),
    )


def sample(
    logits: Float[Array, "B V"],
    rows: Sampler,
    plan: Plan,
    step: Int[Array, " B"],
    seen: Bool[Array, "B V"] | None,
) -> Int[Array, " B"]:
    """Draws one token a row. A row's draw depends on its seed, its step and its logits, not on its neighbours.

    `step` counts the tokens drawn for the row before; `seen` marks tokens of prompt and answer (plan.penalises).
    """
    logits = logits.astype(jnp.float32)  # of a model in float64 too
    if plan.penalises and seen is not None:
        penalty = rows.repetition_penalty[:, None]
        logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    greedy = _argmax(logits)
    if plan.is_greedy:
        return greedy
    # from the largest on, so that the best token stays at 0 however small the temperature is
    logits = logits - jnp.max(logits, axis=-1, keepdims=True)
    logits = logits / jnp.where(rows.temperature > 0, rows.temperature, 1.0)[:, None]
    if plan.filters:
        logits = filters.filtered(logits, rows.top_k, rows.top_p, rows.min_p)

    def noise(key: jax.Array, step: jax.Array) -> jax.Array:
        key = jax.random.wrap_key_data(key, impl="threefry2x32")
        return jax.random.gumbel(jax.random.fold_in(key, step), logits.shape[1:], jnp.float32)

    drawn = _argmax(logits + jax.vmap(noise)(rows.keys, step))
    return jnp.where(rows.temperature > 0, drawn, greedy)


def _argmax(x: Float[Array, "B V"]) -> Int[Array, " B"]:
    """The first of the largest; two plain reductions, which XLA on CPU vectorises as it does not `jnp.argmax`."""
    size = x.shape[-1]
    place = jnp.where(x == jnp.max(x, axis=-1, keepdims=True), jnp.arange(size, dtype=jnp.int32), size - 1)
    return jnp.min(place, axis=-1)


def logprobs(
    logits: Float[Array, "B V"], tokens: Int[Array, " B"], count: int
) -> tuple[Float[Array, " B"], Float[Array, "B n"], Int[Array, "B n"]]:
    """Log-probabilities of the chosen tokens and of the `count` most likely ones, with their ids; natural logarithm."""
    total = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0] - total
    best, ids = filters.best(logits, count)
    return chosen, best - total[:, None], ids


def sampling_params(**sampling: Any) -> SamplingParams:
    """SamplingParams from keywords; an unknown one is a TypeError that lists those there are."""
    names = [field.name for field in dataclasses.fields(SamplingParams)]
    unknown = sorted(set(sampling) - set(names))
    if unknown:
        raise TypeError(f"unknown sampling parameter {', '.join(unknown)}; there are {', '.join(names)}")
    return SamplingParams(**sampling)
