"""Cross entropy of a linear head over a large vocabulary, for TPU: the logits [T, V] are never in HBM.

Letters: T tokens, D model width, V vocabulary. A block of logits is made in VMEM, used and dropped. The forward pass
goes over the vocabulary once with a running softmax and keeps one number a token, the logarithm of the softmax's sum.
The backward pass makes each block of logits anew, twice: once beside the sums over the vocabulary (the gradient of
hidden), once beside the sums over tokens (the gradient of the table). One kernel for both would save a fifth of the
multiplications of a step, but one of the two sums would have to go through HBM, in float32, at every block.
"""

import functools
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from gemma_kernels.tpu import linear_cross_entropy_bodies as bodies

Interpret = bool | pltpu.InterpretParams


@dataclass(frozen=True)
class Block:
    """How much one step of a kernel takes: tokens and rows of the table, and columns of D in one product."""

    tokens: int
    vocab: int
    width: int

    def __post_init__(self):
        for name in ("tokens", "vocab", "width"):
            size = getattr(self, name)
            if size <= 0 or size % bodies.LANES:
                raise ValueError(f"{name} of a block is {size}; wanted a positive multiple of {bodies.LANES}")


@dataclass(frozen=True)
class Blocks:
    """The blocks of the three kernels."""

    forward: Block
    hidden_gradient: Block
    table_gradient: Block


def linear_cross_entropy(
    hidden: Float[Array, "T D"],
    table: Float[Array, "V D"],
    targets: Int[Array, " T"],
    weights: Float[Array, " T"] | None = None,
    *,
    softcap: float | None = None,
    blocks: Blocks,
    interpret: Interpret = False,
) -> Float[Array, " T"]:
    """weights * -log softmax(cap(hidden table^T))[target] of each token, in nats, float32; see `reference`.

    Differentiable in hidden, table and weights; gradients are summed in float32 and rounded once to the dtype of
    what they belong to. Products of float32 keep float32's precision, at several times the cost of bfloat16.
    A token of weight 0 gives 0 and sends nothing back to hidden and table, be its target out of range (padding: -1) or
    its hidden vector not finite. Of other tokens a target outside 0..V-1 gives NaN.
    """
    _check(hidden, table, targets, weights)
    weights = jnp.ones(targets.shape, jnp.float32) if weights is None else weights.astype(jnp.float32)
    return _loss(hidden, table, targets.astype(jnp.int32), weights, Options(softcap, blocks, interpret))


def _check(hidden: jax.Array, table: jax.Array, targets: jax.Array, weights: jax.Array | None) -> None:
    if hidden.ndim != 2 or table.ndim != 2 or hidden.shape[1] != table.shape[1]:
        raise ValueError(
            f"hidden has shape {hidden.shape} and the table {table.shape}; wanted [T, D] and [V, D]: "
            "join batch and tokens first, and give the table as it is stored for the embedding"
        )
    if 0 in hidden.shape or table.shape[0] == 0:
        raise ValueError(f"hidden has shape {hidden.shape} and the table {table.shape}; wanted at least one of each")
    if hidden.dtype != table.dtype or hidden.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(
            f"hidden is {hidden.dtype} and the table {table.dtype}; wanted both bfloat16 or both float32: cast one"
        )
    for name, x in (("targets", targets), ("weights", weights)):
        if x is not None and x.shape != hidden.shape[:1]:
            raise ValueError(f"{name} has shape {x.shape}; wanted one for each of {hidden.shape[0]} tokens")
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(f"targets are {targets.dtype}; wanted integers: rows of the table")


class Options(NamedTuple):
    """What is fixed when a call is traced."""

    softcap: float | None
    blocks: Blocks
    interpret: Interpret


Saved = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _loss(hidden: jax.Array, table: jax.Array, targets: jax.Array, weights: jax.Array, options: Options) -> jax.Array:
    return _loss_forward(hidden, table, targets, weights, options)[0]


