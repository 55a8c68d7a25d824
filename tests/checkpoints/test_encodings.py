import ml_dtypes
import numpy as np
import pytest

from gemma_checkpoints.encodings import BF16, F32, GGML, Q4_0, Q8_0

gguf = pytest.importorskip("gguf", reason="the parity extra brings the oracle")
ORACLE = sorted(
    int(kind)
    for kind in {*gguf.quants._type_traits, gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16}
    if hasattr(gguf.quants._type_traits.get(kind), "dequantize_blocks")
)


def test_every_type_the_gguf_library_decodes_is_known():
    assert set(ORACLE) <= set(GGML)


@pytest.mark.parity
@pytest.mark.parametrize("kind", ORACLE, ids=lambda kind: gguf.GGMLQuantizationType(kind).name)
def test_random_bytes_decode_as_in_the_gguf_library(kind):
    encoding = GGML[kind]
    oracle = gguf.GGMLQuantizationType(kind)
    assert (encoding.block, encoding.size) == gguf.GGML_QUANT_SIZES[oracle]
    assert encoding.name == oracle.name
    blocks = np.random.default_rng(kind).integers(0, 256, (500, encoding.size), np.uint8)
    with np.errstate(all="ignore"):
        wanted = gguf.quants.dequantize(blocks, oracle).reshape(500, -1)
        found = encoding.decode(blocks.copy())
    # random scales may be NaN or infinite; bit equality holds for all that are numbers
    np.testing.assert_array_equal(found, wanted)
    assert found.dtype == np.float32


def hard_values() -> np.ndarray:
    """Rows of 32: normal numbers of all sizes, ties, zeros, equal extremes of both signs, subnormal scales."""
    random = np.random.default_rng(0)
    rows = [random.normal(size=(2000, 32)) * 10.0 ** random.integers(-9, 5, (2000, 1))]
    rows.append(random.integers(-127, 128, (500, 32)) / 2.0)  # halves: ties of Q8_0
    rows.append(random.integers(-16, 17, (500, 32)) / 2.0)
    rows.append(np.zeros((1, 32)))
    rows.append(np.where(random.random((100, 32)) < 0.5, -3.0, 3.0))
    rows.append(random.normal(size=(100, 32)) * 1e-41)
    return np.concatenate(rows).astype(np.float32)


@pytest.mark.parity
@pytest.mark.parametrize("encoding", [Q8_0, Q4_0], ids=lambda encoding: encoding.name)
def test_quantised_blocks_are_bit_for_bit_those_of_the_gguf_library(encoding):
    values = hard_values()
    with np.errstate(all="ignore"):
        wanted = gguf.quants.quantize(values, gguf.GGMLQuantizationType[encoding.name])
        found = encoding.encode(values)
    np.testing.assert_array_equal(found, wanted.reshape(len(values), -1))


def test_bfloat16_is_rounded_as_ml_dtypes_does_and_float32_kept():
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, np.uint32)
    bits[:4] = 0x7F800000, 0xFF800000, 0x7F7FFFFF, 0x00018000  # infinities, overflow, a tie
    values = bits.view(np.float32).reshape(-1, 1)
    with np.errstate(all="ignore"):
        wanted = values.astype(ml_dtypes.bfloat16).astype(np.float32)
        found = BF16.decode(BF16.encode(values))
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(F32.decode(F32.encode(values)).view(np.uint32), values.view(np.uint32))
