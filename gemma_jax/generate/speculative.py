"""Speculative decoding: a smaller model drafts tokens, the model checks them all in one forward (arXiv:2211.17192).

The draft draws with the model's own noise: a token of a row comes from its seed, its place and the logits alone, for
both. A draft is kept where the model draws the same token. So the answer is the one that the model gives by itself,
greedy or sampled, token for token (as far as floats allow: a forward over several tokens rounds otherwise than one
after another). The price is a lower acceptance than by rejection sampling, at least (1 - d) / (1 + d) where that has
1 - d, d the total variation between both (arXiv:2408.07978); the gain is that no one need ask whether it was on.

Caches: both models store what they are shown, and rows are set back to what was kept (`cache.slot_counts`, slack).
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gemma_jax.generate import engine, sampling
from gemma_jax.generate.engine import DECODE_CHUNK, Drawn, Limits, Model, Session, Soft, State, Step, prefill
from gemma_jax.generate.sampling import Plan, Sampler
from gemma_jax.nn import logical
from gemma_jax.nn.cache import Cache
from gemma_jax.nn.decoder import Decoder
from gemma_jax.nn.masks import Places

MAX_TOKENS = 64  # drafted at once


@dataclass(frozen=True)
class Draft:
    """Who drafts, and how many tokens before each check."""

    model: Decoder
    num_tokens: int = 4
    soft: Soft | None = None  # of the prompts' images and sound, as the draft sees and hears them

    def __post_init__(self) -> None:
        count = self.num_tokens
        if isinstance(count, bool) or not isinstance(count, int | np.integer) or not 1 <= count <= MAX_TOKENS:
            raise ValueError(f"draft_tokens is {count!r}; wanted a whole number from 1 to {MAX_TOKENS}")
        if not self.model.config.attention.is_causal:
            raise ValueError(f"the draft, {self.model.config.name}, continues no text: attention.is_causal is False")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Drafting:
    """The draft's side of a batch; donated to each chunk and given back by it.

    Its cache lacks the token drawn last, and perhaps the one before: a draft that was kept and not looked at.
    """

    cache: Cache
    previous: jax.Array  # int32 [B], the token before the one drawn last
    proposed: jax.Array  # int32 [B], tokens drafted so far
    accepted: jax.Array  # int32 [B], of these


@functools.partial(jax.jit, static_argnames=("plan", "size", "ahead"), donate_argnames=("state", "drafting"))
def speculate_chunk(
    model: Model,
    draft: Decoder,
    state: State,
    drafting: Drafting,
    rows: Sampler,
    limits: Limits,
    num_steps: Int[Array, ""],
    plan: Plan,
    size: int,
    ahead: int,
) -> tuple[State, Drafting, Drawn]:
    """Draws in rounds of `ahead` drafts and a check, until a row has `num_steps` tokens (at most `size`) or more, or
    all rows are done. A round brings each row 1 to ahead + 1 tokens.
    """

    def more(carry: tuple[State, Drafting, Drawn]) -> jax.Array:
        state, _, sofar = carry
        return (jnp.max(sofar.counts) < num_steps) & ~jnp.all(state.is_done)

    def step(carry: tuple[State, Drafting, Drawn]) -> tuple[State, Drafting, Drawn]:
        state, drafting, sofar = carry
        proposal, cache = _propose(draft, model.config.vocab_size, state, drafting, rows, plan, ahead)
        after, drawn, previous, accepted = _check(model, state, drafting.previous, proposal, rows, limits, plan)
        cache = Cache(cache.layers, jnp.minimum(cache.lengths, after.cache.lengths))
        proposed = drafting.proposed + jnp.where(state.is_done, 0, ahead)
        column = jnp.arange(ahead + 1)[None, :]
        place = jnp.where(column < drawn.counts[:, None], sofar.counts[:, None] + column, size + ahead)

        def put(buffer: jax.Array, new: jax.Array) -> jax.Array:
            return buffer.at[jnp.arange(len(place))[:, None], place].set(new, mode="drop")

        return (
            after,
            Drafting(cache, previous, proposed, drafting.accepted + accepted),
            engine.joined(sofar, drawn, put),
        )

    start = (state, drafting, engine.none_drawn(state.tokens.shape[0], size + ahead, plan))
    state, drafting, drawn = jax.lax.while_loop(more, step, start)
    counters = logical.replicated((drafting.previous, drafting.proposed, drafting.accepted))
    state, drawn = engine.at_rest(state, drawn)
    return state, Drafting(drafting.cache, *counters), drawn


def _propose(
    draft: Decoder, vocab_size: int, state: State, drafting: Drafting, rows: Sampler, plan: Plan, ahead: int
) -> tuple[Int[Array, "B ahead"], Cache]:
    """The draft's tokens after each row's last one, and its cache, which has seen all of them but the last."""
    batch = jnp.arange(state.tokens.shape[0])

    def chosen(x: Float[Array, "B 1 D"], i: jax.Array, seen: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        token = sampling.sample(_fitted(draft.logits(x[:, 0]), vocab_size), rows, plan, state.steps + i, seen)
        return token, None if seen is None else seen.at[batch, token].set(True)

    waiting = state.cache.lengths + 1 - drafting.cache.lengths  # 1 or 2 tokens
    column = jnp.arange(2, dtype=jnp.int32)[None, :]
    is_real = (column < waiting[:, None]) & ~state.is_done[:, None]
    first = jnp.where(waiting == 2, drafting.previous, state.tokens)
    where = Places(jnp.where(is_real, drafting.cache.lengths[:, None] + column, -1))
    tokens = jnp.stack([first, state.tokens], axis=1)
    x, cache = draft.hidden(tokens, where, drafting.cache, last=waiting - 1)
    assert cache is not None
    token, seen = chosen(x, jnp.int32(0), state.seen)
    proposal = jnp.zeros((len(batch), ahead), jnp.int32).at[:, 0].set(token)

    def step(i: jax.Array, carry: tuple[Cache, jax.Array, jax.Array | None]) -> tuple[Cache, jax.Array, Any]:
        cache, proposal, seen = carry
        token = jax.lax.dynamic_slice_in_dim(proposal, i - 1, 1, axis=1)
        where = Places(jnp.where(state.is_done, -1, cache.lengths)[:, None])
        x, after = draft.hidden(token, where, cache)
        assert after is not None
        token, seen = chosen(x, i, seen)
        return after, jax.lax.dynamic_update_slice_in_dim(proposal, token[:, None], i, axis=1), seen

    cache, proposal, _ = jax.lax.fori_loop(1, ahead, step, (cache, proposal, seen))
    return proposal, cache


def _fitted(logits: Float[Array, "B U"], vocab_size: int) -> Float[Array, "B V"]:
    """Of a table padded otherwise than the model's: rows that one of them lacks stand for no token."""
    logits = logits[:, :vocab_size]
    return jnp.pad(logits, [(0, 0), (0, vocab_size - logits.shape[1])], constant_values=-jnp.inf)