def _loss_forward(
    hidden: jax.Array, table: jax.Array, targets: jax.Array, weights: jax.Array, options: Options
) -> tuple[jax.Array, Saved]:
    log_sum, chosen = _statistics(hidden, table, targets, options)
    is_in_range = (targets >= 0) & (targets < table.shape[0])
    loss = jnp.where(is_in_range, log_sum - chosen, jnp.where(weights != 0, jnp.nan, 0.0))
    return jnp.where(weights != 0, weights * loss, 0.0), (hidden, table, targets, weights, log_sum, loss)


def _loss_backward(options: Options, saved: Saved, d_loss: jax.Array):
    hidden, table, targets, weights, log_sum, loss = saved
    is_used = weights != 0
    hidden = jnp.where(is_used[:, None], hidden, 0)  # 0 times what is not finite would reach the table
    # the softmax of an unused token is exp(0 - 1e30), which is 0
    tokens = targets, jnp.where(is_used, log_sum, 1e30), jnp.where(is_used, weights * d_loss, 0.0)
    d_hidden = _gradient(hidden, table, tokens, options, is_of_table=False)
    d_table = _gradient(hidden, table, tokens, options, is_of_table=True)
    return d_hidden, d_table, np.zeros(targets.shape, jax.dtypes.float0), d_loss * loss


_loss.defvjp(_loss_forward, _loss_backward)


def _statistics(
    hidden: jax.Array, table: jax.Array, targets: jax.Array, options: Options
) -> tuple[jax.Array, jax.Array]:
    """Of each token the logarithm of the softmax's sum, and the target's logit: 0 if the target is out of range."""
    (num_tokens, width), num_rows = hidden.shape, table.shape[0]
    block, hidden, table, (targets,) = _fitted(options.blocks.forward, hidden, table, targets)
    num_token_blocks, num_vocab_blocks = hidden.shape[0] // block.tokens, pl.cdiv(num_rows, block.vocab)
    row = pl.BlockSpec((1, block.tokens), lambda t, v: (0, t))
    partial = pltpu.VMEM((bodies.SUBLANES, block.tokens), jnp.float32)
    logits = pltpu.VMEM((block.vocab, block.tokens), jnp.float32)
    size = hidden.dtype.itemsize
    results = pl.pallas_call(
        functools.partial(bodies.forward_kernel, softcap=options.softcap, width=block.width, num_rows=num_rows),
        name="linear_cross_entropy_forward",
        grid=(num_token_blocks, num_vocab_blocks),
        in_specs=[
            row,
            pl.BlockSpec((block.tokens, width), lambda t, v: (t, 0)),
            pl.BlockSpec((block.vocab, width), lambda t, v: (v, 0)),
        ],
        out_specs=[row, row],
        out_shape=[jax.ShapeDtypeStruct((1, hidden.shape[0]), jnp.float32)] * 2,
        scratch_shapes=[logits, partial, partial, partial],
        cost_estimate=pl.CostEstimate(
            flops=2 * hidden.shape[0] * num_rows * width,
            transcendentals=hidden.shape[0] * num_rows * (1 if options.softcap is None else 2),
            bytes_accessed=size * (hidden.size + num_token_blocks * num_rows * width) + 12 * hidden.shape[0],
        ),
        compiler_params=_parameters(forward_vmem(block, width, size)),
        interpret=options.interpret,
    )(targets[None], hidden, table)
    return results[0][0, :num_tokens], results[1][0, :num_tokens]


