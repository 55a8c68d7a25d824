"""The conversion benchmark's source and its figures, on a small shape."""

import pytest

from benchmarks import conversion
from gemma_jax import configs
from gemma_jax.configs.gemma3 import GEMMA3_270M


@pytest.fixture
def small(monkeypatch):
    changes = [("vocab_size", 64), ("width", 32), ("layers", GEMMA3_270M.layers[:2]), ("layers.*.ffw_width", 64)]
    config = GEMMA3_270M.replace_all(changes)
    monkeypatch.setattr(configs, "get", lambda name: config)


def test_a_run_tells_seconds_bytes_and_peak_of_a_whole_conversion(tmp_path, small):
    largest = conversion.make(tmp_path / "source", "small")
    assert largest == 2 * 32 * 1024  # bfloat16 of 4 heads of 256
    row = conversion.run_one(str(tmp_path / "source"), str(tmp_path / "out.gguf"), {"to": "gguf", "quantize": "q8_0"})
    assert 0 < row["bytes"] < (tmp_path / "out.gguf").stat().st_size
    assert row["seconds"] > 0
    assert row["peak_mib"] > 1
    result = {
        "model": "small",
        "source_bytes": 10**9,
        "largest_mib": 1.0,
        "bound_mib": 503.0,
        "machine": {"cpu": "some"},
        "runs": {"a to b": {**row, "seconds": 2.0, "mb_per_second": 500.0, "bytes": 3e9, "peak_mib": 400.0}},
    }
    assert "| a to b | 2 | 500 | 3 | 400 |" in conversion.markdown(result)
