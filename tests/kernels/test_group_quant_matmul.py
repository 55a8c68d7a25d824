"""Products with int4 and int8 weights: against the dequantised product, forward and backward."""

import importlib
import importlib.util
import os
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gemma_kernels import reference
from gemma_kernels.tpu.group_quant_matmul import QuantMatmulBlocks, group_quant_matmul
from tests import tpu
from tests.tpu import needs_libtpu

TOLERANCE = {jnp.float32: 2e-6, jnp.bfloat16: 1.5e-2}  # of the largest output; 2^-8 thrice: weights, x, result
BLOCKS = QuantMatmulBlocks(rows=16, inputs=256, outputs=128)


def arrays(num_rows, num_inputs, num_outputs, *, values=jnp.int4, dtype=jnp.float32, scales=jnp.float32, groups=None):
    rng = np.random.default_rng(num_rows * num_inputs + num_outputs)
    groups = num_inputs // 32 if groups is None else groups
    span = 8 if values == jnp.int4 else 128
    return (
        jnp.asarray(rng.normal(size=(num_rows, num_inputs)), dtype),
        jnp.asarray(rng.integers(-span, span, (num_inputs, num_outputs)), values),
        jnp.asarray(rng.uniform(0.5, 1.5, (groups, num_outputs)) / span, scales),
    )


def reference_weights(values, scales):
    return np.asarray(reference.dequantised(values, scales), np.float64)


def assert_near(got, wanted, dtype):
    np.testing.assert_allclose(np.asarray(got, np.float64), wanted, rtol=0, atol=TOLERANCE[dtype] * abs(wanted).max())


def assert_equals_reference(operands, blocks):
    x, values, scales = operands
    out = group_quant_matmul(x, values, scales, blocks=blocks, interpret=True)
    assert out.dtype == x.dtype
    assert_near(out, np.asarray(x, np.float64) @ reference_weights(values, scales), x.dtype.type)


def assert_gradient_equals_reference(operands, blocks):
    x, values, scales = operands
    cotangent = jnp.cos(jnp.arange(x.shape[0] * values.shape[1])).reshape(x.shape[0], -1).astype(x.dtype)
    _, pullback = jax.vjp(lambda x: group_quant_matmul(x, values, scales, blocks=blocks, interpret=True), x)
    wanted = np.asarray(cotangent, np.float64) @ reference_weights(values, scales).T
    assert_near(pullback(cotangent)[0], wanted, x.dtype.type)


@settings(deadline=None, max_examples=10)
@given(
    num_rows=st.sampled_from([1, 3, 8, 16, 40]),
    num_inputs=st.sampled_from([128, 256, 384, 512]),
    is_block_whole=st.booleans(),
    values=st.sampled_from([jnp.int4, jnp.int8]),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
    scales=st.sampled_from([jnp.float32, jnp.bfloat16]),
    is_per_channel=st.booleans(),
    scales_wide=st.booleans(),
)
def test_weights_form_equals_the_dequantised_product(
    num_rows, num_inputs, is_block_whole, values, dtype, scales, is_per_channel, scales_wide
):
    groups = 1 if is_per_channel else None
    operands = arrays(num_rows, num_inputs, 256, values=values, dtype=dtype, scales=scales, groups=groups)
    inputs = num_inputs if is_block_whole or num_inputs % 256 else 256
    blocks = replace(BLOCKS, inputs=inputs, scales_wide=scales_wide)
    assert_equals_reference(operands, blocks)
    assert_gradient_equals_reference(operands, blocks)


@settings(deadline=None, max_examples=10)
@given(
    num_rows=st.sampled_from([1, 2, 3, 7, 8, 16, 24]),
    num_inputs=st.sampled_from([128, 256, 384, 512]),
    values=st.sampled_from([jnp.int4, jnp.int8]),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
    scales=st.sampled_from([jnp.float32, jnp.bfloat16]),
)
def test_sums_form_equals_the_dequantised_product(num_rows, num_inputs, values, dtype, scales):
    operands = arrays(num_rows, num_inputs, 256, values=values, dtype=dtype, scales=scales)
    inputs = num_inputs if num_inputs % 256 else 256
    assert_equals_reference(operands, QuantMatmulBlocks(rows=24, inputs=inputs, outputs=128, sums_groups=True))


def test_sums_form_rounds_no_weight():
    """int4 is exact in bfloat16 and the scales meet float32 sums, so only the result is rounded."""
    x, values, scales = arrays(8, 512, 128, dtype=jnp.bfloat16)
    out = group_quant_matmul(x, values, scales, blocks=replace(BLOCKS, sums_groups=True), interpret=True)
    wanted = np.asarray(x, np.float64) @ reference_weights(values, scales)
    assert np.mean(np.asarray(out) == wanted.astype(jnp.bfloat16)) > 0.99


