"""Tokens in, tokens out: bucketed chunked prefill, then one compiled loop for decoding.

Python is entered once for each chunk of tokens, never per token. Rows of a batch stand right-padded: row b's next
token has position `cache.lengths[b]`, so unequal prompts share one program and no row sees another's padding.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gemma_jax.configs.config import VisionConfig
from gemma_jax.generate import sampling
from gemma_jax.generate.checks import check_prompts
from gemma_jax.generate.sampling import Plan, Sampler, SamplingParams
from gemma_jax.nn import logical
from gemma_jax.nn.cache import Cache, capacity_bucket, empty_cache
from gemma_jax.nn.decoder import Decoder, Inserted
from gemma_jax.nn.edited import Edited
from gemma_jax.nn.masks import Places

PREFILL_CHUNK = 512  # tokens a row taken at once; the score matrix is at most chunk x (window + chunk)
SPREAD_CHUNK = 8192  # ... by each device, where several share a row: what they hold of each other's ffws travels once
SMALLEST_CHUNK = 16
DECODE_CHUNK = 32  # tokens between two looks from Python
MAX_STOP_IDS = 8
Model = Decoder | Edited


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """A batch in the middle of decoding; donated to each chunk and given back by it."""

    cache: Cache
    tokens: jax.Array  # int32 [B], drawn last and not yet in the cache
    steps: jax.Array  # int32 [B], tokens drawn so far
    is_done: jax.Array  # bool [B]
    seen: jax.Array | None  # bool [B, V], tokens of prompt and answer; None unless a repetition penalty asks for them


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Limits:
    """When a row ends."""

    steps: jax.Array  # int32 [B], tokens to draw at most
    stop_ids: jax.Array  # int32 [B, MAX_STOP_IDS], ended by any of these; -1 is none


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Drawn:
    """Tokens of some steps: n columns, of which a row's first `counts` are real."""

    tokens: jax.Array  # int32 [B, n]
    counts: jax.Array  # int32 [B]
    logprobs: jax.Array | None = None  # float32 [B, n]
    top_logprobs: jax.Array | None = None  # float32 [B, n, k]
    top_ids: jax.Array | None = None  # int32 [B, n, k]


@functools.partial(jax.jit, static_argnames="is_first", donate_argnames=("cache", "last"))
def prefill_chunk(
    model: Model,
    tokens: Int[Array, "B T"],
    counts: Int[Array, " B"],
    cache: Cache,
    last: Float[Array, "B D"],
    is_first: bool,
    inserted: Inserted | None = None,
) -> tuple[Cache, Float[Array, "B D"]]:
    """Adds the first `counts` tokens of each row to the cache; `last` keeps each row's newest hidden vector."""
    column = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
    positions = jnp.where(column < counts[:, None], cache.lengths[:, None] + column, -1)
    where = Places(positions, is_dense=True)
    if inserted is not None and isinstance(model.config.vision, VisionConfig):
        where = replace(where, blocks=inserted.blocks(model.config.vision.num_soft_tokens))
    newest = jnp.maximum(counts - 1, 0)
    x, cache_after = model.hidden(tokens, where, cache, inserted=inserted, is_cache_empty=is_first, last=newest)
    assert cache_after is not None
    return cache_after, jnp.where((counts > 0)[:, None], x[:, 0], last)


@functools.partial(jax.jit, static_argnames="plan", donate_argnames="cache")
def first_token(
    model: Model,
    last: Float[Array, "B D"],
    cache: Cache,
    seen: jax.Array | None,
    rows: Sampler,
    limits: Limits,
    plan: Plan,
) -> tuple[State, Drawn]:
    """Draws the token after the prompt."""
    batch = last.shape[0]
    idle = jnp.zeros((batch,), jnp.int32)
    state = State(cache, idle, idle, limits.steps <= 0, seen)
    logits = logits_at(model, last[:, None], cache.lengths[:, None] - 1)[:, 0]
    return at_rest(*draw(logits, state, rows, limits, plan))


def at_rest(state: State, drawn: Drawn) -> tuple[State, Drawn]:
    """What a program gives back, lying as each of them does on a mesh: so the next one is not compiled for another
    place, and every process can read what was drawn.
    """
    tokens, steps, is_done, drawn = logical.replicated((state.tokens, state.steps, state.is_done, drawn))
    seen = None if state.seen is None else logical.constrain(state.seen, "batch", "act_vocab")
    return State(state.cache, tokens, steps, is_done, seen), drawn


