"""Kernels in int8: how they are rounded, and that a model computes with what they stand for."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import gemma_jax as gj
from gemma_jax import train
from gemma_jax.loading import DEMO_PACKAGE
from gemma_jax.nn import quantised
from gemma_jax.nn.paths import parameters
from gemma_jax.nn.quantised import Int8

TOKENS = np.random.default_rng(0).integers(5, 30, (2, 16))


def rounded(values, num_inputs, dtype="float32"):
    param = nnx.Param(jnp.asarray(values, dtype), inputs=num_inputs)
    quantised.quantise(param)
    return param.get_raw_value()


@pytest.mark.parametrize(("dtype", "slack"), [("float32", 1e-6), ("bfloat16", 2**-8)])
def test_weights_are_rounded_to_the_nearest_of_255_levels_of_each_output(dtype, slack):
    values = np.random.default_rng(0).normal(size=(4, 6, 5)) * np.geomspace(1e-3, 1e3, 5)
    values = np.asarray(jnp.asarray(values, dtype), np.float32)
    found = rounded(values, 2, dtype)
    assert found.codes.dtype == jnp.int8
    assert found.scales.dtype == dtype
    assert found.shape == (4, 6, 5)
    assert found.scales.shape == (5,)
    largest = np.abs(values).max((0, 1))
    np.testing.assert_allclose(np.asarray(found.scales, np.float32), largest / 127, rtol=2**-8)
    assert (np.abs(np.asarray(found.codes)).max((0, 1)) == 127).all()
    exact = np.asarray(found.codes, np.float32) * np.asarray(found.scales, np.float32)
    assert (np.abs(exact - values) <= (0.5 + 127 * slack) * largest / 127).all()


def test_an_output_without_weights_stays_zero():
    found = rounded(np.zeros((3, 2)), 1)
    assert not np.any(found.codes)
    assert not np.any(found.floats())


def in_floats(model):
    """The model whose kernels are what codes stand for."""
    return jax.tree.map(
        lambda x: x.floats() if isinstance(x, Int8) else x, model, is_leaf=lambda x: isinstance(x, Int8)
    )


@pytest.fixture(scope="module")
def models(model_folder):
    small = gj.load(model_folder, dtype="int8", progress=False)
    return small, gj.Gemma(small.config, in_floats(small.model), small.tokenizer)


def test_a_loaded_model_computes_with_what_its_codes_stand_for(models, model_folder):
    small, wide = models
    floats = gj.load(model_folder, dtype="float32", progress=False)
    got, want, before = (np.asarray(gemma.logits(TOKENS)) for gemma in (small, wide, floats))
    np.testing.assert_allclose(got, want, atol=2e-5)
    spread = np.abs(before).max()
    assert 1e-4 * spread < np.abs(got - before).max() < 0.1 * spread
    prompts, wishes = [row[:5].tolist() for row in TOKENS], {"max_new_tokens": 8, "ignore_eos": True}
    assert [c.tokens for c in small.generate(prompts, **wishes)] == [c.tokens for c in wide.generate(prompts, **wishes)]


def test_kernels_of_attention_and_ffws_are_int8_and_nothing_else(models):
    kinds = {path: isinstance(p.get_raw_value(), Int8) for path, p in parameters(models[0].model).items()}
    names = {path.split("/", 1)[1] for path, is_int8 in kinds.items() if is_int8}
    assert names == {*(f"attn/{n}/kernel" for n in "qkvo"), *(f"mlp/{n}/kernel" for n in ("gate", "up", "down"))}
    assert not kinds["embedder/embedding"]


def test_shapes_of_a_quantised_model_are_those_of_a_loaded_one(tiny_3n):
    abstract = quantised.abstract(jax.eval_shape(lambda m: m, tiny_3n))
    live = quantised.quantised(tiny_3n)
    kinds = [jax.tree.map(lambda x: (x.shape, x.dtype), model) for model in (abstract, live)]
    assert jax.tree.leaves(kinds[0]) == jax.tree.leaves(kinds[1])
    assert any(isinstance(p.get_raw_value(), Int8) for p in parameters(live).values())


def test_gemma_3n_computes_with_int8(tiny_3n):
    live = quantised.quantised(tiny_3n)
    wide = in_floats(live)
    forward = jax.jit(lambda model, tokens: model(tokens))
    with_codes, with_floats = forward(live, TOKENS), forward(wide, TOKENS)
    np.testing.assert_allclose(with_codes, with_floats, atol=2e-3)  # its sparsity makes much of rounding


def test_what_needs_floats_refuses_int8(models, tmp_path):
    small, _ = models
    with pytest.raises(ValueError, match=r"training needs weights in floats, but these are int8; load the model with"):
        train.start(small.model, optax.sgd(0.1))
    with pytest.raises(ValueError, match="a new checkpoint needs weights in floats"):
        small.save(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    param = parameters(small.model)["layers_0/attn/q/kernel"]
    with pytest.raises(TypeError, match="an int8 weight has no parts"):
        param[0]
    with pytest.raises(TypeError, match="int8 with scales"):
        np.asarray(param.get_raw_value())


@pytest.mark.slow
def test_the_real_model_says_the_same_of_a_text_in_int8():
    """Gemma 3 270M: nats of a token of the licence, by int8 and by float32 kernels."""
    pytest.importorskip(DEMO_PACKAGE)
    text = (Path(__file__).parents[2] / "LICENSE").read_text()[:3000]
    found = [gj.load("gemma-3-270m", dtype=dtype, progress=False).score(text).nll for dtype in ("int8", "float32")]
    assert abs(found[0] - found[1]) < 0.01
