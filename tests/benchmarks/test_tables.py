"""Markdown of a result, and its place in a page."""

import pytest

from benchmarks import tables
from benchmarks.measure import Record, Settings


@pytest.fixture
def result():
    from benchmarks.compare import result_of

    record = Record(skipped={"deepmind": "no environment"}, bandwidth={"gemv": [30e9], "threads": [32e9]})
    for repeat in range(3):
        record.add("gemma_jax", "decode_1", 26.0 + repeat, 13.0)
        record.add("huggingface", "decode_1", 9.0 + repeat, 5.0)
    record.versions["gemma_jax"] = {"jax": "0.10.2"}
    return result_of(record, Settings(repeats=3))


def test_the_tables_hold_medians_ratios_goals_and_reasons(result):
    parts = tables.sections(result)
    assert "| decode batch 1, tokens/s | 27 | 10 |" in parts["medians"]
    assert "DeepMind gemma f32: skipped: no environment" in parts["medians"]
    assert "| decode batch 1, tokens/s | 2.70x |" in parts["ratios"]
    assert "| decode_1 against huggingface | 1.3 | 2.7 | yes |" in parts["goals"]
    assert "32.0 GB/s read (threads)" in parts["goals"]
    assert "gemma_jax f32: jax 0.10.2" in parts["machine"]


def test_the_bound_is_the_fastest_reading_of_all_parameters_once(result):
    assert result["bound"]["bytes_per_step"] == 4 * 268_098_176
    assert result["bound"]["tokens_per_second"] == pytest.approx(32e9 / (4 * 268_098_176))


def test_a_result_survives_json(result):
    import json

    assert tables.sections(json.loads(json.dumps(result))) == tables.sections(result)


def test_filling_a_page_twice_leaves_one_table():
    page = "before\n<!-- benchmark:a -->\n<!-- /benchmark:a -->\nafter\n"
    once = tables.fill(page, {"a": "old"})
    twice = tables.fill(once, {"a": "new"})
    assert "old" in once
    assert "old" not in twice
    assert twice == tables.fill(page, {"a": "new"})
    assert twice.startswith("before\n")
    assert twice.endswith("after\n")


@pytest.mark.parametrize("page", ["", "<!-- benchmark:a -->", "<!-- /benchmark:a --><!-- benchmark:a -->"])
def test_a_page_without_its_markers_is_refused(page):
    with pytest.raises(ValueError, match="<!-- benchmark:a --> followed by"):
        tables.fill(page, {"a": "text"})


def test_the_documentation_has_a_place_for_every_table(result):
    from benchmarks.protocol import ROOT

    page = (ROOT / "docs" / "benchmarks.md").read_text()
    names = [*tables.sections(result), "compile_time", "long_context", "conversion", "vision", "gemma3n"]
    assert "filled" in tables.fill(page, dict.fromkeys(names, "filled"))


@pytest.mark.parametrize(("value", "text"), [(None, "–"), (0.01234, "0.0123"), (12.34, "12.3"), (1553.2, "1,553")])
def test_numbers_show_three_digits_that_count(value, text):
    assert tables.number(value) == text
