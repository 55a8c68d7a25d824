"""The benchmark of the tower: both peers see the same, on a small shape; the real size is what it asks for."""

import sys

import pytest

from benchmarks import vision


def test_it_measures_the_real_tower():
    config = vision.config()
    assert (config.vision.num_layers, config.vision.image_size, config.vision.num_soft_tokens) == (27, 896, 256)
    assert config.num_layers == 1


@pytest.mark.slow
@pytest.mark.parity
def test_both_peers_see_the_same(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setenv("GEMMA_BENCH_PYTHON_HUGGINGFACE", sys.executable)
    small = vision.config().replace_all([("vision.num_layers", 2), ("vision.width", 32), ("vision.ffw_width", 48)])
    vision.make(tmp_path / "model", small)
    result = vision.measure(tmp_path / "model", 896, threads=1, repeats=1)
    assert result["largest_difference"] < 5e-5
    assert all(row["seconds"][0] > 0 and row["peak_mib"] > 100 for row in result["peers"].values())
    text = vision.markdown({**result, "machine": {"cpu": "some"}, "threads": 1})
    assert "times Hugging Face's" in text
