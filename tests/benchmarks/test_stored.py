"""The page of stored weights beside llama.cpp."""

import pytest

from benchmarks import prepare, stored

SAMPLES = {
    "gemma_jax": {"prefill_512": [500.0, 500.0], "decode_1": [25.0, 25.0]},
    "stored_Q8_0": {"prefill_512": [450.0, 450.0], "decode_1": [45.0, 55.0]},
    "llama_cpp_Q8_0": {"decode_1": [50.0, 50.0]},
}
RESULT = {
    "machine": {"cpu": "a CPU", "date": "2026-01-01"},
    "settings": {"threads": 2, "repeats": 2},
    "files": ["Q8_0", "BF16"],
    "medians": {peer: {figure: sum(x) / 2 for figure, x in figures.items()} for peer, figures in SAMPLES.items()},
    "samples": SAMPLES,
    "skipped": {"llama_cpp_BF16": "no environment"},
}


def test_a_goal_is_met_missed_or_not_measured():
    page = stored.page(RESULT)
    assert "| Q8_0: decoding one row, of llama.cpp's speed | 0.8 | 1 | yes |" in page
    assert "| Q8_0: prefill of 512 tokens, of float32's speed | 0.8 | 0.9 | yes |" in page
    assert "| BF16: decoding one row, of llama.cpp's speed | 0.9 | – | not measured |" in page
    assert "20% for the noisiest" in page
    assert page.endswith("- llama_cpp_BF16: skipped: no environment")


def test_every_file_is_one_that_prepare_writes_and_has_a_goal():
    assert set(stored.FILES.values()) == {*prepare.STORED, "demo.gguf"}
    assert set(stored.GOALS) == set(stored.FILES)
    entries = stored.entries_of(["Q8_0"])
    assert [entry.name for entry in entries] == ["gemma_jax", "stored_Q8_0", "llama_cpp_Q8_0"]


def test_without_samples_there_is_no_page():
    with pytest.raises(ValueError, match="nothing was measured"):
        stored.page({**RESULT, "medians": {}, "samples": {}})
