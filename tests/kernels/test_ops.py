"""What is chosen for arrays can be called with them, at any of their sizes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_kernels
from gemma_kernels import Band, Marks, dispatch, reference
from gemma_kernels.tpu.linear_cross_entropy import gradient_vmem
from tests import tpu


@pytest.mark.parametrize("num_rows", [1, 7, 8, 9, 12, 16, 22, 23, 64, 65, 700])
@pytest.mark.parametrize("generation", dispatch.GENERATIONS)
def test_a_quantised_product_of_any_number_of_rows_is_served(generation, num_rows):
    shapes = ((num_rows, 256), jnp.bfloat16), ((256, 256), jnp.int4), ((8, 256), jnp.bfloat16)
    arrays: Any = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    with gemma_kernels.using(generation):
        choice = gemma_kernels.choose_group_quant_matmul(*arrays)
    out = jax.eval_shape(lambda x, v, s: gemma_kernels.group_quant_matmul(x, v, s, choice), *arrays)
    assert out.shape == (num_rows, 256)


def test_a_quantised_product_of_rows_between_those_of_the_table_is_that_of_the_reference():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(12, 256)), jnp.float32)
    values, scales = jnp.asarray(rng.integers(-8, 8, (256, 128)), jnp.int4), jnp.ones((8, 128), jnp.float32)
    with gemma_kernels.using("interpret"):
        choice = gemma_kernels.choose_group_quant_matmul(x, values, scales)
        found = gemma_kernels.group_quant_matmul(x, values, scales, choice)
    np.testing.assert_allclose(found, x @ reference.dequantised(values, scales), atol=1e-3)


@pytest.mark.parametrize(("generation", "mebibytes"), [("v5e", 128), ("v5p", 64), ("v6e", 128), ("tpu7x", 64)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("width", [640, 1152, 2048, 2560, 3840, 5376])
def test_blocks_of_the_loss_fit_into_vmem(generation, mebibytes, dtype, width):
    arrays: Any = (jax.ShapeDtypeStruct((size, width), dtype) for size in (4096, 262144))
    with gemma_kernels.using(generation):
        blocks = gemma_kernels.choose_linear_cross_entropy(*arrays).blocks
    assert blocks is not None
    itemsize = jnp.dtype(dtype).itemsize
    for name, own, other in (("hidden_gradient", "tokens", "vocab"), ("table_gradient", "vocab", "tokens")):
        held = gradient_vmem(blocks[name][own], blocks[name][other], width, itemsize)
        assert held + (4 << 20) < mebibytes << 20


@tpu.needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("generation", "width", "window"),
    [*((generation, 256, 1024) for generation in dispatch.GENERATIONS), ("v5e", 128, 1024), ("v6e", 256, None)],
)
def test_attention_of_float32_compiles_with_the_tables_blocks_which_are_for_bfloat16(generation, width, window):
    """Of Gemma 3 4B's and 27B's heads, forward and backward: the compiler refuses what VMEM cannot hold."""
    heads, key_heads = (8, 4) if width == 256 else (32, 16)
    where = tpu.sharding(generation)
    q, k = (jax.ShapeDtypeStruct((1, n, 8192, width), "float32", sharding=where) for n in (heads, key_heads))
    ids: Any = jax.ShapeDtypeStruct((1, 8192), "int32", sharding=where)

    def gradients(q, k, v, ids, d_out):
        choice, marks = gemma_kernels.choose_band_attention(q, k, Band(window)), Marks(None, ids, ids)

        def attend(q, k, v):
            return gemma_kernels.band_attention(q, k, v, marks, Band(window), choice)

        out, pullback = jax.vjp(attend, q, k, v)
        return out, *pullback(d_out)

    with gemma_kernels.using(generation), gemma_kernels.recorded() as choices:
        memory = jax.jit(gradients).lower(q, k, k, ids, q).compile().memory_analysis()
    assert [choice.kernel for choice in choices] == ["tpu"]
    assert memory is not None
    assert memory.temp_size_in_bytes < 8 * 2**20  # of the sums alone, as in bfloat16


def test_queries_whose_columns_are_known_only_when_it_runs_are_not_served_on_gpu():
    """As many queries as keys: a chunk as long as the cache, of rows of which some have tokens there already."""
    q = jnp.zeros((1, 2, 32, 128))
    with gemma_kernels.using("gpu"):
        assert gemma_kernels.choose_band_attention(q, q, Band(None), has_offsets=True).kernel is None
        choice = gemma_kernels.choose_band_attention(q, q, Band(None))
    assert choice.kernel == "gpu"
    with pytest.raises(ValueError, match="has_offsets=True"):
        gemma_kernels.band_attention(q, q, q, Marks(jnp.zeros(1, jnp.int32)), Band(None), choice)
