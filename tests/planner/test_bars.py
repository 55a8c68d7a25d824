"""What the 27B and E4B must take on TPUs, compiled by libtpu alone: `pytest -m aot tests/planner`, some minutes."""

import dataclasses
import os

import pytest

from gemma_jax import configs
from gemma_jax.configs.config import DecoderConfig
from gemma_jax.parallel import hardware
from gemma_jax.parallel.hardware import GiB
from gemma_jax.planner import least, search
from gemma_jax.planner.plan import ProgramPlan, Question, plan
from tests import tpu
from tests.kernels import h100

LONG = 131_072
ALLOWED = 1.10  # times the least bytes of collectives
DECODE_SECONDS, TRAIN_SECONDS = 60, 300  # to compile on two cores
SLOWER = float(os.environ.get("GEMMA_JAX_SLOWER", "1"))  # a machine that others use: times as many seconds


def of(name: str, num_layers: int | None = None) -> DecoderConfig:
    """A model's decoder, or its first layers, which have the shapes of all others."""
    config = configs.get(name).decoder
    return dataclasses.replace(config, layers=config.layers[:num_layers])


def sent(program: ProgramPlan, kind: str) -> int:
    """Bytes of one device, in collectives of a kind."""
    assert program.exchanges is not None
    sizes = [one.nbytes for one in program.exchanges if one.kind == kind]
    assert None not in sizes
    return sum(filter(None, sizes))


@pytest.mark.slow
@tpu.needs_libtpu
def test_27b_decodes_128k_tokens_of_8_rows_on_16_v5e():
    """One program, compiled once: it fits, copies no cache, gathers nothing, and is compiled in a minute."""
    config = of("gemma-3-27b")
    found = plan(Question(model="gemma-3-27b", topology="v5e:4x4", mesh="model=16", context=LONG, batch=8,
                          config=config))  # fmt: skip
    (program,) = found.programs
    assert found.fits
    assert program.peak is not None
    assert program.peak < 8.6 * GiB
    assert program.temporaries is not None
    assert program.temporaries < 0.02 * program.held["cache"]
    assert program.arguments == pytest.approx(sum(program.held.values()), rel=0.05)
    assert program.exchanges is not None
    assert {one.kind for one in program.exchanges} == {"all-reduce"}
    assert sent(program, "all-reduce") <= ALLOWED * least.decoding(config, {"model": 16}, batch=8)
    assert program.compile_seconds is not None
    assert program.compile_seconds <= SLOWER * DECODE_SECONDS


@pytest.mark.slow
@tpu.needs_libtpu
@pytest.mark.parametrize("mesh", ["data=2,model=8", "seq=4,model=4"])
def test_collectives_of_other_meshes_are_near_the_least(mesh):
    """One turn of the pattern: five local layers, and one whose cache is cut along `seq`."""
    config = of("gemma-3-27b", 6)
    found = plan(Question(model="few", topology="v5e:4x4", mesh=mesh, context=LONG, batch=8, config=config))
    (program,) = found.programs
    assert program.exchanges is not None
    assert {one.kind for one in program.exchanges} == {"all-reduce"}
    wanted = least.decoding(config, found.mesh, batch=8)
    assert sent(program, "all-reduce") <= ALLOWED * wanted


@pytest.mark.slow
@tpu.needs_libtpu
def test_prefill_of_128k_has_small_temporaries():
    """One turn of the pattern, all its temporaries together. Of 62 layers XLA gathers ffws far ahead: 3.7 GiB together,
    the largest of them 168 MiB.
    """
    config = of("gemma-3-27b", 6)
    found = plan(Question(model="few", topology="v5e:8x8", mesh="seq=16,model=4", purpose="prefill", context=LONG,
                          config=config))  # fmt: skip
    for program in found.programs:
        assert program.temporaries is not None
        assert program.temporaries < 2 * GiB  # all of them together


@pytest.mark.slow
@tpu.needs_libtpu
def test_e4b_with_its_pieces_on_the_host_fits_one_v5e_at_32k():
    found = plan(Question(model="gemma-3n-e4b", topology="v5e:1x1", context=32_768, ple="host"))
    assert found.fits
    assert found.host_bytes == 262_144 * 35 * 256 * 2
    assert found.programs[0].peak is not None


@pytest.mark.slow
@tpu.needs_libtpu
def test_27b_trains_on_256_v5e():
    found = plan(Question(model="gemma-3-27b", topology="v5e:16x16", mesh="fsdp=64,model=4", purpose="train",
                          context=8192, batch=256))  # fmt: skip
    (program,) = found.programs
    assert found.fits
    assert program.compile_seconds is not None
    assert program.compile_seconds <= SLOWER * TRAIN_SECONDS


@pytest.mark.slow
@tpu.needs_libtpu
def test_an_adapter_of_27b_is_trained_where_the_whole_is_not():
    """One turn of the pattern, compiled; by arithmetic all 62 layers."""
    asked = Question(model="few", topology="v5e:2x2", mesh="fsdp=4", purpose="lora", context=2048, batch=4,
                     config=of("gemma-3-27b", 6))  # fmt: skip
    found = plan(asked)
    (program,) = found.programs
    assert found.fits
    assert program.arguments == pytest.approx(sum(program.held.values()), rel=0.05)
    assert program.exchanges is not None
    assert {one.axes for one in program.exchanges} == {("fsdp",)}
    whole = dataclasses.replace(asked, topology="v5e:4x4", mesh="fsdp=16", batch=16, is_compiled=False, config=None,
                                model="gemma-3-27b")  # fmt: skip
    assert plan(whole).fits
    assert not plan(dataclasses.replace(whole, purpose="train")).fits


@pytest.mark.slow
@tpu.needs_libtpu
def test_int8_halves_what_decoding_reads():
    """Kernels are converted as they are multiplied: no bfloat16 copy of one lies in HBM."""
    few = Question(model="few", topology="v5e:1x1", context=4096, config=of("gemma-3-1b", 6))
    wide, small = plan(few), plan(dataclasses.replace(few, dtype="int8"))
    kernels = 6 * (1152 * 6 * 256 + 4 * 256 * 1152 + 3 * 1152 * 6912)
    saved = wide.programs[0].held["weights"] - small.programs[0].held["weights"]
    assert saved == pytest.approx(kernels, rel=0.01)
    temporaries = small.programs[0].temporaries
    assert temporaries is not None
    assert temporaries < 2 * 1152 * 6912


@pytest.mark.slow
@tpu.needs_libtpu
def test_the_smallest_topology_is_found():
    found = search.search(Question(model="few", topology="", context=4096, config=of("gemma-3-27b", 6)),
                          hardware.CHIPS["v5e"], 4)  # fmt: skip
    assert found[0].topology.name == "v5e:1x1"
    asked = Question(model="gemma-3-12b", topology="", context=4096, is_compiled=False)
    assert [one.topology.name for one in search.search(asked, hardware.CHIPS["v5e"], 4)] == ["v5e:2x2"] * 2
    assert search.search(asked, hardware.CHIPS["v5e"], 1) == []


@pytest.mark.slow
@h100.needs_cuda_plugin
def test_a_model_is_planned_for_two_h100():
    found = plan(Question(model="few", topology="h100:2", mesh="model=2", context=4096, config=of("gemma-3-1b", 6)))
    (program,) = found.programs
    assert found.fits
    assert program.exchanges is not None
    assert "all-reduce" in {one.kind for one in program.exchanges}
