"""A sweep: what slices cost against what a compiler counts, which are best, and the files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_jax as gj
from gemma_jax import matformer
from gemma_jax.cli.main import main
from gemma_jax.configs.config import ConfigError
from gemma_jax.configs.slicing import Slicing
from gemma_jax.matformer import sweep
from gemma_jax.nn.cache import empty_cache
from gemma_jax.nn.masks import Places

TOKENS = np.random.default_rng(0).integers(0, 128, 30).tolist()


@pytest.fixture(scope="module")
def gemma(tiny_3n):
    return gj.Gemma(tiny_3n.config, tiny_3n)


@pytest.fixture(scope="module")
def points(gemma):
    slicings = {"whole": Slicing(), "narrow": Slicing(ffw=8), "short": Slicing(skip=(5, 6))}
    return sweep.sweep(gemma, slicings, TOKENS, context=64)


def test_each_slice_is_scored_as_the_model_it_is(gemma, points):
    small = matformer.slice(gemma, ffw=8)
    assert points[1].nll == pytest.approx(small.score(TOKENS).nll, abs=1e-3)
    assert points[0].nll == pytest.approx(gemma.score(TOKENS).nll, abs=1e-3)
    assert [p.num_layers for p in points] == [8, 8, 6]
    assert points[1].ffw_widths == (8,) * 8
    saved = 3 * 32 * (3 * 64 + 5 * 48 - 8 * 8)
    assert points[0].effective_parameters - points[1].effective_parameters == saved
    assert points[0].cache_bytes == (4 * 6 + 64) * 2 * 2 * 8 * 4  # 4 rings of 6 slots and a global layer; k, v, heads
    assert points[0].weight_bytes == 4 * points[0].parameters


def test_operations_are_what_the_compiler_counts(gemma, points):
    def step(model, token, cache):
        x, cache = model.hidden(token, Places(jnp.zeros((1, 1), jnp.int32)), cache, is_cache_empty=True)
        return model.logits(x), cache

    cache = empty_cache(gemma.config, 1, 8, "float32")
    cost = jax.jit(step).lower(gemma.model, jnp.zeros((1, 1), jnp.int32), cache).compile().cost_analysis()
    assert 0.6 < points[0].flops_per_token / cost["flops"] < 1.4


def test_the_best_of_their_size_are_marked(points):
    by_size = sorted(points, key=lambda p: p.effective_parameters)
    lowest = np.inf
    for point in by_size:
        assert point.is_best == (point.nll < lowest)
        lowest = min(lowest, point.nll)


def test_the_verb_writes_table_and_picture(gemma, tmp_path, capsys, monkeypatch):
    gemma.save(tmp_path / "parent")
    (tmp_path / "text.txt").write_text("hello")
    monkeypatch.setattr(gj.Gemma, "ids", lambda self, text: TOKENS)  # the model has no vocabulary
    (tmp_path / "c.csv").write_text('name,FFN Hidden Dims,Layers Skipped\na,[8]*8,\nb,[8]*6,"5, 6"\n')
    arguments = ["slice", str(tmp_path / "parent"), str(tmp_path / "out"), "--sweep"]
    given = ["--text", str(tmp_path / "text.txt"), "--configs", str(tmp_path / "c.csv")]
    assert main([*arguments, *given]) == 0
    assert "a: " in capsys.readouterr().out
    assert [row["name"] for row in json.loads((tmp_path / "out" / "sweep.json").read_text())] == ["a", "b"]
    assert (tmp_path / "out" / "sweep.md").read_text().count("\n") == 4
    for more, words in (([], "needs --text"), ([*given, "--ffw", "8"], "leave out the others"), (given, "exists")):
        assert main([*arguments, *more]) != 0
        assert words in capsys.readouterr().err


def test_a_picture_is_drawn(points, tmp_path):
    pytest.importorskip("matplotlib", reason="in the bench extra")
    files = sweep.write(points, tmp_path / "out")
    assert files[-1].read_bytes().startswith(b"\x89PNG")


def test_impossible_slices_end_a_sweep_before_it_begins(gemma):
    with pytest.raises(ConfigError, match="skip has layer 3"):
        sweep.sweep(gemma, {"a": Slicing(), "b": Slicing(skip=(3,))}, TOKENS, say=lambda line: pytest.fail(line))


def test_the_default_narrows_all_alike(gemma):
    found = sweep.default_slicings(gemma.config, 4)
    assert list(found) == ["4/4", "3/4", "2/4", "1/4"]
    assert found["4/4"].apply(gemma.config).layers == gemma.config.layers
    assert found["1/4"].ffw[:2] == (16, 12)
