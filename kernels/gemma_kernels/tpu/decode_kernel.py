"""The kernel of `decode_attention`: copies of chunks that run ahead, and the running softmax over them."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from gemma_kernels import reference

LANES = 128
FLOOR = -1e30  # below any logit, far above MASKED: exp(MASKED - FLOOR) is 0, so a masked slot needs no second select


@dataclass(frozen=True, kw_only=True)
class Call:
    """What is known when the kernel is compiled."""

    num_rows: int  # sequences
    num_slots: int
    num_queries: int
    window: int | None
    softcap: float | None
    keys: int  # slots of a chunk
    rows: int  # sequences of a step
    buffers: int
    parts: int
    heads: int  # key heads of a group
    tile: int  # a copy starts at a multiple of this many slots

    @property
    def num_steps(self) -> int:
        return pl.cdiv(self.num_rows, self.rows)

    def chunk_start(self, index: jax.Array, part: jax.Array) -> jax.Array:
        """The first slot that is new in a part's chunk."""
        return (index * self.parts + part) * self.keys

    def copy_start(self, first: jax.Array) -> jax.Array:
        """The first slot that is copied: where chunks do not divide the cache, the last starts earlier, to be full."""
        return jnp.minimum(first, self.num_slots - self.keys) if self.num_slots % self.keys else first


@dataclass(frozen=True, kw_only=True)
class Refs:
    """The kernel's arguments. `cache` and `buffers` are k, v and with int8 their scales, in HBM and in VMEM."""

    lengths: Any
    positions: Any
    q: Any  # [rows, heads, G*T, H]
    cache: Sequence[Any]
    outs: Sequence[Any]
    buffers: Sequence[Any]  # each [buffers, rows, ...]
    arrivals: Any  # a semaphore for each buffer, row and array
    cursor: Any  # the next chunk to copy (group of rows, index), and how many were asked for and used
    peak: Any  # [rows, heads, G*T, 128]: the largest logit so far, in 128 equal lanes
    total: Any  # likewise, the sum of the weights
    out: Any  # [rows, heads, G*T, H]: the weighted sum of values


def kernel(lengths, positions, q, cache, *outs_and_scratch, call: Call):
    """One step of the grid: a group of sequences, seen by one part and group of heads."""
    *outs, scratch = outs_and_scratch
    refs = Refs(lengths=lengths, positions=positions, q=q, cache=cache, outs=outs, **scratch)
    part, group, step = (pl.program_id(axis) for axis in range(3))

    @pl.when(step == 0)
    def _():
        for i in range(4):
            refs.cursor[i] = 0
        for _ in range(call.buffers - 1):
            _issue(call, refs, part, group)

    refs.peak[...] = jnp.full_like(refs.peak, FLOOR)
    refs.total[...] = jnp.zeros_like(refs.total)
    refs.out[...] = jnp.zeros_like(refs.out)
    rows = [step * call.rows + r for r in range(call.rows)]
    asked = [_asked(call, refs, row) for row in rows]

    def chunk(index: jax.Array, _) -> None:
        _issue(call, refs, part, group)
        slot = jax.lax.rem(refs.cursor[3], call.buffers)
        _copies(call, refs, (part, group), (step, index, slot), lambda copy: copy.wait())
        first = call.chunk_start(index, part)
        for r, row in enumerate(rows):
            _clear_unused(call, refs, (slot, r), _length(call, refs, row) - call.copy_start(first))
        seen = [_seen(call, first, _length(call, refs, row), a) for row, a in zip(rows, asked, strict=True)]
        _attend(call, refs, (slot, group), seen, [first < _length(call, refs, row) for row in rows])
        refs.cursor[3] += 1

    jax.lax.fori_loop(0, _num_chunks(call, refs, step, part), chunk, None)
    _finish(refs)


def _length(call: Call, refs: Refs, row: jax.Array) -> jax.Array:
    """Tokens stored of a sequence; none of one beyond the last."""
    return jnp.where(row < call.num_rows, jnp.maximum(refs.lengths[jnp.minimum(row, call.num_rows - 1)], 0), 0)


