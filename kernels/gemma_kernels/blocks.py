"""Products with weights that stay as they are stored: bfloat16, or the quantised blocks of a GGUF file.

A matrix [O, I] is an array `data`: bfloat16 or float16 [O, I], or uint8 [O, bytes] with each row's blocks in order.
Activations are float32 and not quantised: a product is that of the decoded weights, by float32 rounding.

On a CPU the native library (`gemma_kernels.cpu.native`) decodes weights in registers; where it is missing, and on
other devices, plain JAX does the same by chunks of rows.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from gemma_kernels import dispatch
from gemma_kernels.cpu import chunked, native
from gemma_kernels.cpu.encodings import ENCODINGS, Encoding
from gemma_kernels.dispatch import Choice

__all__ = ["ENCODINGS", "Encoding", "dequantised", "product", "products", "rows"]


def product(x: Float[Array, "*batch I"], data: Shaped[Array, "O width"], encoding: str) -> Float[Array, "*batch O"]:
    """x times the transposed weights. Differentiable with respect to x, and to weights that are plain numbers."""
    return products(x, [(data, encoding)])


def products(
    x: Float[Array, "*batch I"], parts: Sequence[tuple[Shaped[Array, "O width"], str]]
) -> Float[Array, "*batch total"]:
    """x times each of several matrices, one result behind the other: one call costs less than several.

    With the native library a row's result does not depend on how many rows x has, by a single bit.
    """
    encodings = tuple(_checked(data, name, x) for data, name in parts)
    flat = jnp.reshape(x, (math.prod(x.shape[:-1]), x.shape[-1]))
    out = jnp.asarray(_products(flat, tuple(data for data, _ in parts), encodings))
    return out.reshape(*x.shape[:-1], out.shape[1])


def rows(data: Shaped[Array, "O width"], encoding: str, index: Int[Array, "*batch"]) -> Float[Array, "*batch I"]:
    """Some rows of the weights, decoded; an index beyond the end means the last row, below 0 the first."""
    kind = _checked(data, encoding)
    return chunked.dequantised(jnp.take(chunked.bits(data), index, axis=0, mode="clip"), kind)


def dequantised(data: Shaped[Array, "O width"], encoding: str) -> Float[Array, "O I"]:
    """All weights as float32, bit for bit what the gguf library gives."""
    kind = _checked(data, encoding)
    plain = partial(chunked.dequantised, encoding=kind)
    return _on_cpu(partial(native.dequantised, encoding=kind), plain, kind.num_values(data.shape[1]), data)


def _checked(data: jax.Array, name: str, x: jax.Array | None = None) -> Encoding:
    """The encoding of that name, if data can be of it and fits x."""
    if name not in ENCODINGS:
        raise ValueError(f"encoding {name!r} is unknown; wanted {', '.join(ENCODINGS)}, or float32 weights")
    encoding = ENCODINGS[name]
    if data.ndim != 2 or data.dtype != encoding.dtype:
        raise ValueError(f"{name} weights are {data.dtype} {data.shape}; wanted {encoding.dtype} [O, width]")
    if encoding.values > 1 and data.shape[1] % encoding.size:
        raise ValueError(f"a row of {name} weights has {data.shape[1]} bytes; wanted whole blocks of {encoding.size}")
    wanted = encoding.num_values(data.shape[1])
    if x is not None and (x.dtype != jnp.float32 or x.shape[-1:] != (wanted,)):
        raise ValueError(f"x is {x.dtype} {x.shape}; {name} weights {data.shape} want float32 [..., {wanted}]")
    return encoding


def _on_cpu(
    fast: Callable[..., jax.Array], plain: Callable[..., jax.Array], num_inputs: int, *arrays: jax.Array
) -> jax.Array:
    """fast(*arrays) where the program runs on a CPU and the library can do it, else plain(*arrays)."""
    refusal = native.reason()
    if not refusal and num_inputs % native.MULTIPLE:
        refusal = f"{num_inputs} inputs are no multiple of {native.MULTIPLE}"
    if not refusal and dispatch.target() not in (dispatch.CPU, dispatch.INTERPRET):
        refusal = f"no kernel for {dispatch.target()}"
    if refusal:
        dispatch.noted(Choice("blocks.product", None, refusal))
        return plain(*arrays)
    dispatch.noted(Choice("blocks.product", "native", f"C++, {native.levels()[0]}"))
    return jax.lax.platform_dependent(*arrays, cpu=fast, default=plain)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _products(x: jax.Array, weights: tuple[jax.Array, ...], encodings: tuple[Encoding, ...]) -> jax.Array:
    def fast(x: jax.Array, *weights: jax.Array) -> jax.Array:
        return native.product(x, list(zip(weights, encodings, strict=True)))

    def plain(x: jax.Array, *weights: jax.Array) -> jax.Array:
        return jnp.concatenate([chunked.product(x, *part) for part in zip(weights, encodings, strict=True)], axis=-1)

    return _on_cpu(fast, plain, x.shape[1], x, *weights)


def _forward(
    x: jax.Array, weights: tuple[jax.Array, ...], encodings: tuple[Encoding, ...]
) -> tuple[jax.Array, tuple[jax.Array, tuple[jax.Array, ...]]]:
    return _products(x, weights, encodings), (x, weights)


def _backward(
    encodings: tuple[Encoding, ...], saved: tuple[jax.Array, tuple[jax.Array, ...]], gradient: jax.Array
) -> tuple[jax.Array, tuple[jax.Array | None, ...]]:
    x, weights = saved
    total, of_weights, start = jnp.zeros_like(x), [], 0
    for data, encoding in zip(weights, encodings, strict=True):
        part = gradient[:, start : start + len(data)]
        start += len(data)
        total += chunked.transposed_product(part, data, encoding)
        of_weights.append(jnp.einsum("MO,MI->OI", part, x).astype(data.dtype) if encoding.values == 1 else None)
    return total, tuple(of_weights)


_products.defvjp(_forward, _backward)
