"""Products with stored weights: by the native library, at each level this machine can run, and by plain JAX."""

import contextlib
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gemma_kernels
from gemma_checkpoints.encodings import GGML
from gemma_kernels import blocks
from gemma_kernels.cpu import native
from gemma_kernels.cpu.encodings import Encoding

ENCODINGS = list(blocks.ENCODINGS.values())
QUANTISED = [encoding for encoding in ENCODINGS if encoding.values > 1]
HALVES = {  # where a block has float16 numbers
    **{name: [0] for name in ("q4_0", "q5_0", "q8_0")},
    **{name: [0, 2] for name in ("q4_1", "q5_1", "q4_k", "q5_k")},
    "q2_k": [80, 82],
    "q3_k": [108],
    "q6_k": [208],
}
WAYS = ["plain", *native.levels()]
needs_native = pytest.mark.skipif(not native.is_available(), reason=f"needs the native library: {native.reason()}")
by_name = pytest.mark.parametrize("encoding", ENCODINGS, ids=lambda encoding: encoding.name)
every_way = pytest.mark.parametrize("way", WAYS)


def by(way: str) -> contextlib.AbstractContextManager[None]:
    return gemma_kernels.using("reference") if way == "plain" else native.level(way)


def stored(encoding: Encoding, num_rows: int, num_inputs: int, seed: int = 0) -> np.ndarray:
    """Random weights: any bytes, but finite scales, some of them subnormal."""
    rng = np.random.default_rng(seed)
    if encoding.values == 1:
        return rng.normal(size=(num_rows, num_inputs)).astype(encoding.dtype)
    data = rng.integers(0, 256, (num_rows, num_inputs // encoding.values, encoding.size), dtype=np.uint8)
    for at in HALVES[encoding.name]:
        scales = (rng.normal(size=data.shape[:2]) * rng.choice([1e-2, 1e-6], data.shape[:2])).astype("<f2")
        data[..., at : at + 2] = scales[..., None].view(np.uint8)
    return data.reshape(num_rows, -1)


def decoded(data: np.ndarray, encoding: Encoding) -> np.ndarray:
    """By the reader of checkpoints, in numpy."""
    if encoding.values == 1:
        return data.astype(np.float32)
    return GGML[encoding.number].decode(data.reshape(-1, encoding.size)).reshape(len(data), -1)


def close(got: jax.Array, want: np.ndarray) -> bool:
    return bool(np.linalg.norm(got - want) <= 1e-6 * np.linalg.norm(want))


def is_product(got: jax.Array, x: np.ndarray, weights: np.ndarray) -> bool:
    """To float32's rounding of its terms: the sum of few may be near 0."""
    x, weights = x.astype(np.float64), weights.astype(np.float64)
    return bool(np.linalg.norm(got - x @ weights) <= 2e-7 * np.linalg.norm(np.abs(x) @ np.abs(weights)))


def same_bits(a: jax.Array, b: jax.Array | np.ndarray) -> bool:
    return np.array_equal(np.asarray(a).view(np.uint32), np.asarray(b).view(np.uint32))


@by_name
def test_an_encoding_agrees_with_the_reader_of_checkpoints_about_its_size(encoding):
    theirs = GGML[encoding.number]
    assert (theirs.name.lower(), theirs.block, theirs.size) == (encoding.name, encoding.values, encoding.size)
    assert encoding.num_values(encoding.width(512)) == 512


@every_way
@by_name
def test_decoded_weights_are_the_readers_bit_for_bit(encoding, way):
    data = stored(encoding, 37, 512)
    with by(way):
        assert same_bits(blocks.dequantised(jnp.asarray(data), encoding.name), decoded(data, encoding))


@pytest.mark.parity
@pytest.mark.parametrize("encoding", QUANTISED, ids=lambda encoding: encoding.name)
def test_decoded_weights_are_the_gguf_librarys_bit_for_bit(encoding):
    gguf = pytest.importorskip("gguf")
    data = stored(encoding, 37, 512)
    want = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[encoding.name.upper()])
    for way in WAYS:
        with by(way):
            assert same_bits(blocks.dequantised(jnp.asarray(data), encoding.name), want)


@every_way
@settings(max_examples=15, deadline=None)
@given(
    encoding=st.sampled_from(ENCODINGS),
    num_rows=st.integers(1, 70),
    num_runs=st.integers(1, 3),
    batch=st.sampled_from([(), (1,), (2,), (3,), (4, 2), (17,), (33,)]),
    seed=st.integers(0, 99),
)
def test_a_product_is_that_of_the_decoded_weights(way, encoding, num_rows, num_runs, batch, seed):
    data = stored(encoding, num_rows, 256 * num_runs, seed)
    x = np.random.default_rng(seed).normal(size=(*batch, 256 * num_runs)).astype(np.float32)
    with by(way):
        got = blocks.product(jnp.asarray(x), jnp.asarray(data), encoding.name)
    assert got.shape == (*batch, num_rows)
    assert is_product(got, x, decoded(data, encoding).T)


@needs_native
@pytest.mark.parametrize("way", WAYS[1:])
@by_name
def test_a_result_does_not_depend_on_the_number_of_rows_by_a_single_bit(encoding, way):
    data = jnp.asarray(stored(encoding, 301, 512))  # more than one piece of work, and an odd rest
    x = jax.random.normal(jax.random.key(0), (37, 512))
    with native.level(way):
        every = blocks.product(x, data, encoding.name)
        for rows in (slice(5, 6), slice(7, 9), slice(11, 14), slice(3, 12)):
            assert same_bits(blocks.product(x[rows], data, encoding.name), every[rows])


@pytest.mark.parametrize("way", WAYS[:2])
def test_several_matrices_at_once_give_what_each_gives(way):
    chosen = [blocks.ENCODINGS[name] for name in ("q5_0", "q8_0", "bf16", "q6_k")]
    parts = [(jnp.asarray(stored(encoding, 3 + 5 * i, 256)), encoding.name) for i, encoding in enumerate(chosen)]
    x = jax.random.normal(jax.random.key(1), (2, 256))
    with by(way):
        want = jnp.concatenate([blocks.product(x, *part) for part in parts], axis=-1)
        assert same_bits(blocks.products(x, parts), want)


@by_name
def test_rows_are_the_readers_bit_for_bit(encoding):
    data = stored(encoding, 11, 256)
    index = np.array([[0, 10], [3, 3]])
    got = jax.jit(blocks.rows, static_argnums=1)(jnp.asarray(data), encoding.name, index)
    assert same_bits(got, decoded(data, encoding)[index])


@pytest.mark.parametrize("way", WAYS[:2])
@pytest.mark.parametrize("name", ["bf16", "q8_0", "q4_k"])
def test_the_gradient_of_x_is_that_of_the_decoded_weights(name, way):
    encoding = blocks.ENCODINGS[name]
    data = stored(encoding, 300, 512)
    x, towards = (jax.random.normal(jax.random.key(i), (3, size)) for i, size in enumerate((512, 300)))
    with by(way):
        _, pull = jax.vjp(lambda x: blocks.product(x, jnp.asarray(data), encoding.name), x)
        assert is_product(pull(towards)[0], np.asarray(towards), decoded(data, encoding))


def test_weights_that_are_plain_numbers_have_a_gradient_too():
    data = jnp.asarray(stored(blocks.ENCODINGS["bf16"], 5, 32))
    x, towards = jnp.ones((2, 32)), jnp.ones((2, 5))
    _, pull = jax.vjp(lambda data: blocks.product(x, data, "bf16"), data)
    (gradient,) = pull(towards)
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_array_equal(gradient.astype(jnp.float32), 2.0)


@pytest.mark.parametrize("way", WAYS[:2])
def test_products_work_in_loops_and_are_mapped(way):
    encoding = blocks.ENCODINGS["q8_0"]
    data = jnp.asarray(stored(encoding, 64, 64))
    x = jax.random.normal(jax.random.key(0), (3, 64))
    with by(way):
        once = blocks.product(x, data, "q8_0")
        twice = jax.jit(lambda x: jax.lax.fori_loop(0, 2, lambda _, x: blocks.product(x, data, "q8_0"), x))(x)
        assert close(twice, np.asarray(blocks.product(once, data, "q8_0")))
        assert close(jax.vmap(lambda x: blocks.product(x, data, "q8_0"))(x), np.asarray(once))


@pytest.mark.parametrize("way", WAYS[:2])
@by_name
def test_no_decoded_copy_of_a_matrix_is_held(encoding, way):
    data = jax.ShapeDtypeStruct((4100, encoding.width(512)), encoding.dtype)
    x = jax.ShapeDtypeStruct((4, 512), jnp.float32)
    with by(way):
        program = jax.jit(lambda x, data: blocks.product(x, data, encoding.name)).lower(x, data).compile()
    used = program.memory_analysis()
    assert used is not None
    assert used.temp_size_in_bytes < (4 << 20 if way == "plain" else 1024) / 4


@pytest.mark.parametrize("way", WAYS[:2])
def test_inputs_of_any_number_work_with_plain_numbers(way):
    x, data = jnp.ones((2, 5)), jnp.ones((3, 5), jnp.bfloat16)
    with by(way):
        np.testing.assert_array_equal(blocks.product(x, data, "bf16"), 5.0)
        assert blocks.product(x[:0], data, "bf16").shape == (0, 3)


@pytest.mark.parametrize(
    ("x", "data", "encoding", "message"),
    [
        ((2, 32), ((3, 34), "uint8"), "q9_0", "q9_0"),
        ((2, 32), ((3, 34), "int8"), "q8_0", "wanted uint8"),
        ((2, 32), ((3, 35), "uint8"), "q8_0", "whole blocks of 34"),
        ((2, 64), ((3, 34), "uint8"), "q8_0", r"float32 \[..., 32\]"),
        ((2, 32), ((3, 32), "float32"), "bf16", "wanted bfloat16"),
    ],
)
def test_what_does_not_fit_is_refused(x, data, encoding, message):
    with pytest.raises(ValueError, match=message):
        blocks.product(jnp.ones(x), jnp.zeros(*data), encoding)


@pytest.fixture
def other_library(tmp_path, monkeypatch):
    """A path at which tests put what is not the library."""
    path = tmp_path / "_native.so"
    monkeypatch.setattr(native, "PATH", path)
    native._load.cache_clear()
    yield path
    native._load.cache_clear()


def test_without_the_library_the_reason_is_said_and_products_work(other_library):
    assert not native.is_available()
    assert "was not built" in native.reason()
    assert native.levels() == []
    np.testing.assert_array_equal(blocks.product(jnp.ones((1, 16)), jnp.ones((2, 16), jnp.bfloat16), "bf16"), 16.0)


def test_a_file_that_is_no_library_is_a_reason(other_library: Path):
    other_library.write_bytes(b"built for another machine")
    assert not native.is_available()
    assert "cannot be used here" in native.reason()


@needs_native
def test_a_library_built_for_a_newer_xla_is_not_registered(other_library: Path, monkeypatch):
    shutil.copy(Path(native.__file__).with_name("_native.so"), other_library)
    monkeypatch.setattr(native, "_interface", lambda: (0, 0))
    assert not native.is_available()
    assert "was built for XLA FFI" in native.reason()


def test_a_disabled_library_is_not_available():
    with gemma_kernels.using("reference"):
        assert not native.is_available()
        assert native.reason() == "no kernel for reference"


@needs_native
def test_an_unknown_level_is_refused():
    with pytest.raises(ValueError, match="avx1024"), native.level("avx1024"):
        pass