def _num_chunks(call: Call, refs: Refs, step: jax.Array, part: jax.Array) -> jax.Array:
    """Chunks that one part reads of the longest of a step's sequences."""
    rows = range(call.rows)
    longest = functools.reduce(jnp.maximum, [_length(call, refs, step * call.rows + r) for r in rows])
    chunks = jax.lax.div(jnp.minimum(longest, call.num_slots) + call.keys - 1, call.keys)
    return jax.lax.div(chunks + call.parts - 1 - part, call.parts)


def _asked(call: Call, refs: Refs, row: jax.Array) -> jax.Array:
    """The position of each stacked query: [G*T, 1], or a scalar where there is one query."""
    row = jnp.minimum(row, call.num_rows - 1)
    if call.num_queries == 1:
        return refs.positions[row, 0]
    query = jax.lax.broadcasted_iota(jnp.int32, (refs.q.shape[2], 1), 0) % call.num_queries
    asked = jnp.full(query.shape, refs.positions[row, 0])
    for t in range(1, call.num_queries):
        asked = jnp.where(query == t, refs.positions[row, t], asked)
    return asked


def _issue(call: Call, refs: Refs, part: jax.Array, group: jax.Array) -> None:
    """Starts the copies of the next chunk that has none yet, be it of a later step."""

    def is_done(at: tuple[jax.Array, jax.Array]) -> jax.Array:
        return (at[0] < call.num_steps) & (at[1] >= _num_chunks(call, refs, at[0], part))

    step, index = jax.lax.while_loop(is_done, lambda at: (at[0] + 1, 0), (refs.cursor[0], refs.cursor[1]))
    refs.cursor[0], refs.cursor[1] = step, index + 1

    @pl.when(step < call.num_steps)
    def _():
        slot = jax.lax.rem(refs.cursor[2], call.buffers)
        _copies(call, refs, (part, group), (step, index, slot), lambda copy: copy.start())
        refs.cursor[2] += 1


def _copies(call: Call, refs: Refs, share: tuple, where: tuple, act: Callable) -> None:
    """Starts, or waits for, the copies of one chunk from HBM to a buffer; sequences that end before it have none."""
    (part, group), (step, index, slot) = share, where
    first = call.chunk_start(index, part)
    slots = pl.ds(pl.multiple_of(call.copy_start(first), call.tile), call.keys)
    heads = pl.ds(group * call.heads, call.heads)

    def copy_row(row: jax.Array, r: int) -> None:
        sources = [x.at[row, heads, slots] for x in refs.cache[:2]] + [x.at[row, :, slots] for x in refs.cache[2:]]
        for i, (source, buffer) in enumerate(zip(sources, refs.buffers, strict=True)):
            act(pltpu.make_async_copy(source, buffer.at[slot, r], refs.arrivals.at[slot, r, i]))

    for r in range(call.rows):
        row = step * call.rows + r
        if call.rows == 1:
            copy_row(row, r)
        else:
            pl.when(first < _length(call, refs, row))(functools.partial(copy_row, row, r))


def _clear_unused(call: Call, refs: Refs, where: tuple, used: jax.Array) -> None:
    """Zeroes the values in a chunk's slots from `used` on, which nothing was stored in: 0 times NaN is NaN."""
    values = refs.buffers[1].at[*where]

    @pl.when((used > 0) & (used < call.keys))
    def _():
        slot = jax.lax.broadcasted_iota(jnp.int32, values.shape[1:], 0)
        for head in range(call.heads):
            values[head] = jnp.where(slot < used, values[head], jnp.zeros_like(values[head]))


def _seen(call: Call, first: jax.Array, length: jax.Array, asked: jax.Array) -> jax.Array:
    """Which slots of a chunk each stacked query sees, [G*T or 1, keys]: `reference.decode_mask`."""
    start = call.copy_start(first)
    slot = jax.lax.broadcasted_iota(jnp.int32, (1, call.keys), 1) + start
    newest = jax.lax.rem(length - 1, call.num_slots)
    held = slot + (length - 1 - newest) - jnp.where(slot > newest, call.num_slots, 0)
    distance = asked - held
    seen = (distance >= 0) & (held >= 0) & (asked >= 0) & (first < length)
    if call.window is not None:
        seen &= distance < call.window
    return seen if start is first else seen & (slot >= first)


