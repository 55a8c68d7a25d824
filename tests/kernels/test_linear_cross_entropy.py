"""The TPU kernel of a large vocabulary's loss equals the plain form, which holds all logits."""

import os

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gemma_kernels import reference
from gemma_kernels.tpu.linear_cross_entropy import Block, Blocks, linear_cross_entropy
from tests.tpu import needs_libtpu

SMALL = Blocks(Block(128, 128, 128), Block(128, 256, 128), Block(256, 128, 128))
TOLERANCE = {"float32": 2e-5, "bfloat16": 1e-2}  # of the largest number; bfloat16 keeps 8 bits


def inputs(num_tokens: int, width: int, num_rows: int, dtype: str = "float32", seed: int = 0):
    keys = jax.random.split(jax.random.key(seed), 5)
    hidden = jax.random.normal(keys[0], (num_tokens, width)).astype(dtype)
    table = (2 * width**-0.5 * jax.random.normal(keys[1], (num_rows, width))).astype(dtype)
    targets = jax.random.randint(keys[2], (num_tokens,), 0, num_rows)
    weights = jax.random.uniform(keys[3], (num_tokens,))
    return hidden, table, targets, weights, jax.random.normal(keys[4], (num_tokens,))


def plain(hidden, table, targets, weights, softcap):
    return weights * reference.cross_entropy(hidden, table, targets, softcap=softcap)


def pulled(function, d_loss, *inputs):
    """The value and what `d_loss` becomes before it."""
    loss, pull = jax.vjp(function, *inputs)
    return loss, pull(d_loss)


def assert_close(got, want, dtype: str):
    got, want = (np.asarray(x, np.float32) for x in (got, want))
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE[dtype] * np.abs(want).max())


def assert_equals_plain(num_tokens, width, num_rows, softcap, dtype, interpret: bool | pltpu.InterpretParams = True):
    hidden, table, targets, weights, d_loss = inputs(num_tokens, width, num_rows, dtype)

    def fused(hidden, table, weights):
        return linear_cross_entropy(hidden, table, targets, weights, softcap=softcap, blocks=SMALL, interpret=interpret)

    def unfused(hidden, table, weights):
        return plain(hidden, table, targets, weights, softcap)

    results = []
    for function in (fused, unfused):
        loss, gradients = jax.jit(lambda *x, f=function: pulled(f, d_loss, *x))(hidden, table, weights)
        results.append((loss, *gradients))
    assert results[0][0].dtype == jnp.float32
    for got, expected in zip(*results, strict=True):
        assert got.shape == expected.shape
        assert got.dtype == expected.dtype
        assert_close(got, expected, dtype)


SHAPES = {
    "num_tokens": st.integers(1, 300),
    "width": st.sampled_from([64, 128, 256, 384]),
    "num_rows": st.integers(2, 700),
    "softcap": st.sampled_from([None, 2.0, 30.0]),
    "dtype": st.sampled_from(["float32", "bfloat16"]),
}


@hypothesis.settings(max_examples=4, deadline=None, derandomize=True)
@hypothesis.given(**SHAPES)
def test_losses_and_gradients_equal_those_of_the_plain_form(**shape):
    assert_equals_plain(**shape)


@pytest.mark.slow
@hypothesis.settings(max_examples=20, deadline=None, derandomize=True)
@hypothesis.given(**SHAPES)
def test_losses_and_gradients_equal_those_of_the_plain_form_over_many_shapes(**shape):
    assert_equals_plain(**shape)


@pytest.mark.parametrize("num_rows", [512, 513])
def test_the_vocabulary_need_not_fill_its_last_block(num_rows):
    assert_equals_plain(130, 128, num_rows, None, "float32")


def test_logits_far_from_zero_neither_overflow_nor_lose_the_loss():
    hidden, table, targets, _, _ = inputs(128, 128, 300)
    got = linear_cross_entropy(300 * hidden, table, targets, blocks=SMALL, interpret=True)
    assert_close(got, reference.cross_entropy(300 * hidden, table, targets), "float32")


def test_weights_default_to_one():
    hidden, table, targets, _, _ = inputs(100, 128, 300)
    got = linear_cross_entropy(hidden, table, targets, blocks=SMALL, interpret=True)
    assert_close(got, reference.cross_entropy(hidden, table, targets), "float32")


