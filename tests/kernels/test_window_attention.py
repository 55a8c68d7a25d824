"""Window attention on GPU: numbers by interpretation, and that it compiles for an H100 without one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_kernels import reference
from gemma_kernels.gpu.window import Tile, Window
from gemma_kernels.gpu.window_attention import WindowBlocks, default_blocks, window_attention
from gemma_kernels.gpu.window_backward import cost
from tests.kernels import h100

TILE = Tile(block_q=16, block_kv=32)
BLOCKS = WindowBlocks(forward=Tile(block_q=32, block_kv=16), dq=TILE, dkv=TILE)
TOLERANCE = {jnp.float32: 4e-6, jnp.bfloat16: 2e-2}  # of the largest number; weights are rounded to bfloat16


def arrays(heads, num_queries, num_keys, width=128, dtype=jnp.float32, batch=1):
    rng = np.random.default_rng(num_queries * num_keys)
    query_heads, key_heads = heads
    shapes = [(batch, query_heads, num_queries, width)] + [(batch, key_heads, num_keys, width)] * 2
    q, k, v = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    return q * 3 * width**-0.5, k, v


def segments(batch, num_queries, num_keys, offset):
    """Ids of two texts that lie in one row, keys and queries alike, and a query beyond them all that sees nothing."""
    columns = (np.arange(num_queries + num_keys + offset) // 19).astype(np.int32)
    query = np.tile(columns[offset : offset + num_queries], (batch, 1))
    query[:, -1] = 999
    return jnp.asarray(query), jnp.asarray(np.tile(columns[:num_keys], (batch, 1)))


def assert_equals_reference(operands, *, window, softcap=None, offset=0, is_packed=False, is_backward=True):
    q, k, v = operands
    ids = segments(q.shape[0], q.shape[2], k.shape[2], offset) if is_packed else (None, None)

    @jax.jit
    def ours(q, k, v):
        return window_attention(
            q, k, v, window=window, softcap=softcap, query_segments=ids[0], key_segments=ids[1], offset=offset,
            blocks=BLOCKS, interpret=True,
        )  # fmt: skip

    @jax.jit
    def theirs(q, k, v):
        mask = reference.band_mask(
            q.shape[2], k.shape[2], window=window, offset=offset, query_segments=ids[0], key_segments=ids[1]
        )
        return reference.attention(q, k, v, mask, softcap=softcap)[0]

    def results(attend):
        if not is_backward:
            return [attend(q, k, v)]
        out, pullback = jax.vjp(attend, q, k, v)
        cotangent = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape).astype(out.dtype)
        return [out, *pullback(cotangent)]

    for got, wanted in zip(results(ours), results(theirs), strict=True):
        assert got.dtype == wanted.dtype
        wanted = np.asarray(wanted, np.float32)
        tolerance = TOLERANCE[q.dtype.type] * abs(wanted).max()
        np.testing.assert_allclose(np.asarray(got, np.float32), wanted, rtol=0, atol=tolerance)


@settings(deadline=None, max_examples=6)
@given(
    heads=st.sampled_from([(2, 1), (2, 2), (3, 1)]),
    lengths=st.sampled_from([(16, 16), (50, 70), (33, 64), (1, 40)]),
    window=st.sampled_from([1, 9, 32, 1000, None]),
    softcap=st.sampled_from([None, 5.0]),
    offset=st.sampled_from([0, 7, 30]),
    is_packed=st.booleans(),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
)
def test_output_equals_the_reference(heads, lengths, window, softcap, offset, is_packed, dtype):
    operands = arrays(heads, *lengths, dtype=dtype, batch=2)
    settings = {"window": window, "softcap": softcap, "offset": offset, "is_packed": is_packed}
    assert_equals_reference(operands, **settings, is_backward=False)


@pytest.mark.parametrize(
    ("heads", "lengths", "window", "softcap", "offset", "is_packed", "dtype"),
    [
        ((2, 1), (50, 70), 24, None, 20, True, jnp.float32),
        ((2, 2), (40, 40), None, 5.0, 0, False, jnp.float32),
        ((3, 1), (33, 64), 9, 5.0, 31, True, jnp.bfloat16),
    ],
)
def test_gradients_equal_those_of_the_reference(heads, lengths, window, softcap, offset, is_packed, dtype):
    operands = arrays(heads, *lengths, dtype=dtype)
    assert_equals_reference(operands, window=window, softcap=softcap, offset=offset, is_packed=is_packed)


def test_heads_of_256_equal_the_reference():
    assert_equals_reference(arrays((2, 1), 40, 40, width=256), window=17)


def test_cost_is_that_of_the_band():
    q, k, v = arrays((2, 1), 50, 70)
    seen = int(reference.band_mask(50, 70, window=9, offset=20).sum())
    estimate = cost(q, k, Window(9, offset=20), products=2, moved=[q, k, v, q])
    assert estimate.flops == 2 * 2 * 2 * seen * 128
    assert estimate.transcendentals == 2 * seen
    assert estimate.bytes_accessed == 4 * 128 * (2 * 2 * 50 + 2 * 70)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": jnp.zeros((1, 1, 8, 128), jnp.bfloat16)}, "q, k, v are float32, bfloat16, float32"),
        ({"v": jnp.zeros((1, 1, 9, 128))}, r"wanted \[B, N, T, H\] and twice \[B, K, S, H\]"),
        ({"q": jnp.zeros((1, 3, 8, 128)), "k": jnp.zeros((1, 2, 8, 128)), "v": jnp.zeros((1, 2, 8, 128))}, "multiple"),
        (dict.fromkeys("qkv", jnp.zeros((1, 1, 8, 64))), "the head width is 64; wanted one of"),
        ({"query_segments": jnp.zeros((1, 8), jnp.int32)}, "only one of queries and keys"),
        ({"query_segments": jnp.zeros((1, 7), jnp.int32), "key_segments": jnp.zeros((1, 8), jnp.int32)}, "query_segm"),
        ({"window": 0}, "window is 0, wanted at least 1"),
        ({"softcap": 0.0}, "softcap is 0.0"),
        ({"offset": -1}, "offset is -1"),
    ],
)
def test_arrays_and_settings_that_do_not_fit_are_refused(change, message):
    call = dict.fromkeys("qkv", jnp.zeros((1, 1, 8, 128))) | {"window": 4} | change
    with pytest.raises(ValueError, match=message):
        window_attention(**call)


def test_tiles_that_no_tensor_core_takes_are_refused():
    with pytest.raises(ValueError, match="block_kv is 24, wanted a power of 2"):
        Tile(block_q=16, block_kv=24)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")  # since jax 0.12; it still works there
@pytest.mark.parametrize("kernel", ["forward", "dq", "dkv"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_kernel_lowers_to_triton_without_any_cuda(kernel, dtype):
    case = h100.Case(kernel=kernel, head_width=256, dtype=dtype, softcap=30.0, is_packed=True)
    assert "triton" in h100.lowered(case)


@pytest.mark.slow
@h100.needs_cuda_plugin
@pytest.mark.parametrize("kernel", ["forward", "dq", "dkv"])
@pytest.mark.parametrize("head_width", [128, 256])
@pytest.mark.parametrize(("dtype", "softcap"), [("bfloat16", None), ("bfloat16", 30.0), ("float32", None)])
def test_kernel_compiles_for_an_h100_and_spills_no_register(kernel, head_width, dtype, softcap):
    case = h100.Case(kernel=kernel, head_width=head_width, dtype=dtype, softcap=softcap, is_packed=softcap is not None)
    report = h100.report(case)
    assert report.spilled_bytes == 0
    if dtype == "bfloat16" and report.instructions:
        assert report.instructions.get("HGMMA", 0) > 0
        assert report.instructions.get("HMMA", 0) == 0, "a product too small for a warpgroup"


@pytest.mark.parametrize("head_width", [128, 256])
def test_default_blocks_exist_for_every_dtype(head_width):
    for dtype in (jnp.bfloat16, jnp.float32):
        assert default_blocks(head_width, jnp.dtype(dtype)).forward.num_warps == 8
