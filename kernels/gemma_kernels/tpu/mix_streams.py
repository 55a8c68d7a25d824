"""Mixtures of streams, for TPU: each token has coefficients of its own, by which its vectors are summed.

AltUp (Gemma 3n) predicts and corrects its streams so. XLA makes several passes over all of them; here each vector is
read once and each result written once, with sums in float32. The backward pass is one kernel too: gradients of vectors
are mixtures by the transposed coefficients, and those of coefficients products of vectors that are at hand.

Letters: A streams, T tokens, D width; I vectors (the streams, and perhaps one more) are mixed to O.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

LANES = 128
TILE_BYTES = 32  # of the tokens that lie in one register, one below the other
STEP = 32  # blocks of so many tokens are whole registers of any dtype
VMEM_BYTES = 40 << 20  # of blocks: wide vectors get smaller ones than the tables say. A core of tpu7x or v5p has 64 MiB

Interpret = bool | pltpu.InterpretParams
AnyArray = jax.Array | jax.ShapeDtypeStruct


@dataclass(frozen=True)
class MixBlocks:
    """Tokens that one step of each kernel takes at most."""

    forward: int
    backward: int

    def __post_init__(self):
        for name in ("forward", "backward"):
            size = getattr(self, name)
            if size <= 0 or size % STEP:
                raise ValueError(f"{name} of the blocks is {size}; wanted a positive multiple of {STEP} tokens")


def mix_streams(
    coefficients: Float[Array, "T O I"],
    streams: Float[Array, "A T D"],
    other: Float[Array, "T D"] | None = None,
    added: Float[Array, "T D"] | None = None,
    *,
    blocks: MixBlocks,
    interpret: Interpret = False,
) -> Float[Array, "O T D"]:
    """out[o] = sum over i of coefficients[o, i] vectors[i], + added where o > 0; see `reference.mix_streams`.

    The vectors are the streams, then `other`. Sums are float32, and coefficients are made so; the result has the
    streams' dtype, bfloat16 or float32, which `other` and `added` must have too. D is a multiple of 128.
    Differentiable in all arrays. Raises ValueError for arrays that do not fit.
    """
    _check(coefficients, streams, other, added)
    added = added if coefficients.shape[1] > 1 else None
    return _mixed(coefficients.astype(jnp.float32), streams, other, added, Options(blocks, interpret))


def _check(coefficients: jax.Array, streams: jax.Array, other: jax.Array | None, added: jax.Array | None) -> None:
    if streams.ndim != 3 or 0 in streams.shape or streams.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(
            f"streams are {streams.dtype} {streams.shape}; wanted bfloat16 or float32 [A, T, D]: join batch and tokens"
        )
    num_streams, num_tokens, width = streams.shape
    if width % LANES:
        raise ValueError(f"streams are {width} wide; wanted a multiple of {LANES}")
    for name, x in (("other", other), ("added", added)):
        if x is not None and (x.shape != streams.shape[1:] or x.dtype != streams.dtype):
            raise ValueError(f"{name} is {x.dtype} {x.shape}; wanted {streams.dtype} {streams.shape[1:]}, as a stream")
    num_vectors = num_streams + (other is not None)
    if coefficients.ndim != 3 or coefficients.shape[::2] != (num_tokens, num_vectors) or coefficients.shape[1] == 0:
        raise ValueError(
            f"coefficients have shape {coefficients.shape}; wanted [{num_tokens}, O, {num_vectors}]: "
            "one of each token, output and vector"
        )


class Options(NamedTuple):
    """What is fixed when a call is traced."""

    blocks: MixBlocks
    interpret: Interpret


Saved = tuple[jax.Array, jax.Array, jax.Array | None, bool]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _mixed(
    coefficients: jax.Array, streams: jax.Array, other: jax.Array | None, added: jax.Array | None, options: Options
) -> jax.Array:
    num_tokens, num_out, num_in = coefficients.shape
    given = [coefficients.reshape(num_tokens, -1), streams, *_there(other, added)]
    result = jax.ShapeDtypeStruct((num_out, *streams.shape[1:]), streams.dtype)
    size = _fitted(options.blocks.forward, [*given, result])
    return pl.pallas_call(
        functools.partial(_forward_kernel, has_other=other is not None),
        name="mix_streams_forward",
        grid=(pl.cdiv(num_tokens, size),),
        in_specs=[_spec(x, size) for x in given],
        out_specs=_spec(result, size),
        out_shape=result,
        cost_estimate=_cost(num_out * num_in, [*given, result]),
        compiler_params=_parameters(size, [*given, result]),
        interpret=options.interpret,
    )(*given)


def _mixed_forward(
    coefficients: jax.Array, streams: jax.Array, other: jax.Array | None, added: jax.Array | None, options: Options
) -> tuple[jax.Array, Saved]:
    return _mixed(coefficients, streams, other, added, options), (coefficients, streams, other, added is not None)


def _mixed_backward(options: Options, saved: Saved, d_out: jax.Array):
    coefficients, streams, other, has_added = saved
    num_tokens, num_out, num_in = coefficients.shape
    vectors = [coefficients.reshape(num_tokens, -1), streams, *_there(other)]
    given = [d_out, *vectors]
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in vectors]
    results += [jax.ShapeDtypeStruct(streams.shape[1:], streams.dtype)] * has_added
    size = _fitted(options.blocks.backward, [*given, *results])
    out = pl.pallas_call(
        functools.partial(_backward_kernel, has_other=other is not None),
        name="mix_streams_backward",
        grid=(pl.cdiv(num_tokens, size),),
        in_specs=[_spec(x, size) for x in given],
        out_specs=[_spec(x, size) for x in results],
        out_shape=results,
        cost_estimate=_cost(2 * num_out * num_in, [*given, *results]),
        compiler_params=_parameters(size, [*given, *results]),
        interpret=options.interpret,
    )(*given)
    d_coefficients, d_streams, *rest = out
    d_other = None if other is None else rest[0]
    return d_coefficients.reshape(coefficients.shape), d_streams, d_other, rest[-1] if has_added else None


_mixed.defvjp(_mixed_forward, _mixed_backward)


def _forward_kernel(coefficients: jax.Ref, streams: jax.Ref, *rest: jax.Ref, has_other: bool):
    vectors, added, out = [*_each(streams), *rest[:has_other]], rest[has_other:-1], rest[-1]

    @_for_registers(streams)
    def _(here: slice | pl.Slice):
        weights = _columns(coefficients[here, :], out.shape[0])
        for lanes in _tiles(streams):
            values = [_wide(x, here, lanes) for x in vectors]
            more = [_wide(x, here, lanes) for x in added]
            for o, target in enumerate(_each(out)):
                terms = [weight * value for weight, value in zip(weights[o], values, strict=True)]
                target[here, lanes] = _sum([*terms, *(more if o else ())]).astype(target.dtype)


def _backward_kernel(d_out: jax.Ref, coefficients: jax.Ref, streams: jax.Ref, *rest: jax.Ref, has_other: bool):
    others, (d_coefficients, d_streams, *d_rest) = rest[:has_other], rest[has_other:]
    vectors, targets = [*_each(streams), *others], [*_each(d_streams), *d_rest[:has_other]]
    d_added, num_out = d_rest[has_other:], d_out.shape[0]

    @_for_registers(streams)
    def _(here: slice | pl.Slice):
        weights = _columns(coefficients[here, :], num_out)
        products = [[jnp.zeros((_num_rows(streams), LANES), jnp.float32)] * num_out for _ in vectors]
        for lanes in _tiles(streams):
            sent = [_wide(x, here, lanes) for x in _each(d_out)]
            for i, (vector, target) in enumerate(zip(vectors, targets, strict=True)):
                target[here, lanes] = _sum([weights[o][i] * sent[o] for o in range(num_out)]).astype(target.dtype)
                value = _wide(vector, here, lanes)
                products[i] = [total + value * one for total, one in zip(products[i], sent, strict=True)]
            for target in d_added:
                target[here, lanes] = _sum(sent[1:]).astype(target.dtype)
        column = jax.lax.broadcasted_iota(jnp.int32, (_num_rows(streams), num_out * len(vectors)), 1)
        found = jnp.zeros(column.shape, jnp.float32)
        for i, row in enumerate(products):
            for o, product in enumerate(row):
                is_here = column == o * len(vectors) + i
                found = jnp.where(is_here, jnp.sum(product, axis=1, keepdims=True), found)
        d_coefficients[here, :] = found


def _for_registers(x: jax.Ref) -> Callable[[Callable[[slice | pl.Slice], None]], None]:
    """Calls a function for a block's tokens, as many at a time as one register of x holds below each other."""
    rows = _num_rows(x)

    def run(some: Callable[[slice | pl.Slice], None]) -> None:
        def step(i: jax.Array, _: None) -> None:
            some(pl.ds(pl.multiple_of(i * rows, rows), rows))

        jax.lax.fori_loop(0, x.shape[-2] // rows, step, None)

    return run


def _num_rows(x: jax.Ref) -> int:
    return TILE_BYTES // x.dtype.itemsize


def _tiles(x: jax.Ref) -> list[slice]:
    """All of the width, without a loop, which would spill less and take longer (see `benchmarks.kernels.spills`)."""
    return [slice(start, start + LANES) for start in range(0, x.shape[-1], LANES)]


def _each(x: jax.Ref) -> list[jax.Ref]:
    return [x.at[i] for i in range(x.shape[0])]


def _wide(x: jax.Ref, here: slice | pl.Slice, lanes: slice) -> jax.Array:
    return x[here, lanes].astype(jnp.float32)


def _columns(x: jax.Array, num_out: int) -> list[list[jax.Array]]:
    """Of coefficients [tokens, O * I] each as a column: of output o and vector i that at [o][i]."""
    num_in = x.shape[1] // num_out
    return [[x[:, o * num_in + i][:, None] for i in range(num_in)] for o in range(num_out)]


def _sum(terms: Sequence[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, terms)


def _there(*arrays: jax.Array | None) -> list[jax.Array]:
    return [x for x in arrays if x is not None]


def _fitted(size: int, arrays: Sequence[AnyArray]) -> int:
    """A block's tokens: no more than there are, nor than VMEM holds.

    What the last block has beyond the end is computed and dropped.
    """
    there = -(-arrays[-1].shape[-2] // STEP) * STEP
    return min(size, there, max(VMEM_BYTES // _vmem(1, arrays) // STEP, 1) * STEP)


def _spec(x: AnyArray, size: int) -> pl.BlockSpec:
    """Blocks of so many tokens, of [T, D] or [A, T, D]."""
    if x.ndim == 2:
        return pl.BlockSpec((size, x.shape[1]), lambda t: (t, 0))
    return pl.BlockSpec((x.shape[0], size, x.shape[2]), lambda t: (0, t, 0))


def _cost(products: int, arrays: Sequence[AnyArray]) -> pl.CostEstimate:
    """Of so many products a number of a stream; every array is read or written once."""
    num_tokens, width = arrays[-1].shape[-2:]
    return pl.CostEstimate(
        flops=2 * products * num_tokens * width,
        transcendentals=0,
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays),
    )


def _vmem(size: int, arrays: Sequence[AnyArray]) -> int:
    """Bytes of VMEM for two blocks of each array."""

    def row(x: AnyArray) -> int:
        return math.prod(x.shape[:-2]) * -(-x.shape[-1] // LANES) * LANES * x.dtype.itemsize

    return 2 * size * sum(map(row, arrays))


def _parameters(size: int, arrays: Sequence[AnyArray]) -> pltpu.CompilerParams:
    limit = max(_vmem(size, arrays) + 4 * 2**20, 16 * 2**20)  # never below the least default of the generations
    return pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=limit)
