"""Bytes that the planner predicts are those of live arrays, and of compiled programs' arguments."""

import json

import pytest

from gemma_jax import configs
from gemma_jax.nn.cache import cache_bytes
from gemma_jax.nn.logical import LogicalAxisError
from gemma_jax.parallel.rules import SERVE, TRAIN
from gemma_jax.planner import arithmetic
from tests.parallel import runs

CASES = [
    ["gemma3", "data=2,model=4", "decode"],
    ["one key head", "data=2,seq=2,model=2", "decode"],  # its cache is cut along its slots
    ["gemma3", "seq=4,model=2", "prefill"],
    ["gemma3n", "data=2,seq=2,model=2", "decode"],
    ["gemma3", "fsdp=4,model=2", "train"],
    ["gemma3n", "fsdp=4,model=2", "train"],
    ["gemma3n", "data=2,seq=2,model=2", "decode int8"],
    ["gemma3", "fsdp=4,model=2", "lora"],
    ["gemma3n", "fsdp=4,model=2", "lora"],
]


@pytest.fixture(scope="module")
def found():
    return runs.lines("planner/worker.py", json.dumps(CASES))


@pytest.mark.slow
@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda i: " ".join(CASES[i]))
def test_predicted_bytes_are_those_of_live_arrays_and_of_the_compiler(found, case):
    one = found[case]
    assert one["predicted"] == one["abstract"] == one["live"]
    assert one["arguments"] == pytest.approx(one["compiled"], rel=0.05)


def test_one_device_holds_all_of_a_model():
    config = configs.get("gemma-3-1b")
    held = arithmetic.served(config, SERVE, {}, 2, 4096, "bfloat16", "device")
    assert held == {"weights": 2 * 999_885_952, "cache": cache_bytes(config, 2, 4096) + 2 * arithmetic.COUNTER}


def test_int8_halves_the_kernels_alone():
    config = configs.get("gemma-3-1b")
    held = arithmetic.served(config, SERVE, {}, 2, 4096, "int8", "device")
    kernels = 26 * (1152 * (4 + 1 + 1) * 256 + 4 * 256 * 1152 + 3 * 1152 * 6912)
    outputs = 26 * ((4 + 1 + 1) * 256 + 1152 + 2 * 6912 + 1152)  # a scale of two bytes for each
    assert held["weights"] == 2 * 999_885_952 - kernels + 2 * outputs
    assert held["cache"] == cache_bytes(config, 2, 4096) + 2 * arithmetic.COUNTER


def test_27b_is_held_as_its_design_says():
    config = configs.get("gemma-3-27b").decoder
    held = arithmetic.served(config, SERVE, {"model": 16}, 8, 131_072, "bfloat16", "device")
    assert held["weights"] / 2**30 == pytest.approx(3.147, abs=1e-3)
    assert held["cache"] / 2**30 == pytest.approx(5.203, abs=1e-3)
    trained = arithmetic.trained(config, TRAIN, {"fsdp": 64, "model": 4})
    assert sum(trained.values()) / 2**30 == pytest.approx(1.194, abs=1e-3)


def test_weights_that_a_mesh_does_not_divide_are_named():
    with pytest.raises(LogicalAxisError, match="q_heads is 4"):
        arithmetic.served(configs.get("gemma-3-1b"), SERVE, {"model": 8}, 1, 1024, "bfloat16", "device")