def _attend(call: Call, refs: Refs, where: tuple, seen: Sequence[jax.Array], has_chunk: Sequence[jax.Array]) -> None:
    """Adds one chunk to the running softmax of every sequence and head.

    The matrix unit works in program order, so a head's second product must not stand between it and the next heads'
    first ones: it waits for a softmax. Hence all first products, then all second ones.
    """
    slot, group = where
    k, v, *scales = (buffer.at[slot] for buffer in refs.buffers)
    units = [(r, head) for r in range(call.rows) for head in range(call.heads)]
    # One product runs on one matrix unit; a lone head's second product is cut in two, to use two of them.
    half = call.keys // 2
    is_cut = len(units) == 1 and half % LANES == 0
    spans = [slice(0, half), slice(half, call.keys)] if is_cut else [slice(0, call.keys)]

    def scale(of: int, r: int, head: int) -> jax.Array:
        every = scales[of].shape[1]
        rows = [scales[of][r, pl.ds(h, 1), :].astype(jnp.float32) for h in range(head, every, call.heads)]
        # A row of packed bfloat16 can only be picked by a number known when compiling.
        return functools.reduce(lambda one, g: jnp.where(group == g, rows[g], one), range(1, len(rows)), rows[0])

    weights, shrinks = [], []
    for r, head in units:
        logits = _product(refs.q[r, head], k[r, head], 1)
        logits = logits * scale(0, r, head) if scales else logits
        logits = jnp.where(seen[r], reference.capped(logits, call.softcap), reference.MASKED)
        old = refs.peak[r, head]
        peak = jnp.maximum(old, jnp.max(logits, axis=1, keepdims=True))
        weights.append(jnp.exp(logits - _widened(peak, call.keys)))
        shrinks.append(jnp.exp(old - peak))
        refs.peak[r, head] = peak
    for (r, head), weight, shrink in zip(units, weights, shrinks, strict=True):
        refs.total[r, head] = refs.total[r, head] * shrink + jnp.sum(weight, axis=1, keepdims=True)
        weight = jnp.where(seen[r], weight * scale(1, r, head), 0.0) if scales else weight
        refs.out[r, head] *= _widened(shrink, refs.out.shape[-1])
        for part in spans:
            added = _product(weight[:, part].astype(refs.q.dtype), v[r, head, part], 0)
            if call.rows > 1:  # nothing was copied for a sequence that has ended: any bits may be there
                added = jnp.where(has_chunk[r], added, 0.0)
            refs.out[r, head] += added


def _product(rows: jax.Array, block: jax.Array, axis: int) -> jax.Array:
    """rows times a chunk, summed over the chunk's `axis`."""
    precision = jax.lax.Precision.HIGHEST if rows.dtype == jnp.float32 else None
    dims = (((1,), (axis,)), ((), ()))
    block = block.astype(rows.dtype)
    return jax.lax.dot_general(rows, block, dims, precision=precision, preferred_element_type=jnp.float32)


def _widened(x: jax.Array, width: int) -> jax.Array:
    """`x`, whose 128 lanes are equal, in as many lanes as wanted: whole registers named again, which moves nothing."""
    return x[..., :1] if width % LANES else jnp.concatenate([x] * (width // LANES), axis=-1)


def _finish(refs: Refs) -> None:
    """Divides by the softmax's sum."""
    total = refs.total[...]
    safe = jnp.where(total > 0, total, 1.0)
    refs.outs[0][...] = (refs.out[...] / _widened(safe, refs.out.shape[-1])).astype(refs.outs[0].dtype)
    if len(refs.outs) > 1:
        refs.outs[1][...] = jnp.where(total > 0, refs.peak[...] + jnp.log(safe), reference.MASKED)
