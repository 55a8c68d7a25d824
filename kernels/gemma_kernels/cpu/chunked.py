"""Products with stored weights in plain `jnp`, a few rows of the matrix at a time: where there is no native library.

The compiler would decode a whole matrix before it multiplies, which costs memory and, on a CPU, most of the time. A
chunk of decoded rows stays in the cache between the two.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from gemma_kernels.cpu.encodings import Encoding

CHUNK_BYTES = 1 << 18  # of decoded rows: a part of an L2 cache


def bits(data: jax.Array) -> jax.Array:
    """Plain numbers as uint16, blocks as they are.

    On a CPU, XLA slices bfloat16 by way of float32, and moves that conversion of the whole matrix out of a loop.
    """
    return data if data.dtype.kind == "u" else jax.lax.bitcast_convert_type(data, jnp.uint16)


def dequantised(data: jax.Array, encoding: Encoding) -> jax.Array:
    """Every weight as float32: [..., width] -> [..., I]."""
    data = bits(data)
    if encoding.values == 1:
        return encoding.decode(data)
    blocks = data.reshape(*data.shape[:-1], -1, encoding.size)
    return encoding.decode(blocks).reshape(*data.shape[:-1], -1)


def product(x: jax.Array, data: jax.Array, encoding: Encoding) -> jax.Array:
    """x [M, I] times the transposed weights [O, width] -> [M, O]."""

    def chunk(start: jax.Array, rows: jax.Array, out: jax.Array) -> jax.Array:
        part = jnp.einsum("MI,CI->MC", x, jax.lax.optimization_barrier(dequantised(rows, encoding)))
        return jax.lax.dynamic_update_slice(out, part, (0, start))

    return _over_chunks(chunk, data, encoding, jnp.zeros((len(x), len(data)), jnp.float32))


def transposed_product(gradient: jax.Array, data: jax.Array, encoding: Encoding) -> jax.Array:
    """gradient [M, O] times the weights [O, width] -> [M, I]."""

    def chunk(start: jax.Array, rows: jax.Array, total: jax.Array) -> jax.Array:
        part = jax.lax.dynamic_slice_in_dim(gradient, start, len(rows), axis=1)
        return total + jnp.einsum("MC,CI->MI", part, dequantised(rows, encoding))

    width = encoding.num_values(data.shape[1])
    return _over_chunks(chunk, data, encoding, jnp.zeros((len(gradient), width), jnp.float32))


def _over_chunks(
    chunk: Callable[[jax.Array, jax.Array, jax.Array], jax.Array], data: jax.Array, encoding: Encoding, carry: jax.Array
) -> jax.Array:
    """`chunk(start, rows, carry)` for consecutive pieces of data; the last one may be shorter."""
    size = min(len(data), max(1, CHUNK_BYTES // (4 * encoding.num_values(data.shape[1]))))
    whole, rest = divmod(len(data), size)

    def step(index: jax.Array, carry: jax.Array) -> jax.Array:
        start = index * size
        here, start = jax.lax.optimization_barrier((data, start))
        return chunk(start, jax.lax.dynamic_slice_in_dim(here, start, size), carry)

    carry = jax.lax.fori_loop(0, whole, step, carry)
    return chunk(jnp.int32(whole * size), data[whole * size :], carry) if rest else carry
