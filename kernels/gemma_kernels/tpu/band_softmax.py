"""What one step of the forward of a banded attention computes: the softmax of a block of queries over blocks of keys.

A softmax needs a number to subtract from its logits before exp, so that nothing overflows. The usual one is the largest
logit, the peak, which makes every logit wait until all are known, in memory. Here it is the largest logit next to the
diagonal, each query's own key among them. That is the same softmax, until another logit exceeds it by SAFE; a sum tells
when that happened, and `exact` then does those rows again, with the true peak.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float

from gemma_kernels.reference import MASKED
from gemma_kernels.tpu import band as bands
from gemma_kernels.tpu.band import LANES, Band, BandBlocks, Block, Ids

LOG2_E = math.log2(math.e)
FLOOR = MASKED / 2  # no peak is lower: the weights of a row that has seen nothing are exp2(MASKED - FLOOR) = 0
SAFE = 2.0**64  # the sum of weights above which their product with v may overflow float32
PIECE = 256  # queries and keys of a part of a step: the width of the widest MXU


@dataclass(frozen=True)
class Plan:
    """What is fixed of one call.

    slots: blocks of keys in one step of the window's kernel, or steps per block of queries of the streaming one.
    leads: least and most columns from the first key of a block of queries' window to its first query.
    """

    band: Band
    blocks: BandBlocks
    num_keys: int
    num_blocks: tuple[int, int]
    slots: int
    leads: tuple[int, int]
    precision: jax.lax.Precision | None

    @property
    def plain_slots(self) -> int:
        """Blocks of keys that a block of queries may see without a span."""
        return (self.leads[1] + self.blocks.block_q - 1) // self.blocks.block_kv + 1


class Scalars(NamedTuple):
    """Integers a kernel knows before it starts, flat: columns one per row, others one (extents FIELDS) per block.

    first, last: blocks of keys a block of queries reaches; the first of a window may lie before column 0.
    """

    columns: Any
    first: Any
    last: Any
    is_plain: Any
    queries: Any
    keys: Any


class Place(NamedTuple):
    """Where a step stands: the row of the batch, the entry of its block of queries, and the keys this block reaches."""

    row: Any
    entry: Any
    query: Block
    first: Any
    last: Any


class Refs(NamedTuple):
    """What a step reads, writes, and remembers of each row: peak, sum of weights, whether unsafe, sum of values."""

    q: Any
    k: Any
    v: Any
    query_ids: Ids
    key_ids: Ids
    out: Any
    log_sum: Any
    peak: Any
    total: Any
    unsafe: Any
    sums: Any
    is_unsafe: Any


class Part(NamedTuple):
    """Keys that are taken together: where in the step's they lie, their mask (None: all seen), if they set the peak."""

    keys: Any
    mask: Callable[[], Array] | None
    is_peak: bool


def kernel(plan: Plan, has_ids: tuple[bool, bool], is_window: bool, *refs: Any) -> None:
    """Names the arguments of a step, and takes it."""
    scalars, inputs, rest = Scalars(*refs[:6]), refs[6:9], list(refs[9:])
    ids = [Ids(*(rest.pop(0) if has else None for has in has_ids)) for _ in range(2)]
    row, index = pl.program_id(0), pl.program_id(2)
    entry = row * plan.num_blocks[0] + index
    query = bands.block_at(index, plan.blocks.block_q, scalars.columns[row], scalars.queries, entry)
    place = Place(row, entry, query, scalars.first[entry], scalars.last[entry])
    (window_step if is_window else stream_step)(plan, scalars, place, Refs(*inputs, *ids, *rest))


def window_step(plan: Plan, scalars: Scalars, place: Place, refs: Refs) -> None:
    """One block of queries against all its keys."""
    is_plain = scalars.is_plain[place.entry] > 0
    start = jnp.clip(place.first, 0, plan.num_blocks[1] - plan.slots)
    refs.is_unsafe[0] = 0
    if plan.plain_slots <= plan.slots:
        pl.when(is_plain)(lambda: plain_window(plan, refs, place))
    pl.when(jnp.logical_not(is_plain))(lambda: masked_window(plan, refs, place, start))

    @pl.when(refs.is_unsafe[0] > 0)
    def _():
        begin(refs)
        low, stop = jnp.maximum(place.first, 0), place.last + 1
        jax.lax.fori_loop(low, stop, lambda index, _: exact(plan, refs, place, index, index - start), None)
        finish(refs)