def test_values_and_scales_get_gradients_of_zero():
    x, values, scales = arrays(3, 256, 128)
    grads = jax.grad(
        lambda x, scales: group_quant_matmul(x, values, scales, blocks=BLOCKS, interpret=True).sum(), argnums=(0, 1)
    )(x, scales)
    assert jnp.any(grads[0] != 0)
    assert not jnp.any(grads[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.zeros((2, 256), jnp.float16)}, "x is float16 .* cast them"),
        ({"values": jnp.zeros((256, 128), jnp.int16)}, "values are int16; wanted int4 or int8"),
        ({"values": jnp.zeros((512, 128), jnp.int8)}, r"x is \(2, 256\) and values \(512, 128\)"),
        ({"scales": jnp.zeros((4, 128))}, r"want \[8 or 1, 128\], groups of 32 inputs"),
        ({"blocks": replace(BLOCKS, inputs=128)}, "blocks.inputs is 128; wanted 256, or a multiple of 256"),
        ({"blocks": replace(BLOCKS, outputs=64)}, "blocks.outputs is 64"),
        ({"blocks": replace(BLOCKS, rows=1)}, "blocks.rows is 1; wanted a multiple of 8"),
        ({"x": jnp.zeros((12, 256)), "blocks": replace(BLOCKS, sums_groups=True)}, "sums_groups with 12 rows"),
    ],
)
def test_arrays_and_blocks_that_do_not_fit_are_refused(change, message):
    x, values, scales = arrays(2, 256, 128, values=jnp.int8)
    call = {"x": x, "values": values, "scales": scales, "blocks": BLOCKS} | change
    with pytest.raises(ValueError, match=message):
        group_quant_matmul(call["x"], call["values"], call["scales"], blocks=call["blocks"])


@pytest.mark.slow
@pytest.mark.parametrize("sums_groups", [True, False])
def test_kernel_has_no_race_reads_nothing_unwritten_and_stays_in_bounds(sums_groups):
    x, values, scales = arrays(3, 512, 256, values=jnp.int8)
    strict = pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise", dma_execution_mode="on_wait"
    )
    blocks = replace(BLOCKS, sums_groups=sums_groups)
    out, pullback = jax.vjp(lambda x: group_quant_matmul(x, values, scales, blocks=blocks, interpret=strict), x)
    weights = reference_weights(values, scales)
    assert_near(out, np.asarray(x, np.float64) @ weights, jnp.float32)
    assert_near(pullback(out)[0], np.asarray(out, np.float64) @ weights.T, jnp.float32)
    races = importlib.import_module("jax._src.pallas.mosaic.interpret.interpret_pallas_call").races
    assert races is None or not races.races_found


def compiled(topology, num_rows, num_inputs, num_outputs, groups, blocks, *, is_backward=False):
    """For one chip that need not be there; bfloat16 x and scales, int4."""
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    device = topologies.get_topology_desc(topology, "tpu").devices[0]
    where = NamedSharding(Mesh(np.array([device]), ("one",)), PartitionSpec())
    shapes = [
        jax.ShapeDtypeStruct((num_rows, num_inputs), jnp.bfloat16, sharding=where),
        jax.ShapeDtypeStruct((num_inputs, num_outputs), jnp.int4, sharding=where),
        jax.ShapeDtypeStruct((groups, num_outputs), jnp.bfloat16, sharding=where),
    ]

    def run(x, values, scales):
        out, pullback = jax.vjp(lambda x: group_quant_matmul(x, values, scales, blocks=blocks), x)
        return pullback(out)[0] if is_backward else out

    return jax.jit(run).lower(*shapes).compile()


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
@pytest.mark.parametrize("form", ["few sums", "sums", "weights", "channels", "backward"])
def test_kernel_compiles_for_tpu_and_the_dequantised_weights_never_reach_memory(topology, form):
    """A matrix of Gemma 3 4B's feed-forward: 52 MB in bfloat16."""
    num_rows = {"few sums": 1, "sums": 8}.get(form, 512)
    is_wide = topology.startswith("v5")
    blocks = QuantMatmulBlocks(rows=512, inputs=512, outputs=1024, sums_groups=num_rows < 512, scales_wide=is_wide)
    groups = 1 if form == "channels" else 2560 // 32
    program = compiled(topology, num_rows, 2560, 10240, groups, blocks, is_backward=form == "backward")
    memory = program.memory_analysis()
    assert memory is not None
    intermediate = num_rows * 10240 * 2 if form == "backward" else 0  # the product, whose gradient is taken
    assert memory.temp_size_in_bytes <= intermediate + 2**20


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("generation", ["v5e", "v6e"])
@pytest.mark.parametrize(("num_rows", "mebibytes"), [(1, 0), (8, 220)])
def test_xla_writes_the_weights_dequantised_to_memory_where_there_are_rows_to_share_them(
    generation, num_rows, mebibytes
):
    """What the kernel is for; docs/kernels.md names the figure. A matrix of Gemma 3 27B's feed-forward."""
    where = tpu.sharding(generation)
    sizes = ((num_rows, 5376), "bfloat16"), ((5376, 21504), "int4"), ((5376 // 32, 21504), "bfloat16")
    shapes = [jax.ShapeDtypeStruct(*size, sharding=where) for size in sizes]
    product = jax.jit(lambda x, values, scales: x @ reference.dequantised(values, scales, x.dtype))
    memory = product.lower(*shapes).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes >> 20 == mebibytes
