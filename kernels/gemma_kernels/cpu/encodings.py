"""How rows of weights are stored: bfloat16, and the blocks of GGUF files, decoded to float32 in plain `jnp`.

A block of `values` weights takes `size` bytes: packed integers q, and what turns them back, x = d * q (- m). Every
decoder takes blocks uint8 [..., size] and gives float32 [..., values], bit for bit what the gguf library gives; those
of plain numbers take their bits, uint16 [...], and give as many values.
Layouts: ggml-common.h and ggml-quants.c of github.com/ggml-org/llama.cpp.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Encoding:
    """`size` bytes hold `values` consecutive weights of a row."""

    name: str
    values: int
    size: int
    number: int  # ggml's number of the type (ggml.h, enum ggml_type); the native library knows it by that
    decode: Callable[[jax.Array], jax.Array]

    @property
    def dtype(self) -> jnp.dtype:
        """Of a stored matrix: plain numbers are themselves, blocks are bytes."""
        return jnp.dtype({"bf16": "bfloat16", "f16": "float16"}.get(self.name, "uint8"))

    def num_values(self, width: int) -> int:
        """Weights in a row of `width` elements of `dtype`."""
        return width if self.values == 1 else width // self.size * self.values

    def width(self, num_values: int) -> int:
        """Elements of `dtype` that a row of so many weights takes; the number is a multiple of `values`."""
        return num_values if self.values == 1 else num_values // self.values * self.size


def _float32(values: jax.Array) -> jax.Array:
    return values.astype(jnp.float32)


def _bf16(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits.astype(jnp.uint32) << 16, jnp.float32)


def _f16(bits: jax.Array) -> jax.Array:
    return _float32(jax.lax.bitcast_convert_type(bits, jnp.float16))


def _half(blocks: jax.Array, at: int) -> jax.Array:
    """The float16 at byte `at` of each block, as float32 [..., 1]."""
    return _float32(jax.lax.bitcast_convert_type(blocks[..., at : at + 2], jnp.float16))[..., None]


def _fields(packed: jax.Array, run: int, bits: int) -> jax.Array:
    """Bit fields of bytes, of each run first all lowest fields, then all next ones. [..., m] -> [..., m * 8 / bits]."""
    runs = packed.reshape(*packed.shape[:-1], -1, 1, run)
    shifts = jnp.arange(0, 8, bits, dtype=jnp.uint8)[:, None]
    return (runs >> shifts & jnp.uint8((1 << bits) - 1)).reshape(*packed.shape[:-1], -1)


def _bits(packed: jax.Array) -> jax.Array:
    """All bits of bytes, the lowest first. [..., m] -> [..., 8m]."""
    shifts = jnp.arange(8, dtype=jnp.uint8)
    return (packed[..., None] >> shifts & jnp.uint8(1)).reshape(*packed.shape[:-1], -1)


def _signed(q: jax.Array, offset: int) -> jax.Array:
    """Bytes as two's complement, less an offset. Not `astype`: XLA 0.10.2 then forgets the sign in some fusions."""
    return _float32(jax.lax.bitcast_convert_type(q, jnp.int8) - jnp.int8(offset))


def _scaled(scales: jax.Array, q: jax.Array) -> jax.Array:
    """Multiplies equal runs of q [..., values] with a scale each [..., runs]."""
    return (scales[..., None] * q.reshape(*scales.shape, -1)).reshape(q.shape)


def _minus(values: jax.Array, mins: jax.Array) -> jax.Array:
    """Subtracts a minimum each [..., runs] from equal runs of values."""
    return (values.reshape(*mins.shape, -1) - mins[..., None]).reshape(values.shape)


def _q4_0(blocks: jax.Array) -> jax.Array:
    return _half(blocks, 0) * _signed(_fields(blocks[..., 2:], 16, 4), 8)


def _q4_1(blocks: jax.Array) -> jax.Array:
    return _minus(_half(blocks, 0) * _float32(_fields(blocks[..., 4:], 16, 4)), -_half(blocks, 2))


def _q5_0(blocks: jax.Array) -> jax.Array:
    return _half(blocks, 0) * _signed(_fields(blocks[..., 6:], 16, 4) | _bits(blocks[..., 2:6]) << 4, 16)


def _q5_1(blocks: jax.Array) -> jax.Array:
    q = _fields(blocks[..., 8:], 16, 4) | _bits(blocks[..., 4:8]) << 4
    return _minus(_half(blocks, 0) * _float32(q), -_half(blocks, 2))


def _q8_0(blocks: jax.Array) -> jax.Array:
    return _half(blocks, 0) * _signed(blocks[..., 2:], 0)


def _q2_k(blocks: jax.Array) -> jax.Array:
    packed = blocks[..., :16]
    values = _scaled(_half(blocks, 80) * _float32(packed & 15), _float32(_fields(blocks[..., 16:80], 32, 2)))
    return _minus(values, _half(blocks, 82) * _float32(packed >> 4))


def _q3_k(blocks: jax.Array) -> jax.Array:
    high, packed, q = blocks[..., :32], blocks[..., 96:108], _fields(blocks[..., 32:96], 32, 2)
    scales = _signed(_fields(packed[..., :8], 8, 4) | _fields(packed[..., 8:], 4, 2) << 4, 32)
    return _scaled(_half(blocks, 108) * scales, _signed(q | _fields(high, 32, 1) << 2, 4))


def _with_mins(blocks: jax.Array, q: jax.Array) -> jax.Array:
    """8 scales and 8 minima of 6 bits: bytes 4-7 and 8-11 hold four of each and, on top, the high bits of 12-15."""
    scale, least, rest = blocks[..., 4:8], blocks[..., 8:12], blocks[..., 12:16]
    scales = jnp.concatenate([scale & 63, rest & 15 | scale >> 6 << 4], axis=-1)
    mins = jnp.concatenate([least & 63, rest >> 4 | least >> 6 << 4], axis=-1)
    values = _scaled(_half(blocks, 0) * _float32(scales), _float32(q))
    return _minus(values, _half(blocks, 2) * _float32(mins))


def _q4_k(blocks: jax.Array) -> jax.Array:
    return _with_mins(blocks, _fields(blocks[..., 16:], 32, 4))


def _q5_k(blocks: jax.Array) -> jax.Array:
    return _with_mins(blocks, _fields(blocks[..., 48:], 32, 4) | _fields(blocks[..., 16:48], 32, 1) << 4)


def _q6_k(blocks: jax.Array) -> jax.Array:
    q = _fields(blocks[..., :128], 64, 4) | _fields(blocks[..., 128:192], 32, 2) << 4
    return _scaled(_half(blocks, 208) * _signed(blocks[..., 192:208], 0), _signed(q, 32))


ENCODINGS: Mapping[str, Encoding] = MappingProxyType(
    {
        encoding.name: encoding
        for encoding in (
            Encoding("bf16", 1, 2, 30, _bf16),
            Encoding("f16", 1, 2, 1, _f16),
            Encoding("q4_0", 32, 18, 2, _q4_0),
            Encoding("q4_1", 32, 20, 3, _q4_1),
            Encoding("q5_0", 32, 22, 6, _q5_0),
            Encoding("q5_1", 32, 24, 7, _q5_1),
            Encoding("q8_0", 32, 34, 8, _q8_0),
            Encoding("q2_k", 256, 84, 10, _q2_k),
            Encoding("q3_k", 256, 110, 11, _q3_k),
            Encoding("q4_k", 256, 144, 12, _q4_k),
            Encoding("q5_k", 256, 176, 13, _q5_k),
            Encoding("q6_k", 256, 210, 14, _q6_k),
        )
    }
)
