"""The picture of a result."""

import pytest

from benchmarks import plot
from benchmarks.compare import result_of
from benchmarks.measure import Record, Settings


@pytest.mark.slow
def test_a_result_becomes_a_png(tmp_path):
    pytest.importorskip("matplotlib")
    record = Record()
    record.add("gemma_jax", "decode_1", 26.0)
    record.add("huggingface", "decode_1", 10.0)
    record.add("huggingface", "peak_mib", 1553.0)
    plot.draw(result_of(record, Settings(repeats=1)), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