def _gradient(
    hidden: jax.Array,
    table: jax.Array,
    tokens: tuple[jax.Array, ...],
    options: Options,
    *,
    is_of_table: bool,
) -> jax.Array:
    """The gradient of the table, or of hidden. `tokens`: targets, logarithms of sums, and gradients of the losses."""
    (num_tokens, width), num_rows = hidden.shape, table.shape[0]
    block = options.blocks.table_gradient if is_of_table else options.blocks.hidden_gradient
    block, hidden, table, tokens = _fitted(block, hidden, table, *tokens)
    own, other = (table, hidden) if is_of_table else (hidden, table)
    num_own, num_other = (block.vocab, block.tokens) if is_of_table else (block.tokens, block.vocab)
    grid = pl.cdiv(own.shape[0], num_own), pl.cdiv(other.shape[0], num_other)
    if is_of_table:
        by_token, row = [x[None] for x in tokens], pl.BlockSpec((1, num_other), lambda i, j: (0, j))
    else:
        by_token, row = [x[:, None] for x in tokens], pl.BlockSpec((num_own, 1), lambda i, j: (i, 0))
    own_spec = pl.BlockSpec((num_own, width), lambda i, j: (i, 0))
    kernel = functools.partial(
        bodies.gradient_kernel,
        softcap=options.softcap,
        width=block.width,
        num_rows=num_rows,
        axis=0 if is_of_table else 1,
    )
    logits = (num_own, num_other)
    out = pl.pallas_call(
        kernel,
        name=f"linear_cross_entropy_{'table' if is_of_table else 'hidden'}_gradient",
        grid=grid,
        in_specs=[row, row, row, own_spec, pl.BlockSpec((num_other, width), lambda i, j: (j, 0))],
        out_specs=own_spec,
        out_shape=jax.ShapeDtypeStruct(own.shape, own.dtype),
        scratch_shapes=[
            pltpu.VMEM(logits, jnp.float32),
            pltpu.VMEM(logits, own.dtype),
            pltpu.VMEM((num_own, width), jnp.float32),
        ],
        cost_estimate=_gradient_cost(own, other, grid[0], options.softcap),
        compiler_params=_parameters(gradient_vmem(num_own, num_other, width, own.dtype.itemsize)),
        interpret=options.interpret,
    )(*by_token, own, other)
    return out[: num_rows if is_of_table else num_tokens]


def _gradient_cost(own: jax.Array, other: jax.Array, num_passes: int, softcap: float | None) -> pl.CostEstimate:
    """`other` is read once for each block of `own`; what belongs to tokens alone is left out."""
    num_logits = own.shape[0] * other.shape[0]
    return pl.CostEstimate(
        flops=4 * num_logits * own.shape[1],
        transcendentals=num_logits * (1 if softcap is None else 2),
        bytes_accessed=own.dtype.itemsize * (2 * own.size + num_passes * other.size),
    )


def _fitted(block: Block, hidden: jax.Array, table: jax.Array, *tokens: jax.Array):
    """The block, no larger than needed, and the arrays with tokens added to fill whole blocks.

    A token that was added has a target, a sum and a gradient of 0. The table, which is large, is copied only if it is
    smaller than one block.
    """
    num_tokens, num_rows = hidden.shape[0], table.shape[0]
    block = replace(
        block,
        tokens=min(block.tokens, _rounded_up(num_tokens, bodies.LANES)),
        vocab=min(block.vocab, _rounded_up(num_rows, bodies.LANES)),
    )
    missing = -num_tokens % block.tokens
    hidden = jnp.pad(hidden, ((0, missing), (0, 0)))
    if num_rows < block.vocab:
        table = jnp.pad(table, ((0, block.vocab - num_rows), (0, 0)))
    return block, hidden, table, tuple(jnp.pad(x, (0, missing)) for x in tokens)


def _rounded_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def forward_vmem(block: Block, width: int, itemsize: int) -> int:
    """Bytes of VMEM that the forward kernel holds: two of each block that comes in, the logits and what is made."""
    return 2 * itemsize * (block.tokens + block.vocab) * width + 12 * block.tokens * block.vocab


def gradient_vmem(num_own: int, num_other: int, width: int, itemsize: int) -> int:
    """Bytes of VMEM that a kernel of a gradient holds: blocks twice, the sum in float32, logits and their gradient."""
    blocks = 2 * itemsize * (2 * num_own + num_other) * width + 4 * num_own * width
    return blocks + (12 + itemsize) * num_own * num_other


def _parameters(vmem: int) -> pltpu.CompilerParams:
    limit = max(vmem + 4 * 2**20, 16 * 2**20)  # never below the least default of the generations
    return pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=limit)