def test_a_token_of_weight_zero_sends_nothing_whatever_it_holds():
    hidden, table, targets, weights, d_loss = inputs(200, 128, 300)
    is_padding = jnp.arange(200) % 3 == 0
    weights = jnp.where(is_padding, 0.0, weights)

    @jax.jit
    def gradients(hidden, targets):
        def fused(hidden, table):
            return linear_cross_entropy(hidden, table, targets, weights, blocks=SMALL, interpret=True)

        loss, both = pulled(fused, d_loss, hidden, table)
        return loss, *both

    want = gradients(hidden, targets)
    got = gradients(jnp.where(is_padding[:, None], jnp.nan, hidden), jnp.where(is_padding, -1, targets))
    for one, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(one, other)
    assert not np.any(np.asarray(got[1])[np.asarray(is_padding)])


def test_a_target_out_of_range_that_counts_gives_nan():
    hidden, table, targets, _, _ = inputs(100, 128, 300)
    got = linear_cross_entropy(hidden, table, targets.at[3].set(300), blocks=SMALL, interpret=True)
    assert np.flatnonzero(np.isnan(got)).tolist() == [3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, t, y: (h[None], t, y), "join batch and tokens"),
        (lambda h, t, y: (h, t.T, y), "as it is stored"),
        (lambda h, t, y: (h, t.astype("bfloat16"), y), "cast one"),
        (lambda h, t, y: (h, t, y[1:]), "one for each of 100 tokens"),
        (lambda h, t, y: (h, t, y.astype("float32")), "wanted integers"),
        (lambda h, t, y: (h[:0], t, y[:0]), "at least one"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    hidden, table, targets, _, _ = inputs(100, 128, 300)
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(*change(hidden, table, targets), blocks=SMALL)


def test_blocks_are_whole_lanes():
    with pytest.raises(ValueError, match="vocab of a block is 100; wanted a positive multiple of 128"):
        Block(128, 100, 128)


@pytest.mark.parametrize(
    ("shape", "softcap"),
    [((130, 128, 200), None), *(pytest.param((150, 256, 300), x, marks=pytest.mark.slow) for x in (None, 30.0))],
)
def test_no_race_no_read_out_of_bounds_and_nothing_uninitialised(shape, softcap):
    strict = pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise", dma_execution_mode="on_wait"
    )
    assert_equals_plain(*shape, softcap, "float32", strict)
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # 0.10 tells of races nowhere else

    if hasattr(interpret_pallas_call, "races"):  # else a race has raised
        assert interpret_pallas_call.races is not None
        assert not interpret_pallas_call.races.races_found


PRODUCT = {  # blocks that suit each generation, see the sweep in docs/kernels.md
    "v5e:2x2": Block(512, 512, 512),
    "v5p:2x2x1": Block(512, 512, 512),
    "v6e:2x2": Block(1024, 512, 1280),
    "tpu7x:2x2x1": Block(1024, 512, 1280),
}


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("topology", PRODUCT)
@pytest.mark.parametrize(
    ("width", "num_rows", "softcap"), [(640, 262144, None), (2048, 262400, 30.0), (2560, 262208, None)]
)
def test_compiles_for_each_generation_without_holding_logits(topology, width, num_rows, softcap):
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    device = topologies.get_topology_desc(topology, "tpu").devices[0]
    where = NamedSharding(Mesh(np.array([device]), ("one",)), PartitionSpec())
    block, num_tokens = PRODUCT[topology], 2048

    def step(hidden, table, targets, weights):
        def total(hidden, table):
            losses = linear_cross_entropy(
                hidden, table, targets, weights, softcap=softcap, blocks=Blocks(block, block, block)
            )
            return jnp.sum(losses)

        return jax.value_and_grad(total, argnums=(0, 1))(hidden, table)

    def shape(*sizes, dtype="bfloat16"):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=where)

    compiled = (
        jax.jit(step)
        .lower(
            shape(num_tokens, width),
            shape(num_rows, width),
            shape(num_tokens, dtype="int32"),
            shape(num_tokens, dtype="float32"),
        )
        .compile()
    )
    memory = compiled.memory_analysis()
    assert memory is not None
    # hidden with its unused rows zeroed, and three numbers a token that take a row of 128 lanes each; logits: 1 GiB
    assert memory.temp_size_in_bytes <= 2 * num_tokens * width + 4 * 512 * num_tokens + 2**20
