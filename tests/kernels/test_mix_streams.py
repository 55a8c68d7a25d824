"""The TPU kernels that mix streams, and send gradients back, equal the plain form."""

from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

import gemma_kernels
from gemma_kernels import dispatch, reference
from gemma_kernels.tpu.mix_streams import MixBlocks, mix_streams
from tests import tpu

SMALL = MixBlocks(forward=64, backward=32)
TOLERANCE = {"float32": 2e-6, "bfloat16": 8e-3}  # of the largest number; bfloat16 keeps 8 bits


def inputs(num_tokens, width, num_streams, num_out, has_other=False, has_added=False, dtype="float32", seed=0):
    """Coefficients, streams, the other vector, what is added; and what is sent back."""
    keys = iter(jax.random.split(jax.random.key(seed), 5))

    def vectors(*sizes):
        return jax.random.normal(next(keys), (*sizes, num_tokens, width)).astype(dtype)

    coefficients = jax.random.normal(next(keys), (num_tokens, num_out, num_streams + has_other))
    other, added = (vectors() if has else None for has in (has_other, has_added))
    return (coefficients, vectors(num_streams), other, added), vectors(num_out)


def pulled(function, arrays, d_out):
    """The value, and what `d_out` becomes before it."""
    out, pull = jax.vjp(function, *arrays)
    return out, pull(d_out)


def assert_equals_plain(*shape, interpret: bool | pltpu.InterpretParams = True, **options):
    arrays, d_out = inputs(*shape, **options)

    def kernel(*arrays):
        return mix_streams(*arrays, blocks=SMALL, interpret=interpret)

    found, wanted = (
        jax.jit(lambda arrays, d_out, f=f: pulled(f, arrays, d_out))(arrays, d_out)
        for f in (kernel, reference.mix_streams)
    )
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        got, want = (np.asarray(x, np.float64) for x in (got, want))
        np.testing.assert_allclose(
            got, want, rtol=0, atol=TOLERANCE[options.get("dtype", "float32")] * np.abs(want).max()
        )


SHAPES = {
    "num_tokens": st.integers(1, 200),
    "width": st.sampled_from([128, 256, 384]),
    "num_streams": st.integers(1, 5),
    "num_out": st.integers(2, 5),
    "has_other": st.booleans(),
    "has_added": st.booleans(),
    "dtype": st.sampled_from(["float32", "bfloat16"]),
}


@hypothesis.settings(max_examples=6, deadline=None, derandomize=True)
@hypothesis.given(**SHAPES)
def test_mixtures_and_gradients_equal_those_of_the_plain_form(**shape):
    assert_equals_plain(**shape)


@pytest.mark.slow
@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(**SHAPES)
def test_mixtures_and_gradients_equal_those_of_the_plain_form_over_many_shapes(**shape):
    assert_equals_plain(**shape)


@pytest.mark.parametrize("has_added", [False, True])
@pytest.mark.parametrize("num_tokens", [64, 130])
def test_one_output(num_tokens, has_added):
    """AltUp's prediction of one stream; nothing is added to the first output."""
    assert_equals_plain(num_tokens, 128, 4, 1, has_added=has_added)


def test_the_plain_form_is_a_product_of_matrices_and_what_is_added():
    (coefficients, streams, other, added), _ = inputs(7, 128, 3, 4, has_other=True, has_added=True)
    vectors = np.concatenate([streams, np.asarray(other)[None]]).astype(np.float64)
    want = np.einsum("toi,itd->otd", np.asarray(coefficients, np.float64), vectors)
    want[1:] += np.asarray(added)
    np.testing.assert_allclose(reference.mix_streams(coefficients, streams, other, added), want, atol=1e-5)


