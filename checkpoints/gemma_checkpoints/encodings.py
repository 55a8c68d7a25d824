"""How numbers are stored: plain types, and ggml's block quantisations decoded to float32.

A quantised row is cut into blocks of `block` values, each stored in `size` bytes: packed integers q, and the scales
that turn them back, x = d * q (- m). A decoder takes blocks [n, size] uint8 and gives values [n, block]. Bits are
unpacked for all blocks at once. Layouts: ggml-common.h and ggml-quants.c of github.com/ggml-org/llama.cpp.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from gemma_checkpoints import codebooks


@dataclass(frozen=True)
class Encoding:
    """A stored type: `size` bytes hold `block` values. `decode` takes uint8 [n, size] and gives [n, block]; `encode`
    takes float32 [n, block] and gives uint8 [n, size].
    """

    name: str
    block: int
    size: int
    decode: Callable[[np.ndarray], np.ndarray]
    encode: Callable[[np.ndarray], np.ndarray] | None = None  # of float32; None: this type is never written

    def num_bytes(self, num_values: int) -> int:
        """Bytes that so many values take; the number is a multiple of `block`."""
        return num_values // self.block * self.size


def _plain(name: str, dtype: str) -> Encoding:
    kind = np.dtype(dtype)
    return Encoding(name, 1, kind.itemsize, lambda blocks: blocks.view(kind))


def _bfloat16(blocks: np.ndarray) -> np.ndarray:
    return (blocks.view("<u2").astype(np.uint32) << 16).view(np.float32)


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    """To the nearest, ties to even; a NaN stays one."""
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), bits >> 16 | 0x40, rounded).astype("<u2").view(np.uint8)


def _columns(blocks: np.ndarray, *sizes: int) -> list[np.ndarray]:
    """Cuts each block into its fields; the last one takes the rest."""
    return np.split(blocks, np.cumsum(sizes), axis=1)


def _half(two_bytes: np.ndarray) -> np.ndarray:
    """[n, 2] bytes -> [n, 1] float32."""
    return np.ascontiguousarray(two_bytes).view("<f2").astype(np.float32)


def _words(field: np.ndarray, dtype: str) -> np.ndarray:
    return np.ascontiguousarray(field).view(dtype)


def _fields(packed: np.ndarray, run: int, bits: int) -> np.ndarray:
    """Bit fields of bytes, of each run first all lowest fields, then all next ones. [n, m] -> [n, m*8/bits]."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    parts = packed.reshape(len(packed), -1, 1, run) >> shifts
    parts &= np.uint8((1 << bits) - 1)
    return parts.reshape(len(packed), -1)


def _bits(packed: np.ndarray) -> np.ndarray:
    return np.unpackbits(packed, axis=1, bitorder="little")


def _signed(q: np.ndarray, offset: int) -> np.ndarray:
    """Small unsigned integers minus an offset, as float32."""
    return (q.view(np.int8) - np.int8(offset)).astype(np.float32)


