"""Compiling from shapes, on a model of two layers."""

import dataclasses

import pytest

from benchmarks import compile_time
from gemma_jax.configs.gemma3 import GEMMA3_270M

ONE_TURN = dataclasses.replace(GEMMA3_270M, layers=GEMMA3_270M.layers[:6])


@pytest.mark.slow
@pytest.mark.parametrize("name", compile_time.programs(ONE_TURN, "float32", 16, 256))
def test_a_program_is_timed_without_weights(name):
    times = compile_time.programs(ONE_TURN, "float32", 16, 256)[name]()
    assert times["total"] == pytest.approx(times["trace"] + times["lower"] + times["compile"])
    assert times["stablehlo_bytes"] > 0