def test_a_token_that_is_not_finite_reaches_no_other():
    """Also the last of a block that is not full, whose rest is whatever memory held."""
    arrays, d_out = inputs(70, 128, 3, 3, has_other=True, has_added=True)

    @jax.jit
    def call(arrays, d_out):
        return pulled(lambda *x: mix_streams(*x, blocks=SMALL, interpret=True), arrays, d_out)

    def spoiled(x, axis):
        return x.at[(slice(None),) * axis + (jnp.asarray([5, 69]),)].set(jnp.nan)

    coefficients, streams, other, added = arrays
    bad = coefficients, spoiled(streams, 1), spoiled(other, 0), spoiled(added, 0)
    good = np.setdiff1d(np.arange(70), [5, 69])
    for got, want in zip(jax.tree.leaves(call(bad, d_out)), jax.tree.leaves(call(arrays, d_out)), strict=True):
        axis = got.shape.index(70)
        np.testing.assert_array_equal(*(np.take(np.asarray(x), good, axis) for x in (got, want)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, s, o, a: (c, s[:, None], o, a), "join batch and tokens"),
        (lambda c, s, o, a: (c, s.astype("float16"), o, a), "wanted bfloat16 or float32"),
        (lambda c, s, o, a: (c, s[..., :100], o, a), "100 wide; wanted a multiple of 128"),
        (lambda c, s, o, a: (c, s, o[1:], a), r"other is float32 \(63, 128\); wanted float32 \(64, 128\)"),
        (lambda c, s, o, a: (c, s, o, a.astype("bfloat16")), "added is bfloat16"),
        (lambda c, s, o, a: (c, s, None, a), r"wanted \[64, O, 3\]"),
        (lambda c, s, o, a: (c[:, 0], s, o, a), r"coefficients have shape \(64, 4\)"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    arrays, _ = inputs(64, 128, 3, 4, has_other=True, has_added=True)
    with pytest.raises(ValueError, match=message):
        mix_streams(*change(*arrays), blocks=SMALL)


def test_blocks_are_whole_registers():
    with pytest.raises(ValueError, match="backward of the blocks is 40; wanted a positive multiple of 32"):
        MixBlocks(64, 40)


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((4, 63, 2048), "bfloat16", "63 tokens are too few to fill a block"),
        ((4, 512, 2000), "bfloat16", "width 2000 is no multiple of 128"),
        ((4, 512, 2048), "float16", "streams are float16: wanted bfloat16 or float32"),
        ((4, 64, 2048), "bfloat16", None),
    ],
)
def test_what_the_kernel_cannot_do_well_is_left_to_xla(shape, dtype, reason):
    streams: Any = jax.ShapeDtypeStruct(shape, dtype)
    coefficients: Any = jax.ShapeDtypeStruct((shape[1], 4, 4), "float32")
    with gemma_kernels.using("v5e"):
        choice = gemma_kernels.choose_mix_streams(coefficients, streams)
    assert (choice.reason if choice.kernel is None else None) == reason


@pytest.mark.parametrize("has_added", [False, True])
def test_no_race_no_read_out_of_bounds_and_nothing_uninitialised(has_added):
    strict = pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise", dma_execution_mode="on_wait"
    )
    assert_equals_plain(130, 128, 2, 2, has_other=True, has_added=has_added, interpret=strict)
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # 0.10 tells of races nowhere else

    if hasattr(interpret_pallas_call, "races"):  # else a race has raised
        assert interpret_pallas_call.races is not None
        assert not interpret_pallas_call.races.races_found


@tpu.needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("generation", dispatch.GENERATIONS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("width", [2048, 5376])
def test_compiles_for_each_generation_with_the_tables_blocks_and_keeps_no_stream(generation, dtype, width):
    """Of E2B's and E4B's streams and of wider ones, forward and backward; 1000 tokens do not fill their last block."""
    where, tokens, streams = tpu.sharding(generation), 1000, 4

    def shape(*sizes, dtype=dtype) -> Any:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=where)

    arrays = shape(tokens, streams, streams + 1, dtype="float32"), shape(streams, tokens, width)
    rest = shape(tokens, width), shape(tokens, width)

    def call(d_out, *arrays):
        choice = gemma_kernels.choose_mix_streams(*arrays[:2])
        return pulled(lambda *x: gemma_kernels.mix_streams(*x, choice), arrays, d_out)

    with gemma_kernels.using(generation), gemma_kernels.recorded() as choices:
        memory = jax.jit(call).lower(shape(streams, tokens, width), *arrays, *rest).compile().memory_analysis()
    assert [choice.kernel for choice in choices] == ["tpu"]
    assert memory is not None
    assert memory.temp_size_in_bytes <= 2**21  # coefficients by lanes; a stream is 4 MB at least