def _scaled(scales: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Multiplies equal runs of q [n, block] with a scale each [n, runs], in place."""
    runs = q.reshape(*scales.shape, -1)
    runs *= scales[..., None]
    return q


def _q4_0(blocks: np.ndarray) -> np.ndarray:
    d, qs = _columns(blocks, 2)
    return _half(d) * _signed(_fields(qs, 16, 4), 8)


def _to_q4_0(values: np.ndarray) -> np.ndarray:
    """The first of the values farthest from zero becomes -8. All in float32, as the gguf library does."""
    at = np.argmax(np.abs(values), axis=1, keepdims=True)
    d = np.take_along_axis(values, at, axis=1) / np.float32(-8)
    q = np.trunc(values * _inverse(d) + np.float32(8.5)).astype(np.uint8).clip(0, 15)
    return np.concatenate([d.astype("<f2").view(np.uint8), q[:, :16] | q[:, 16:] << 4], axis=1)


def _to_q8_0(values: np.ndarray) -> np.ndarray:
    d = np.abs(values).max(axis=1, keepdims=True) / np.float32(127)
    scaled = values * _inverse(d)
    whole = np.trunc(scaled)
    q = whole + np.trunc(2 * (scaled - whole))  # to the nearest, ties away from zero
    return np.concatenate([d.astype("<f2").view(np.uint8), q.astype(np.int8).view(np.uint8)], axis=1)


def _inverse(d: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.where(d == 0, np.float32(0), np.float32(1) / d)


def _q4_1(blocks: np.ndarray) -> np.ndarray:
    d, m, qs = _columns(blocks, 2, 2)
    return _half(d) * _fields(qs, 16, 4).astype(np.float32) + _half(m)


def _q5_0(blocks: np.ndarray) -> np.ndarray:
    d, high, qs = _columns(blocks, 2, 4)
    return _half(d) * _signed(_fields(qs, 16, 4) | _bits(high) << 4, 16)


def _q5_1(blocks: np.ndarray) -> np.ndarray:
    d, m, high, qs = _columns(blocks, 2, 2, 4)
    return _half(d) * (_fields(qs, 16, 4) | _bits(high) << 4).astype(np.float32) + _half(m)


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    d, qs = _columns(blocks, 2)
    return _half(d) * qs.view(np.int8).astype(np.float32)


def _q2_k(blocks: np.ndarray) -> np.ndarray:
    scales, qs, d, least = _columns(blocks, 16, 64, 2)
    values = _scaled(_half(d) * (scales & 15).astype(np.float32), _fields(qs, 32, 2).astype(np.float32))
    values.reshape(len(blocks), 16, 16)[...] -= (_half(least) * (scales >> 4).astype(np.float32))[..., None]
    return values


def _q3_k(blocks: np.ndarray) -> np.ndarray:
    high, qs, packed, d = _columns(blocks, 32, 64, 12)
    scales = _signed(_fields(packed[:, :8], 8, 4) | _fields(packed[:, 8:], 4, 2) << 4, 32)
    return _scaled(_half(d) * scales, _signed(_fields(qs, 32, 2) | _fields(high, 32, 1) << 2, 4))


def _scales_and_mins(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """8 scales and 8 minima of 6 bits: bytes 0-3 and 4-7 hold four of each and, on top, the high bits of bytes 8-11."""
    scale, least, rest = _columns(packed, 4, 4)
    scales = np.concatenate([scale & 63, rest & 15 | scale >> 6 << 4], axis=1)
    mins = np.concatenate([least & 63, rest >> 4 | least >> 6 << 4], axis=1)
    return scales.astype(np.float32), mins.astype(np.float32)


def _with_mins(d: np.ndarray, least: np.ndarray, packed: np.ndarray, q: np.ndarray) -> np.ndarray:
    scales, mins = _scales_and_mins(packed)
    values = _scaled(_half(d) * scales, q.astype(np.float32))
    values.reshape(len(q), 8, 32)[...] -= (_half(least) * mins)[..., None]
    return values


def _q4_k(blocks: np.ndarray) -> np.ndarray:
    d, least, packed, qs = _columns(blocks, 2, 2, 12)
    return _with_mins(d, least, packed, _fields(qs, 32, 4))


def _q5_k(blocks: np.ndarray) -> np.ndarray:
    d, least, packed, high, qs = _columns(blocks, 2, 2, 12, 32)
    return _with_mins(d, least, packed, _fields(qs, 32, 4) | _fields(high, 32, 1) << 4)


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    low, high, scales, d = _columns(blocks, 128, 64, 16)
    q = _fields(low, 64, 4)
    q |= _fields(high, 32, 2) << 4
    return _scaled(_half(d) * scales.view(np.int8).astype(np.float32), _signed(q, 32))


def _ternary(digits: np.ndarray) -> np.ndarray:
    """The leading base-3 digit of bytes that hold digits as a fraction of 256: 0, 1, 2 -> -1, 0, 1."""
    return ((digits.astype(np.uint16) * 3) >> 8).astype(np.float32) - np.float32(1)


def _tq1_0(blocks: np.ndarray) -> np.ndarray:
    fives, more, fours, d = _columns(blocks, 32, 16, 4)
    powers = np.array([1, 3, 9, 27, 81], np.uint8)[:, None]
    parts = [fives[:, None] * powers, more[:, None] * powers, fours[:, None] * powers[:4]]  # modulo 256, on purpose
    return _half(d) * _ternary(np.concatenate([part.reshape(len(blocks), -1) for part in parts], axis=1))


def _tq2_0(blocks: np.ndarray) -> np.ndarray:
    qs, d = _columns(blocks, 64)
    return _half(d) * _signed(_fields(qs, 32, 2), 1)


def _q1_0(blocks: np.ndarray) -> np.ndarray:
    d, qs = _columns(blocks, 2)
    return _half(d) * (_bits(qs).astype(np.float32) * 2 - 1)


_E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)  # doubled


def _mxfp4(blocks: np.ndarray) -> np.ndarray:
    exponent, qs = _columns(blocks, 1)
    wide = exponent.astype(np.uint32)  # half of 2 ** (exponent - 127), below exponent 2 as a subnormal number
    bits = np.where(wide < 2, np.uint32(0x00200000) << np.minimum(wide, 1), (wide - np.uint32(1)) << 23)
    return bits.astype(np.uint32).view(np.float32) * _E2M1[_fields(qs, 16, 4)]


def _nvfp4(blocks: np.ndarray) -> np.ndarray:
    scales, qs = _columns(blocks, 4)
    every = np.arange(256)
    exponent, mantissa = every >> 3 & 15, every & 7
    halves = np.where(exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0)) / 2
    halves[[0, 0x7F]] = 0  # 0x7F is NaN
    return _scaled(halves.astype(np.float32)[scales], _E2M1[_fields(qs, 8, 4)])


_EVEN_SIGNS = np.arange(128, dtype=np.uint8)  # 7 signs; an eighth makes their number even
_EVEN_SIGNS |= (np.bitwise_count(_EVEN_SIGNS) & 1) << 7


def _plus_minus(signs: np.ndarray) -> np.ndarray:
    """[n, m] bytes of sign bits -> [n, 8m] of 1 and -1."""
    return np.float32(1) - 2 * _bits(signs).astype(np.float32)


def _seven_bit_signs(words: np.ndarray) -> np.ndarray:
    """[n, 8] words, each with four indices of 7 bits -> [n, 256] of 1 and -1."""
    index = words[..., None] >> np.array([0, 7, 14, 21], np.uint32) & np.uint32(127)
    return _plus_minus(_EVEN_SIGNS[index].reshape(len(words), -1))


def _looked_up(grid: np.ndarray, index: np.ndarray) -> np.ndarray:
    return grid[index].reshape(len(index), -1)


def _iq2_xxs(blocks: np.ndarray) -> np.ndarray:
    d, qs = _columns(blocks, 2)
    words = _words(qs, "<u4").reshape(len(blocks), 8, 2)
    index, rest = _words(words[..., 0], "u1"), words[..., 1]
    scales = _half(d) * (np.float32(0.5) + (rest >> 28).astype(np.float32)) * np.float32(0.25)
    return _scaled(scales, _looked_up(codebooks.IQ2_XXS, index.reshape(len(blocks), 32))) * _seven_bit_signs(rest)


def _quarter_scales(d: np.ndarray, packed: np.ndarray) -> np.ndarray:
    return _half(d) * (np.float32(0.5) + _fields(packed, 1, 4).astype(np.float32)) * np.float32(0.25)


def _iq2_xs(blocks: np.ndarray) -> np.ndarray:
    d, qs, scales = _columns(blocks, 2, 64)
    words = _words(qs, "<u2")
    values = _scaled(_quarter_scales(d, scales), _looked_up(codebooks.IQ2_XS, words & np.uint16(511)))
    return values * _plus_minus(_EVEN_SIGNS[words >> 9])


def _iq2_s(blocks: np.ndarray) -> np.ndarray:
    d, qs, signs, high, scales = _columns(blocks, 2, 32, 32, 8)
    index = qs | _fields(high, 1, 2).astype(np.uint16) << 8
    return _scaled(_quarter_scales(d, scales), _looked_up(codebooks.IQ2_S, index)) * _plus_minus(signs)


def _iq3_xxs(blocks: np.ndarray) -> np.ndarray:
    d, qs, rest = _columns(blocks, 2, 64)
    words = _words(rest, "<u4")
    scales = _half(d) * (np.float32(0.5) + (words >> 28).astype(np.float32)) * np.float32(0.5)
    return _scaled(scales, _looked_up(codebooks.IQ3_XXS, qs)) * _seven_bit_signs(words)


def _iq3_s(blocks: np.ndarray) -> np.ndarray:
    d, qs, high, signs, scales = _columns(blocks, 2, 64, 8, 32)
    index = qs | _bits(high).astype(np.uint16) << 8
    scales = _half(d) * (1 + 2 * _fields(scales, 1, 4)).astype(np.float32)
    return _scaled(scales, _looked_up(codebooks.IQ3_S, index)) * _plus_minus(signs)


_THREE_BITS = np.array([0, 3, 6, 9], np.uint16)
_DELTA = np.float32(0.125)


def _iq1_s(blocks: np.ndarray) -> np.ndarray:
    d, qs, rest = _columns(blocks, 2, 32)
    words = _words(rest, "<u2")
    index = qs | ((words[..., None] >> _THREE_BITS & np.uint16(7)) << 8).reshape(len(blocks), 32)
    values = _looked_up(codebooks.IQ1_S, index).reshape(len(blocks), 8, 32)
    values += np.where(words & np.uint16(0x8000), -_DELTA, _DELTA)[..., None]
    scales = _half(d) * (2 * (words >> 12 & np.uint16(7)) + 1).astype(np.float32)
    return _scaled(scales, values.reshape(len(blocks), 256))


def _iq1_m(blocks: np.ndarray) -> np.ndarray:
    qs, high, rest = _columns(blocks, 32, 16)
    words = _words(rest, "<u2")  # the top four bits of each make up d
    d = np.bitwise_or.reduce((words & np.uint16(0xF000)) >> np.array([12, 8, 4, 0], np.uint16), axis=1, keepdims=True)
    scales = (words[..., None] >> _THREE_BITS & np.uint16(7)).reshape(len(blocks), 16)
    nibbles = _fields(high, 1, 4)
    index = qs | (nibbles & 7).astype(np.uint16) << 8
    values = _looked_up(codebooks.IQ1_S, index).reshape(len(blocks), 32, 8)
    values += np.where(nibbles & 8, -_DELTA, _DELTA)[..., None]
    scales = d.view(np.float16).astype(np.float32) * (2 * scales + 1).astype(np.float32)
    return _scaled(scales, values.reshape(len(blocks), 256))


_NONLINEAR = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)


def _iq4_nl(blocks: np.ndarray) -> np.ndarray:
    d, qs = _columns(blocks, 2)
    return _half(d) * _NONLINEAR[_fields(qs, 16, 4)]


def _iq4_xs(blocks: np.ndarray) -> np.ndarray:
    d, high, low, qs = _columns(blocks, 2, 2, 4)
    top = (_words(high, "<u2") >> np.arange(0, 16, 2, dtype=np.uint16)).astype(np.uint8) & 3
    return _scaled(_half(d) * _signed(_fields(low, 1, 4) | top << 4, 32), _NONLINEAR[_fields(qs, 16, 4)])


F32 = Encoding("F32", 1, 4, lambda blocks: blocks.view("<f4"), lambda values: values.astype("<f4").view(np.uint8))
F16, F64 = _plain("F16", "<f2"), _plain("F64", "<f8")
I8, I16, I32, I64 = (_plain(name, f"<{name.lower()[0]}{int(name[1:]) // 8}") for name in ("I8", "I16", "I32", "I64"))
U8, U16, U32, U64 = (_plain(name, f"<{name.lower()[0]}{int(name[1:]) // 8}") for name in ("U8", "U16", "U32", "U64"))
BF16 = Encoding("BF16", 1, 2, _bfloat16, _to_bfloat16)
Q4_0, Q8_0 = Encoding("Q4_0", 32, 18, _q4_0, _to_q4_0), Encoding("Q8_0", 32, 34, _q8_0, _to_q8_0)

# By the number that a GGUF file stores (ggml.h, enum ggml_type).
GGML: dict[int, Encoding] = {
    0: F32,
    1: F16,
    2: Q4_0,
    3: Encoding("Q4_1", 32, 20, _q4_1),
    6: Encoding("Q5_0", 32, 22, _q5_0),
    7: Encoding("Q5_1", 32, 24, _q5_1),
    8: Q8_0,
    10: Encoding("Q2_K", 256, 84, _q2_k),
    11: Encoding("Q3_K", 256, 110, _q3_k),
    12: Encoding("Q4_K", 256, 144, _q4_k),
    13: Encoding("Q5_K", 256, 176, _q5_k),
    14: Encoding("Q6_K", 256, 210, _q6_k),
    16: Encoding("IQ2_XXS", 256, 66, _iq2_xxs),
    17: Encoding("IQ2_XS", 256, 74, _iq2_xs),
    18: Encoding("IQ3_XXS", 256, 98, _iq3_xxs),
    19: Encoding("IQ1_S", 256, 50, _iq1_s),
    20: Encoding("IQ4_NL", 32, 18, _iq4_nl),
    21: Encoding("IQ3_S", 256, 110, _iq3_s),
    22: Encoding("IQ2_S", 256, 82, _iq2_s),
    23: Encoding("IQ4_XS", 256, 136, _iq4_xs),
    24: I8,
    25: I16,
    26: I32,
    27: I64,
    28: F64,
    29: Encoding("IQ1_M", 256, 56, _iq1_m),
    30: BF16,
    34: Encoding("TQ1_0", 256, 54, _tq1_0),
    35: Encoding("TQ2_0", 256, 66, _tq2_0),
    39: Encoding("MXFP4", 32, 17, _mxfp4),
    40: Encoding("NVFP4", 64, 36, _nvfp4),
    41: Encoding("Q1_0", 128, 18, _q1_0),
}