def _check(
    model: Model,
    state: State,
    previous: Int[Array, " B"],
    proposal: Int[Array, "B ahead"],
    rows: Sampler,
    limits: Limits,
    plan: Plan,
) -> tuple[State, Drawn, Int[Array, " B"], Int[Array, " B"]]:
    """What the model draws after each row's last token and after each draft, as long as they agree: the state, the
    columns drawn, the token before each row's last, and how many drafts were kept.
    """
    lengths, end = state.cache.lengths, jnp.full_like(previous, -1)
    block = jnp.concatenate([state.tokens[:, None], proposal], axis=1)
    column = jnp.arange(block.shape[1], dtype=jnp.int32)[None, :]
    where = Places(jnp.where(state.is_done[:, None], -1, lengths[:, None] + column))
    x, cache = model.hidden(block, where, state.cache)
    assert cache is not None

    def one(carry: tuple[State, jax.Array, jax.Array, jax.Array], inputs: tuple[jax.Array, jax.Array]):
        state, is_on, previous, accepted = carry
        logits, wanted = inputs
        after, drawn = engine.draw(logits, replace(state, is_done=~is_on), rows, limits, plan)
        is_end, is_kept = is_on & after.is_done, is_on & (after.tokens == wanted)
        previous = jnp.where(is_on, state.tokens, previous)
        after = replace(after, is_done=state.is_done | is_end)
        return (after, is_kept & ~is_end, previous, accepted + is_kept), drawn

    start = (replace(state, cache=Cache((), lengths)), ~state.is_done, previous, jnp.zeros_like(previous))
    columns = jnp.moveaxis(engine.logits_at(model, x, where.positions), 1, 0), jnp.column_stack([proposal, end]).T
    (after, _, previous, accepted), each = jax.lax.scan(one, start, columns)
    counts = jnp.sum(each.counts, axis=0, dtype=jnp.int32)
    drawn = jax.tree.map(lambda values: jnp.moveaxis(values[:, :, 0], 0, 1), replace(each, counts=None))
    after = replace(after, cache=Cache(cache.layers, lengths + counts))
    return after, replace(drawn, counts=counts), previous, accepted


class SpeculativeSession(Session):
    """A `Session` with a draft: the same tokens, more of them for each look at the weights."""

    def __init__(self, model: Model, draft: Draft, *prompts: Any, **options: Any):
        self.draft, self.slack = draft, draft.num_tokens
        super().__init__(model, *prompts, **options)

    def _run(self) -> Iterator[list[Step]]:
        cache, _ = prefill(
            self.draft.model, self.prompts, self.capacity, self.chunk, self.draft.soft, self.draft.num_tokens
        )
        self._drafting = Drafting(cache, *(jnp.zeros((len(self.prompts),), jnp.int32) for _ in range(3)))
        yield from super()._run()

    def _decode(self, state: State, num_steps: np.int32) -> tuple[State, Drawn]:
        state, self._drafting, drawn = speculate_chunk(
            self.model, self.draft.model, state, self._drafting, self.rows, self.limits,
            num_steps, self.plan, DECODE_CHUNK, self.draft.num_tokens,
        )  # fmt: skip
        return state, drawn

    def drafts(self, row: int) -> tuple[int, int]:
        """How many tokens were drafted for a row, and how many of them the model drew too."""
        return int(self._drafting.proposed[row]), int(self._drafting.accepted[row])
