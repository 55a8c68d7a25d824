"""The command line as a process of its own, on the real 270M."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow


def gemma_jax(*arguments: str, given: str = "") -> str:
    command = [sys.executable, "-m", "gemma_jax", *arguments]
    done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_demo_knows_the_capital_of_japan():
    assert gemma_jax("generate", "The capital of Japan is", "-n", "8").startswith("The capital of Japan is Tokyo")


def test_chat_and_score_run():
    answer = json.loads(gemma_jax("chat", "--json", "-n", "8", "--seed", "1", given="Hi\n"))
    assert set(answer) == {"text", "finish_reason"}
    assert "perplexity" in gemma_jax("score", "The quick brown fox jumps over the lazy dog.")