@functools.partial(jax.jit, static_argnames=("plan", "size"), donate_argnames="state")
def decode_chunk(
    model: Model, state: State, rows: Sampler, limits: Limits, num_steps: Int[Array, ""], plan: Plan, size: int
) -> tuple[State, Drawn]:
    """Draws up to `num_steps` tokens a row, at most `size`, in one loop that ends early once all rows are done."""

    def more(carry: tuple[jax.Array, State, Drawn]) -> jax.Array:
        i, state, _ = carry
        return (i < num_steps) & ~jnp.all(state.is_done)

    def step(carry: tuple[jax.Array, State, Drawn]) -> tuple[jax.Array, State, Drawn]:
        i, state, sofar = carry
        state, drawn = decode_step(model, state, rows, limits, plan)

        def put(buffer: jax.Array, new: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(buffer, new, i, axis=1)

        return i + 1, state, joined(sofar, drawn, put)

    start = (jnp.int32(0), state, none_drawn(state.tokens.shape[0], size, plan))
    _, state, drawn = jax.lax.while_loop(more, step, start)
    return at_rest(state, drawn)


def decode_step(model: Model, state: State, rows: Sampler, limits: Limits, plan: Plan) -> tuple[State, Drawn]:
    """Takes each row's last token in and draws the next."""
    positions = jnp.where(state.is_done, -1, state.cache.lengths)[:, None]
    x, cache = model.hidden(state.tokens[:, None], Places(positions), state.cache)
    assert cache is not None
    state = State(cache, state.tokens, state.steps, state.is_done, state.seen)
    # the cache now ends with the token whose vector `x` is
    logits = logits_at(model, x, cache.lengths[:, None] - 1)[:, 0]
    return draw(logits, state, rows, limits, plan)


def joined(before: Drawn, new: Drawn, put: Callable[[jax.Array, jax.Array], jax.Array]) -> Drawn:
    """Adds new columns to those before; `put` says where an array's new ones go."""
    buffers = [[drawn.tokens, drawn.logprobs, drawn.top_logprobs, drawn.top_ids] for drawn in (before, new)]
    tokens, *others = (jax.tree.map(put, *pair) for pair in zip(*buffers, strict=True))
    return Drawn(tokens, before.counts + new.counts, *others)


def none_drawn(batch: int, size: int, plan: Plan) -> Drawn:
    """`size` columns to be filled."""
    tokens, counts = jnp.zeros((batch, size), jnp.int32), jnp.zeros((batch,), jnp.int32)
    if plan.num_logprobs is None:
        return Drawn(tokens, counts)
    shape = (batch, size, plan.num_logprobs)
    return Drawn(tokens, counts, jnp.zeros((batch, size)), jnp.zeros(shape), jnp.zeros(shape, jnp.int32))


def logits_at(model: Model, x: Float[Array, "B T D"], positions: Int[Array, "B T"]) -> Float[Array, "B T V"]:
    """Logits of hidden vectors, which edits may change by their positions."""
    return model.logits(x) if isinstance(model, Decoder) else model.logits_at(x, positions)


def draw(logits: Float[Array, "B V"], state: State, rows: Sampler, limits: Limits, plan: Plan) -> tuple[State, Drawn]:
    """One token a row; rows that are done stay as they are."""
    tokens = sampling.sample(logits, rows, plan, state.steps, state.seen)
    tokens = jnp.where(state.is_done, state.tokens, tokens)
    steps = state.steps + ~state.is_done
    is_stop = jnp.any(tokens[:, None] == limits.stop_ids, axis=1)
    seen = state.seen
    if seen is not None:
        seen = seen.at[jnp.arange(tokens.shape[0]), tokens].set(True)
    is_done = state.is_done | is_stop | (steps >= limits.steps)
    tokens, steps, is_done, counts = logical.replicated((tokens, steps, is_done, (~state.is_done).astype(jnp.int32)))
    after, drawn = State(state.cache, tokens, steps, is_done, seen), Drawn(tokens[:, None], counts)
    if plan.num_logprobs is not None:
        chosen, best, ids = sampling.logprobs(logits, tokens, plan.num_logprobs)
        others = logical.replicated((chosen[:, None], best[:, None], ids[:, None]))
        drawn = Drawn(drawn.tokens, drawn.counts, *others)
    return after, drawn


def chunk_sizes(length: int, chunk: int | None = None) -> list[int]:
    """The buckets a prompt of `length` tokens is cut into: whole chunks, then powers of two, the last one padded.

    300 -> 256, 64. So every prompt is served by a handful of programs and little is computed for nothing. `chunk` is
    PREFILL_CHUNK, and where the devices of a mesh share a row SPREAD_CHUNK for each, all of which get equal parts.
    """
    devices = logical.parts("act_seq")
    chunk = chunk or (PREFILL_CHUNK if devices == 1 else SPREAD_CHUNK * devices)
    smallest = SMALLEST_CHUNK * devices
    sizes = []
    while length > 0:
        size = chunk
        while size > smallest and size > length:
            size //= 2
        if size < length < 4 * smallest and 2 * size <= chunk:
            size *= 2
        sizes.append(size)
        length -= size
    return sizes


@dataclass(frozen=True)
class Soft:
    """What stands for images and sound in a batch of prompts."""

    vectors: Float[Array, "S D"]  # all soft tokens
    index: Sequence[Int[np.ndarray, " T"]]  # of each prompt: which soft token stands at each place, -1 for a token
    block: int | None = None  # so many in a row see each other (the tokens of a Gemma 3 image); None: all are causal

    def whole(self, row: int, start: int, count: int) -> int:
        """As many of `count` tokens from `start` on as end with no block cut in two: its tokens see each other."""
        index, stop, size = self.index[row], start + count, self.block
        if size is None or stop >= len(index) or index[stop] < 0 or index[stop] % size == 0:
            return count
        return count - int(index[stop] % size)

    def inserted(self, starts: Sequence[int], size: int) -> Inserted:
        """The places of a chunk of `size` columns, where each row begins at its own start."""
        index = np.full((len(starts), size), -1, np.int32)
        for row, start in enumerate(starts):
            part = self.index[row][start : start + size]
            index[row, : len(part)] = part
        return Inserted(self.vectors, jnp.asarray(index))


def prefill(
    model: Model,
    prompts: Sequence[Sequence[int]],
    capacity: int,
    chunk: int | None = None,
    soft: Soft | None = None,
    slack: int = 0,
) -> tuple[Cache, Float[Array, "B D"]]:
    """The cache of `capacity` slots that has seen the prompts, and the last hidden vector of each.

    A chunk never ends within a block: a row whose block would be cut takes fewer tokens, and a chunk holds a block.
    `slack`: see `slot_counts`.
    """
    starts = [0] * len(prompts)
    smallest = 1 if soft is None or soft.block is None else 2 ** math.ceil(math.log2(soft.block))
    dtype = model.final_norm.scale.dtype
    cache = empty_cache(model.config, len(prompts), capacity, dtype, slack)
    last = jnp.zeros((len(prompts), model.config.width), dtype)
    while longest := max(len(prompt) - start for prompt, start in zip(prompts, starts, strict=True)):
        size = max(chunk_sizes(longest, chunk)[0], smallest)
        counts = [min(len(prompt) - start, size) for prompt, start in zip(prompts, starts, strict=True)]
        if soft is not None:
            counts = [soft.whole(row, *part) for row, part in enumerate(zip(starts, counts, strict=True))]
        tokens = np.zeros((len(prompts), size), np.int32)
        for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
            tokens[row, :count] = prompts[row][start : start + count]
        inserted = None if soft is None else soft.inserted(starts, size)
        numbers = np.asarray(counts, np.int32)
        cache, last = prefill_chunk(model, tokens, numbers, cache, last, not any(starts), inserted)
        starts = [start + count for start, count in zip(starts, counts, strict=True)]
    return cache, last


@jax.jit
def _chosen_logits(model: Decoder, last: Float[Array, "B D"], ids: Int[Array, " n"]) -> Float[Array, "B n"]:
    return logical.replicated(model.logits(last)[:, ids])


def next_logits(
    model: Decoder, prompts: Sequence[Sequence[int]], ids: Sequence[int], soft: Soft | None = None
) -> Float[np.ndarray, "B n"]:
    """Logits of some ids for the token after each prompt, float32. Raises ValueError as `Session` does."""
    check_prompts(model.config, prompts)
    capacity = capacity_bucket(max(map(len, prompts)))
    _, last = prefill(model, prompts, capacity, soft=soft)
    return np.asarray(_chosen_logits(model, last, jnp.asarray(ids)))


@dataclass(frozen=True)
class Step:
    """What one chunk brought for one row, on the host."""

    tokens: list[int]
    logprobs: list[float]
    top_logprobs: list[dict[int, float]]


class Session:
    """A batch from prompt to last token. Iterate to get, chunk by chunk, a `Step` for each row.

    `finish(row)` ends a row early (a stop text was found); the others go on. `prefill_chunk`: tokens of a row taken at
    once; see `chunk_sizes`. `scope`: of the mesh that the model lies on.
    """

    slack = 0  # tokens that may be taken back

    def __init__(
        self,
        model: Model,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        stop_ids: Sequence[int],
        *,
        prefill_chunk: int | None = None,
        capacity: int | None = None,
        soft: Soft | None = None,
        scope: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    ):
        check_prompts(model.config, prompts)
        if not model.config.attention.is_causal:
            raise ValueError(
                f"{model.config.name} looks at later tokens too (attention.is_causal is False), so it continues no "
                "text; it makes embeddings"
            )
        for row in params:
            if (row.logprobs or 0) > model.config.vocab_size:
                raise ValueError(f"logprobs is {row.logprobs}, but there are only {model.config.vocab_size} tokens")
        context = model.config.context
        steps = [min(row.max_new_tokens, context - len(p) + 1) for p, row in zip(prompts, params, strict=True)]
        needed = max(len(prompt) + count - 1 for prompt, count in zip(prompts, steps, strict=True))
        if capacity is not None and capacity < needed + self.slack:
            raise ValueError(f"capacity is {capacity}; prompt and answer need {needed + self.slack} slots")
        self.model, self.prompts, self.params, self.chunk = model, prompts, params, prefill_chunk
        self.soft, self.scope = soft, scope
        self.plan = sampling.plan(params)
        self.rows = sampling.sampler(params, model.config.vocab_size)
        self.limits = Limits(jnp.asarray(steps, jnp.int32), _stop_table(params, stop_ids))
        self.capacity = capacity or capacity_bucket(needed + self.slack)
        self._ended = np.zeros(len(prompts), bool)

    def finish(self, row: int) -> None:
        """Draws no more tokens for this row."""
        self._ended[row] = True

    def __iter__(self) -> Iterator[list[Step]]:
        steps = self._run()
        while True:
            with self.scope():  # not across a yield: it is the thread's, and the caller's programs are not for the mesh
                step = next(steps, None)
            if step is None:
                return
            yield step

    def _run(self) -> Iterator[list[Step]]:
        cache, last = prefill(self.model, self.prompts, self.capacity, self.chunk, self.soft, self.slack)
        seen = self._seen() if self.plan.penalises else None
        state, drawn = first_token(self.model, last, cache, seen, self.rows, self.limits, self.plan)
        yield _steps(drawn)
        num_steps = 1  # doubled from chunk to chunk: the first words come at once, Python is entered seldom
        while True:
            state = State(state.cache, state.tokens, state.steps, state.is_done | self._ended, state.seen)
            if bool(np.all(state.is_done)):
                return
            num_steps = min(2 * num_steps, DECODE_CHUNK)
            state, drawn = self._decode(state, np.int32(num_steps))
            yield _steps(drawn)

    def _decode(self, state: State, num_steps: np.int32) -> tuple[State, Drawn]:
        return decode_chunk(self.model, state, self.rows, self.limits, num_steps, self.plan, DECODE_CHUNK)

    def _seen(self) -> jax.Array:
        seen = np.zeros((len(self.prompts), self.model.config.vocab_size), bool)
        for row, prompt in enumerate(self.prompts):
            seen[row, [token for token in prompt if token < seen.shape[1]]] = True
        return jnp.asarray(seen)


def _stop_table(params: Sequence[SamplingParams], stop_ids: Sequence[int]) -> jax.Array:
    if len(stop_ids) > MAX_STOP_IDS:
        raise ValueError(f"{len(stop_ids)} stop ids were given; at most {MAX_STOP_IDS} are possible")
    table = np.full((len(params), MAX_STOP_IDS), -1, np.int32)
    for row, wanted in enumerate(params):
        if not wanted.ignore_eos:
            table[row, : len(stop_ids)] = stop_ids
    return jnp.asarray(table)


def _steps(drawn: Drawn) -> list[Step]:
    host = jax.device_get(drawn)
    steps = []
    for row, count in enumerate(host.counts):
        logprobs, tops = [], []
        if host.logprobs is not None:
            logprobs = host.logprobs[row, :count].tolist()
            pairs = zip(host.top_ids[row, :count].tolist(), host.top_logprobs[row, :count].tolist(), strict=True)
            tops = [dict(zip(ids, values, strict=True)) for ids, values in pairs]
        steps.append(Step(host.tokens[row, :count].tolist(), logprobs, tops))
    return steps
