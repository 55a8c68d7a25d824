"""Which tokens stay in the draw (top-k, top-p, min-p), and the most likely ones: without sorting a vocabulary, and on
a mesh without gathering one.

On a mesh every device has some of the logits. It sends its best CANDIDATES, which nearly always settle where the draw
ends: a value that is no smaller than any device's last candidate has all larger ones among the candidates. Else the
threshold is found bit by bit, by sums over the mesh.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from gemma_jax.nn import logical
from gemma_jax.nn.logical import Axes

MASKED = -jnp.inf
CANDIDATES = 128  # of each device
Sum = Callable[[Float[Array, "B V"]], Float[Array, " B"]]


def filtered(
    logits: Float[Array, "B V"], top_k: Int[Array, " B"], top_p: Float[Array, " B"], min_p: Float[Array, " B"]
) -> Float[Array, "B V"]:
    """Logits with all but the kept tokens at minus infinity: top-k, then top-p of what is left, then min-p."""
    rows, vocab = _lies(logits)
    if not vocab:
        return _by_bits(logits, top_k, top_p, min_p, lambda x: jnp.sum(x, axis=-1), jnp.max(logits, axis=-1))

    axes = (*logical.axes_at(rows, 0), *vocab)

    def body(logits: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array) -> jax.Array:
        def total(x: jax.Array) -> jax.Array:
            return jax.lax.psum(jnp.sum(x, axis=-1), vocab)

        least, peak, is_settled = _settled(logits, top_k, top_p, total, vocab)

        def cut() -> jax.Array:
            is_kept = (_order(logits) >= _order(least)[:, None]) & _is_likely(logits, peak, min_p)
            return jnp.where(is_kept, logits, MASKED)

        # all devices take the same branch, for the second one's sums are over several
        is_easy = jax.lax.pmin(jnp.all(is_settled).astype(jnp.int32), axes) == 1
        return jax.lax.cond(is_easy, cut, lambda: _by_bits(logits, top_k, top_p, min_p, total, peak))

    row = PartitionSpec(rows[0])
    run = jax.shard_map(body, in_specs=(rows, row, row, row), out_specs=rows, check_vma=False)
    return run(logits, top_k, top_p, min_p)


def best(logits: Float[Array, "B V"], count: int) -> tuple[Float[Array, "B n"], Int[Array, "B n"]]:
    """The `count` largest logits of each row from the largest on, and their tokens; of equal ones the lowest first."""
    rows, vocab = _lies(logits)
    if not vocab or not count:  # nothing is no array to gather
        values, ids = jax.lax.top_k(logits, count)
        return values, ids.astype(jnp.int32)

    def body(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        here = logits.shape[1]
        values, ids = jax.lax.top_k(logits, min(count, here))
        ids = ids.astype(jnp.int32) + jax.lax.axis_index(vocab) * here
        values, ids = (jax.lax.all_gather(x, vocab, axis=1, tiled=True) for x in (values, ids))
        values, place = jax.lax.top_k(values, count)
        return values, jnp.take_along_axis(ids, place, axis=1)

    whole = PartitionSpec(rows[0], None)
    return jax.shard_map(body, in_specs=rows, out_specs=(whole, whole), check_vma=False)(logits)


def _lies(logits: jax.Array) -> tuple[PartitionSpec, Axes]:
    """Where logits lie on the mesh in scope, and the axes that divide the vocabulary."""
    if logical.current() is None:
        return PartitionSpec(), ()
    rows = logical.spec(("batch", "act_vocab"), logits.shape)
    return rows, logical.axes_at(rows, 1)


def _settled(
    logits: Float[Array, "B v"], top_k: jax.Array, top_p: jax.Array, total: Sum, vocab: Axes
) -> tuple[Float[Array, " B"], Float[Array, " B"], Bool[Array, " B"]]:
    """The smallest logit that top-k and top-p keep, the largest one, and whether the candidates settle the first."""
    own, _ = jax.lax.top_k(logits, min(CANDIDATES, logits.shape[1]))
    gathered = jax.lax.all_gather(own, vocab, axis=1, tiled=True)
    values, _ = jax.lax.top_k(gathered, gathered.shape[1])
    peak, bound = values[:, :1], jax.lax.pmax(own[:, -1:], vocab)  # all that is larger than `bound` is among them

    keeps_all = (top_k >= jax.lax.axis_size(vocab) * logits.shape[1])[:, None]
    last = jnp.take_along_axis(values, jnp.clip(top_k[:, None], 1, values.shape[1]) - 1, axis=1)
    is_settled = keeps_all | ((last >= bound) & (top_k[:, None] <= values.shape[1]))
    last = jnp.where(keeps_all, MASKED, last)
    mass = total(jnp.where(logits >= last, jnp.exp(logits - peak), 0.0))
    wanted = jnp.maximum(top_p * mass, jnp.finfo(jnp.float32).tiny)[:, None]
    reached = jnp.cumsum(jnp.where(values >= last, jnp.exp(values - peak), 0.0), axis=1) >= wanted
    end = jnp.take_along_axis(values, jnp.argmax(reached, axis=1)[:, None], axis=1)
    keeps_mass = (top_p >= 1)[:, None]
    is_settled &= keeps_mass | (reached[:, -1:] & (end >= bound))
    least = jnp.where(keeps_mass, last, jnp.maximum(last, end))
    return least[:, 0], peak[:, 0], is_settled[:, 0]


def _by_bits(
    logits: Float[Array, "B V"], top_k: jax.Array, top_p: jax.Array, min_p: jax.Array, total: Sum, peak: jax.Array
) -> Float[Array, "B V"]:
    """`filtered` by thresholds; `total` sums over the whole vocabulary, whose largest logit is `peak`."""
    order = _order(logits)
    kept = order >= _threshold(order, jnp.ones_like(logits), top_k.astype(jnp.float32), total)[:, None]
    weights = jnp.where(kept, jnp.exp(logits - peak[:, None]), 0.0)
    # a top_p so small that the product is 0 keeps the best token all the same
    mass = jnp.maximum(top_p * total(weights), jnp.finfo(jnp.float32).tiny)
    keeps_mass = (top_p >= 1)[:, None]  # rounding would leave out the least likely
    kept &= keeps_mass | (order >= _threshold(order, weights, mass, total)[:, None])
    return jnp.where(kept & _is_likely(logits, peak, min_p), logits, MASKED)


def _is_likely(logits: Float[Array, "B V"], peak: Float[Array, " B"], min_p: Float[Array, " B"]) -> Bool[Array, "B V"]:
    """Whether a token is at least `min_p` times as likely as the best."""
    return jnp.exp(logits - peak[:, None]) >= min_p[:, None]


def _order(x: Float[Array, "*shape"]) -> Int[Array, "*shape"]:
    """float32 as uint32 in the same order."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(0x80000000))


def _threshold(
    order: Int[Array, "B V"], mass: Float[Array, "B V"], wanted: Float[Array, " B"], total: Sum
) -> Int[Array, " B"]:
    """The greatest value such that the entries at or above it weigh at least `wanted`, found bit by bit.

    32 sums over the vocabulary instead of a sort: no order of the whole row is needed.
    """

    def bit(i: jax.Array, least: jax.Array) -> jax.Array:
        trial = least | (jnp.uint32(1) << (jnp.uint32(31) - i.astype(jnp.uint32)))
        return jnp.where(total(jnp.where(order >= trial[:, None], mass, 0.0)) >= wanted, trial, least)

    return jax.lax.fori_loop(0, 32, bit, jnp.zeros(order.shape[:1], jnp.uint32))