def stream_step(plan: Plan, scalars: Scalars, place: Place, refs: Refs) -> None:
    """One block of queries against one block of keys, from the last, where each query has its own key, to the first."""
    band, step = plan.band, pl.program_id(3)
    index = place.last - step
    entry = place.row * plan.num_blocks[1] + jnp.maximum(index, 0)
    key = bands.block_at(index, plan.blocks.block_kv, 0, scalars.keys, entry)
    is_seen = (index >= place.first) & bands.any_seen(band, place.query, key)
    is_whole = bands.all_seen(band, place.query, key, plan.num_keys)
    is_diagonal = (step == 0) & bands.is_diagonal(band, plan.blocks, place.query, key, plan.num_keys)
    pl.when((step == 0) & jnp.logical_not(is_diagonal))(lambda: begin(refs))
    has_peak = is_seen & jnp.logical_not(is_diagonal) & (refs.is_unsafe[0] == 0)
    pl.when(has_peak & is_whole)(lambda: loose(plan, refs, place, index, is_masked=False))
    pl.when(has_peak & jnp.logical_not(is_whole))(lambda: loose(plan, refs, place, index, is_masked=True))
    if plan.blocks.block_q == plan.blocks.block_kv:
        pl.when(is_diagonal)(lambda: diagonal(plan, refs))

    @pl.when(is_seen & (refs.is_unsafe[0] > 0))
    def _():
        exact(plan, refs, place, index, 0)
        refs.is_unsafe[0] = 0

    pl.when(step == plan.slots - 1)(lambda: finish(refs))


