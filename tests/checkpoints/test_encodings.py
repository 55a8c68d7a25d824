import numpy as np
import pytest

from gemma_checkpoints.encodings import GGML

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
