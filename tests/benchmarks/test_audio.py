"""The benchmark of the conformer measures the real one, and says so."""

from benchmarks import audio
from gemma_jax import configs


def test_it_measures_the_real_tower():
    assert audio.config().audio == configs.get("gemma-3n-e2b").audio
    assert audio.config().num_layers == 1


def test_the_table_has_both_peers_and_the_ratio():
    row = {"seconds": [2.0, 4.0, 3.0], "first_seconds": 5.0, "peak_mib": 100.0}
    peers = {"gemma_jax": row, "huggingface": {**row, "seconds": [6.0, 6.0, 6.0]}}
    text = audio.markdown(
        {"peers": peers, "machine": {"cpu": "some"}, "threads": 2, "largest_difference": 1e-6, "scale": 2.0}
    )
    assert "Medians of 3 passes" in text
    assert "Speed 2.00 times Hugging Face's" in text
