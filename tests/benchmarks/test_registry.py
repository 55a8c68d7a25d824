"""Which peers are measured, where they live, and why one is not."""

import dataclasses
import sys
from pathlib import Path

import pytest

from benchmarks.registry import ENTRIES, absence, chosen, python_of

US, HUGGINGFACE = ENTRIES[0], ENTRIES[1]


def test_peers_come_in_the_order_asked_for():
    assert [entry.name for entry in chosen("huggingface, gemma_jax")] == ["huggingface", "gemma_jax"]
    assert chosen("all") == list(ENTRIES)


@pytest.mark.parametrize("names", ["", "pytorch", "huggingface,torch"])
def test_unknown_peers_are_refused_with_those_there_are(names):
    with pytest.raises(ValueError, match="there are gemma_jax, huggingface"):
        chosen(names)


def test_a_variable_names_a_peers_python_and_we_run_in_our_own():
    assert python_of(HUGGINGFACE, {"GEMMA_BENCH_PYTHON_HUGGINGFACE": "/a/python"}) == Path("/a/python")
    assert python_of(US, {}) == Path(sys.executable)
    assert python_of(HUGGINGFACE, {}).parts[-4:] == (".venvs", "huggingface", "bin", "python")


def test_both_llama_cpp_columns_share_an_environment():
    assert len({entry.variable for entry in ENTRIES if entry.module == "llama_cpp"}) == 1


def test_a_missing_environment_is_a_reason_that_says_what_to_do(tmp_path):
    reason = absence(HUGGINGFACE, tmp_path, {"GEMMA_BENCH_PYTHON_HUGGINGFACE": "/no/python"})
    assert reason is not None
    assert "setup_peers.sh huggingface" in reason
    assert "GEMMA_BENCH_PYTHON_HUGGINGFACE" in reason


def test_missing_weights_are_a_reason_that_says_what_to_do(tmp_path):
    reason = absence(dataclasses.replace(US, model="weights"), tmp_path, {})
    assert reason is not None
    assert "benchmarks.prepare" in reason


def test_nothing_stands_against_a_peer_with_environment_and_weights(tmp_path):
    (tmp_path / "weights").touch()
    assert absence(dataclasses.replace(US, model="weights"), tmp_path, {}) is None
