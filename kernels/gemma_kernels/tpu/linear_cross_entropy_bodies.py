"""What one step of each kernel of `linear_cross_entropy` does with the blocks that it finds in VMEM."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from gemma_kernels.reference import MASKED, capped

LANES, SUBLANES = 128, 8


def forward_kernel(
    targets: jax.Ref,
    hidden: jax.Ref,
    table: jax.Ref,
    log_sum: jax.Ref,
    chosen: jax.Ref,
    logits: jax.Ref,
    *running: jax.Ref,
    softcap: float | None,
    width: int,
    num_rows: int,
):
    """One block of logits, [vocabulary, tokens]: sums over rows need no exchange between lanes.

    The running peak, sum and target's logit are kept for each of 8 sublanes apart and joined at the end.
    """
    peak, total, target = running
    v = pl.program_id(1)

    @pl.when(v == 0)
    def _():
        peak[...] = jnp.full(peak.shape, MASKED, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        target[...] = jnp.zeros(target.shape, jnp.float32)

    _multiply(table, hidden, logits, width)
    here = targets[...] - v * logits.shape[0]
    take_in = functools.partial(_take_in, here, logits, running, softcap)
    _by_edge(v, num_rows, logits.shape[0], take_in)

    @pl.when(v == pl.num_programs(1) - 1)
    def _():
        highest = jnp.max(peak[...], axis=0, keepdims=True)
        log_sum[...] = highest + jnp.log(jnp.sum(total[...] * jnp.exp(peak[...] - highest), axis=0, keepdims=True))
        chosen[...] = jnp.sum(target[...], axis=0, keepdims=True)


def _take_in(
    targets: jax.Array, logits: jax.Ref, running: tuple[jax.Ref, ...], softcap: float | None, num_real: int
) -> None:
    """Brings a block of logits, of which `num_real` rows are real, into the running softmax; `targets` are its rows."""
    peak, total, target = running
    num_block_rows, num_tokens = logits.shape
    by_sublane = (num_block_rows // SUBLANES, SUBLANES, num_tokens)
    row = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 0)
    x = capped(logits[...], softcap)
    x = x if num_real == num_block_rows else jnp.where(row < num_real, x, MASKED)
    target[...] += jnp.sum(jnp.where(row == targets, x, 0.0).reshape(by_sublane), axis=0)
    x = x.reshape(by_sublane)
    before, now = peak[...], jnp.maximum(peak[...], jnp.max(x, axis=0))
    total[...] = total[...] * jnp.exp(before - now) + jnp.sum(jnp.exp(x - now), axis=0)
    peak[...] = now


def gradient_kernel(
    targets: jax.Ref,
    log_sum: jax.Ref,
    d_loss: jax.Ref,
    own: jax.Ref,
    other: jax.Ref,
    out: jax.Ref,
    logits: jax.Ref,
    d_logits: jax.Ref,
    total: jax.Ref,
    *,
    softcap: float | None,
    width: int,
    num_rows: int,
    axis: int,
):
    """Adds to `total` what one block of the other side sends: d_logits times that block."""
    j = pl.program_id(1)

    @pl.when(j == 0)
    def _():
        total[...] = jnp.zeros(total.shape, jnp.float32)

    _multiply(own, other, logits, width)
    here = targets[...] - pl.program_id(axis) * logits.shape[axis]

    def add(num_real: int) -> None:
        tokens = here, log_sum[...], d_loss[...]
        d_logits[...] = _logit_gradient(tokens, logits[...], softcap, axis, num_real).astype(own.dtype)
        _accumulate(d_logits, other, total, width, num_real if num_real != logits.shape[axis] else None)

    # rows of the table beyond its end matter only where rows are summed over
    _by_edge(pl.program_id(axis), num_rows if axis == 1 else 0, logits.shape[axis], add)

    @pl.when(j == pl.num_programs(1) - 1)
    def _():
        out[...] = total[...].astype(out.dtype)


def _logit_gradient(
    tokens: tuple[jax.Array, jax.Array, jax.Array], logits: jax.Array, softcap: float | None, axis: int, num_real: int
) -> jax.Array:
    """d_loss * (softmax - is_target), through the cap. `axis` is the vocabulary's, of which `num_real` are real."""
    targets, log_sum, d_loss = tokens
    num_rows = logits.shape[axis]
    row = jax.lax.broadcasted_iota(jnp.int32, logits.shape, axis)
    x = capped(logits, softcap)
    y = (jnp.exp(x - log_sum) - (row == targets).astype(jnp.float32)) * d_loss
    y = y if softcap is None else y * (1.0 - jnp.square(x / softcap))
    return y if num_real == num_rows else jnp.where(row < num_real, y, 0.0)


def _by_edge(v: jax.Array, num_rows: int, num_block_rows: int, take_in: Callable[[int], None]) -> None:
    """Calls `take_in` with how many rows of the block of the vocabulary are real: all, but in the last block."""
    if not num_rows % num_block_rows:
        take_in(num_block_rows)
        return
    last = num_rows // num_block_rows
    pl.when(v < last)(lambda: take_in(num_block_rows))
    pl.when(v == last)(lambda: take_in(num_rows % num_block_rows))


def _multiply(left: jax.Ref, right: jax.Ref, out: jax.Ref, width: int) -> None:
    """out = left right^T, some columns at a time: a short program is compiled in seconds."""
    size = column_chunk(left.shape[1], width)
    out[...] = _product(left[:, :size], right[:, :size], 1)

    def add(i: jax.Array, _: None) -> None:
        here = pl.ds(pl.multiple_of(i * size, size), size)
        out[...] += _product(left[:, here], right[:, here], 1)

    jax.lax.fori_loop(1, left.shape[1] // size, add, None)


def _accumulate(left: jax.Ref, right: jax.Ref, out: jax.Ref, width: int, num_real: int | None) -> None:
    """out += left right, some columns at a time. Of right the rows from `num_real` on are taken to be 0: beyond the
    table's end stands anything, and 0 times it may be NaN.
    """
    size = column_chunk(right.shape[1], width)

    def add(i: jax.Array, _: None) -> None:
        here = pl.ds(pl.multiple_of(i * size, size), size)
        rows = right[:, here]
        if num_real is not None:
            row = jax.lax.broadcasted_iota(jnp.int32, rows.shape, 0)
            rows = jnp.where(row < num_real, rows, jnp.zeros_like(rows))
        out[:, here] += _product(left[...], rows, 0)

    jax.lax.fori_loop(0, right.shape[1] // size, add, None)


def _product(left: jax.Array, right: jax.Array, axis: int) -> jax.Array:
    """left times right in float32; `axis` of right is summed over."""
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    dims = (((1,), (axis,)), ((), ()))
    return jax.lax.dot_general(left, right, dims, precision=precision, preferred_element_type=jnp.float32)


def column_chunk(width: int, limit: int) -> int:
    """The largest multiple of 128 up to `limit` that divides D; D itself where there is none."""
    sizes = [size for size in range(LANES, limit + 1, LANES) if width % size == 0]
    return sizes[-1] if sizes else width
