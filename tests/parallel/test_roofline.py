"""Least times of a step from its work; numbers worked out by hand."""

import dataclasses

import pytest

from gemma_jax.parallel import hardware
from gemma_jax.parallel.hlo import Collective, Operations
from gemma_jax.parallel.hlo_text import Executions
from gemma_jax.parallel.roofline import Work, roofline, seconds
from tests.parallel.test_hardware import mesh

V5E = hardware.topology("v5e:4x4")
MESH = mesh(V5E, (1, 16), ("data", "model"))
SUM = Collective("all-reduce", 86_016, Executions(125), ("model",), 16, "layer")
DECODE = Work(  # Gemma 3 27B at 128K, 8 sequences over 16 chips, ring caches
    operations=Operations({"bf16": 38_181_273_600}, {}, False),
    hbm_bytes={"weights": 27_009_346_304 * 2 // 16, "cache": 8 * 11_173_625_856 // 16},
    collectives=(SUM,),
)


def test_decoding_27b_at_128k_is_bound_by_memory():
    found = roofline(DECODE, V5E, MESH)
    assert found.compute == pytest.approx(38_181_273_600 / 1.97e14)
    assert found.memory == pytest.approx(11.07e-3, rel=1e-3)
    assert found.communication == pytest.approx(0.224e-3, rel=1e-3)
    assert found.by_axes == {("model",): found.communication}
    assert (found.bound, found.seconds, found.unknown) == ("memory", found.memory, ())
    assert found.seconds_without_overlap == found.compute + found.memory + found.communication


@pytest.mark.parametrize(
    ("kind", "share"),
    [
        ("all-gather", 3 / 4),
        ("reduce-scatter", 3 / 4),
        ("all-reduce", 3 / 2),
        ("all-to-all", 1),
        ("collective-permute", 2),
    ],
)
def test_times_of_collectives_on_two_links(kind, share):
    collective = Collective(kind, 9 * 10**10, Executions(1), ("model",), 4, "")
    assert seconds(collective, V5E, 2 * V5E.chip.link_bandwidth) == pytest.approx(share)


def test_int8_products_run_at_their_own_peak_where_it_is_known():
    work = dataclasses.replace(DECODE, operations=Operations({"s8": 10**15}, {}, False))
    assert roofline(work, V5E, MESH).compute == pytest.approx(1e15 / 3.93e14)
    topology = hardware.topology("tpu7x:2x2x1")
    found = roofline(work, topology, mesh(topology, (1, 8), ("data", "model")))
    assert found.compute == pytest.approx(2e15 / 2.307e15)
    assert "peak of tpu7x for s8" in found.unknown[0]


def test_what_is_not_known_is_said():
    loop = dataclasses.replace(SUM, executions=Executions(None))
    nowhere = dataclasses.replace(SUM, axes=None)
    operations = Operations({}, {"tpu_custom_call": 3}, False)
    found = roofline(dataclasses.replace(DECODE, operations=operations, collectives=(loop, nowhere)), V5E, MESH)
    assert (found.compute, found.communication) == (0, 0)
    assert found.unknown == (
        "how often the all-reduce of layer runs",
        "the axes of the all-reduce of layer",
        "operations of 3 x tpu_custom_call",
    )


def test_a_program_that_cannot_be_read_leaves_memory():
    found = roofline(dataclasses.replace(DECODE, operations=None, collectives=None), V5E, MESH)
    assert (found.compute, found.communication, found.bound) == (None, None, "memory")
    assert found.seconds == found.memory == found.seconds_without_overlap
    assert len(found.unknown) == 2