def plain_window(plan: Plan, refs: Refs, place: Place) -> None:
    """A window that nothing but its two edges cuts: most blocks of keys need no mask."""
    block, size, window = plan.blocks.block_kv, chunk_size(plan.blocks), plan.band.window
    low, high = plan.leads
    lead = low if low == high else place.query.first - place.first * block
    distance = jax.lax.broadcasted_iota(jnp.int32, (size, block), 0)
    distance -= jax.lax.broadcasted_iota(jnp.int32, (size, block), 1)

    def mask(slot):
        shift = lead - slot * block
        edges = []
        if size - 1 + high - slot * block >= window:
            edges.append(distance < window - shift)
        if is_own(plan, slot):
            edges.append(distance >= -shift)
        return (lambda: functools.reduce(jnp.logical_and, edges)) if edges else None

    for index in range(plan.blocks.block_q // size):
        slots = range((high + size - 1) // block, -1, -1)
        parts = [Part(pl.ds((index + slot) * block, block), mask(slot), is_own(plan, slot)) for slot in slots]
        write(refs, pl.ds(index * size, size), *checked(refs, weigh(plan, refs, pl.ds(index * size, size), parts)))


def masked_window(plan: Plan, refs: Refs, place: Place, start: Array) -> None:
    """Any window. `start` is the block of its first key that is there: none is before column 0."""
    block, size = plan.blocks.block_kv, chunk_size(plan.blocks)

    def chunk(index, _):
        here = pl.ds(pl.multiple_of(index * size, LANES), size)
        queries = query_ids(refs, here)

        def part(slot):
            natural = place.first + index + slot
            held = jnp.clip(natural - start, 0, plan.slots - 1)
            keys = pl.ds(pl.multiple_of(held * block, LANES), block)
            # In place of a block before column 0 another one is held: it goes where no query looks.
            columns = place.query.first + index * size, jnp.where(natural < 0, plan.num_keys, natural * block)
            ids = queries, key_ids(refs, keys)
            mask = functools.partial(bands.seen_mask, plan.band, (size, block), 0, columns, plan.num_keys, ids)
            return Part(keys, mask, is_own(plan, slot))

        slots = range((plan.leads[1] + size - 1 + plan.band.ahead) // block, -1, -1)
        write(refs, here, *checked(refs, weigh(plan, refs, here, [part(slot) for slot in slots])))

    jax.lax.fori_loop(0, plan.blocks.block_q // size, chunk, None)


def chunk_size(blocks: BandBlocks) -> int:
    """Queries of a window's step that share a softmax: fewer see fewer keys outside the band."""
    return blocks.block_q if blocks.block_q % blocks.block_kv else blocks.block_kv


def is_own(plan: Plan, slot: int) -> bool:
    """Whether a slot of a chunk's window may hold keys in the columns of its queries, or later ones."""
    return plan.leads[0] - slot * plan.blocks.block_kv < plan.blocks.block_kv - 1


def diagonal(plan: Plan, refs: Refs) -> None:
    """The first block of a stream, where its queries stand in the columns of its keys, and only that cuts it."""
    size = math.gcd(plan.blocks.block_q, PIECE)
    ordered = jax.lax.broadcasted_iota(jnp.int32, (size, size), 0) >= jax.lax.broadcasted_iota(
        jnp.int32, (size, size), 1
    )
    refs.is_unsafe[0] = 0
    for index in range(plan.blocks.block_q // size):
        here = pl.ds(index * size, size)
        parts = [Part(pl.ds(i * size, size), None, False) for i in range(index)]
        sums, total, peak = checked(refs, weigh(plan, refs, here, [Part(here, lambda: ordered, True), *parts]))
        keep(refs.peak, here, peak)
        keep(refs.total, here, total)
        keep(refs.sums, here, sums)
    pl.when(refs.is_unsafe[0] > 0)(lambda: begin(refs))


def loose(plan: Plan, refs: Refs, place: Place, index: Array, is_masked: bool) -> None:
    """Adds the keys of block `index` under the peak of earlier keys; rows where that is unsafe stay as they are."""
    blocks = plan.blocks
    size, piece = math.gcd(blocks.block_q, PIECE), math.gcd(blocks.block_kv, PIECE)
    refs.is_unsafe[0] = 0

    def chunk(i, _):
        here = pl.ds(pl.multiple_of(i * size, LANES), size)
        queries = query_ids(refs, here) if is_masked else Ids()

        def part(slot):
            keys = pl.ds(slot * piece, piece)
            columns = place.query.first + i * size, index * blocks.block_kv + slot * piece
            ids = queries, key_ids(refs, keys)
            mask = functools.partial(bands.seen_mask, plan.band, (size, piece), 0, columns, plan.num_keys, ids)
            return Part(keys, mask if is_masked else None, False)

        parts = [part(slot) for slot in range(blocks.block_kv // piece)]
        sums, total, _ = checked(refs, weigh(plan, refs, here, parts, flat(refs.peak[:, here])[:, :1]))
        is_safe = total < SAFE
        keep(refs.unsafe, here, jnp.where(is_safe, 0.0, 1.0))
        keep(refs.total, here, flat(refs.total[:, here]) + jnp.where(is_safe, total, 0.0))
        keep(refs.sums, here, flat(refs.sums[:, here]) + jnp.where(is_safe, sums, 0.0))

    count = blocks.block_q // size
    jax.lax.fori_loop(0, count, chunk, None, unroll=1 if count % 2 else 2)  # two at once keep the MXU busier


def exact(plan: Plan, refs: Refs, place: Place, index: Array, slot: Any) -> None:
    """Adds the keys of block `index`, in `slot` of the step, to unsafe rows: older sums shrink as their peak grows."""
    size, block = math.gcd(plan.blocks.block_q, PIECE), plan.blocks.block_kv
    keys = pl.ds(pl.multiple_of(slot * block, LANES), block)

    def chunk(i, _):
        here = pl.ds(pl.multiple_of(i * size, LANES), size)
        columns, ids = (place.query.first + i * size, index * block), (query_ids(refs, here), key_ids(refs, keys))
        seen = bands.seen_mask(plan.band, (size, block), 0, columns, plan.num_keys, ids)
        logits = logits_of(plan, flat(refs.q[0, :, here]), refs.k[0, 0, keys])
        logits = masked(logits, seen[None] & (refs.unsafe[:, here, :1] > 0))
        before = flat(refs.peak[:, here])
        peak = jnp.maximum(before, logits.max(-1, keepdims=True))
        weights = jnp.exp2(logits - jnp.maximum(peak, FLOOR)[:, :1])
        decay = jnp.exp2(before - peak)
        keep(refs.peak, here, peak)
        keep(refs.total, here, flat(refs.total[:, here]) * decay + weights.sum(-1, keepdims=True))
        keep(refs.sums, here, flat(refs.sums[:, here]) * decay[:, :1] + product(plan, weights, refs.v[0, 0, keys]))

    jax.lax.fori_loop(0, plan.blocks.block_q // size, chunk, None)


def weigh(
    plan: Plan, refs: Refs, here: Any, parts: list[Part], peak: Array | None = None
) -> tuple[Array, Array, Array]:
    """Weighted sums of values of the queries `here`, sums of their weights, and the peak, in bits, these are under."""
    q = flat(refs.q[0, :, here])

    def logits_at(part):
        logits = logits_of(plan, q, refs.k[0, 0, part.keys])
        return logits if part.mask is None else masked(logits, part.mask()[None])

    known = {i: logits_at(part) for i, part in enumerate(parts) if part.is_peak}
    if peak is None:
        peak = functools.reduce(jnp.maximum, known.values()).max(-1, keepdims=True)
    peak = jnp.maximum(peak, FLOOR)
    # Part by part, and not all logits first: what is multiplied need not leave the registers in between.
    totals, sums = [], []
    for i, part in enumerate(parts):
        weights = jnp.exp2((known[i] if i in known else logits_at(part)) - peak)
        totals.append(weights)
        sums.append(product(plan, weights, refs.v[0, 0, part.keys]))
    return functools.reduce(jnp.add, sums), functools.reduce(jnp.add, totals).sum(-1, keepdims=True), peak


def checked(refs: Refs, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    """The sums, after noting whether any of them is unsafe, or no number."""
    refs.is_unsafe[0] |= jnp.logical_not(jnp.max(sums[1]) < SAFE).astype(jnp.int32)
    return sums


def logits_of(plan: Plan, q: Array, k: Array) -> Float[Array, "rows keys"]:
    """Logits in bits: exp2 of them is what exp of the logits is."""
    contract = (((1,), (1,)), ((), ()))
    logits = jax.lax.dot_general(q, k, contract, precision=plan.precision, preferred_element_type=jnp.float32)
    cap = plan.band.softcap
    return logits * LOG2_E if cap is None else jnp.tanh(logits * (1 / cap)) * (cap * LOG2_E)


def product(plan: Plan, weights: Array, v: Array) -> Float[Array, "rows H"]:
    return jnp.dot(weights.astype(v.dtype), v, precision=plan.precision, preferred_element_type=jnp.float32)


def masked(logits: Float[Array, "rows keys"], mask: Bool[Array, "heads T keys"]) -> Float[Array, "rows keys"]:
    """Logits of all stacked heads under a mask; one head's serves all."""
    stacked = logits.reshape(-1, *mask.shape[1:])
    return jnp.where(mask, stacked, MASKED).reshape(logits.shape)


def query_ids(refs: Refs, here: Any) -> Ids:
    """Ids down the rows of a block. They come along lanes: in HBM a column of lanes is 128 times as large."""

    def column(ids):
        along = ids[0, :, here]
        return jnp.broadcast_to(along, (LANES, along.shape[1])).T[:, :1]

    return Ids(*(None if x is None else column(x) for x in refs.query_ids))


def key_ids(refs: Refs, keys: Any) -> Ids:
    return Ids(*(None if x is None else x[0, :, keys] for x in refs.key_ids))


def flat(x: Array) -> Float[Array, "rows width"]:
    """Stacked heads as rows of one matrix."""
    return x.reshape(-1, x.shape[-1])


def keep(ref: Any, here: Any, rows: Array) -> None:
    """Stores what is known of the queries `here`: one number for a row goes into all lanes."""
    ref[:, here] = jnp.broadcast_to(rows, (rows.shape[0], ref.shape[2])).reshape(-1, here.size, ref.shape[2])


def begin(refs: Refs) -> None:
    """No row has a peak: the first keys have to be taken exactly."""
    refs.is_unsafe[0] = 1
    refs.unsafe[...] = jnp.ones(refs.unsafe.shape, jnp.float32)
    refs.peak[...] = jnp.full(refs.peak.shape, MASKED, jnp.float32)
    refs.total[...] = jnp.zeros(refs.total.shape, jnp.float32)
    refs.sums[...] = jnp.zeros(refs.sums.shape, jnp.float32)


def finish(refs: Refs) -> None:
    write(refs, pl.ds(0, refs.q.shape[2]), flat(refs.sums[...]), flat(refs.total[...]), flat(refs.peak[...]))


def write(refs: Refs, here: Any, sums: Array, total: Array, peak: Array) -> None:
    """Divides by the sum of weights; a query that saw nothing gives 0.

    The logarithms turn from rows to lanes, so that HBM holds one number for each.
    """
    divisor = jnp.where(total > 0, total, 1.0)
    shape = -1, here.size
    refs.out[0, :, here] = (sums * (1 / divisor)[:, :1]).astype(refs.out.dtype).reshape(*shape, sums.shape[1])
    log_sum = jnp.where(total > 0, peak * (1 / LOG2_E) + jnp.log(divisor), MASKED)
    log_sum = jnp.broadcast_to(log_sum, (log_sum.shape[0], LANES)).reshape(*shape, LANES)
    for head in range(log_sum.shape[0]):
        refs.log_sum[0, 0, head : head + 1, here] = log_sum[head].T[:1]
