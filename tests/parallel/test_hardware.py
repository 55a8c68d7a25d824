"""Accelerators by name, and the bandwidth between devices as their places tell."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from gemma_jax.parallel import hardware
from tests import tpu


def mesh(topology: hardware.Topology, shape: tuple[int, ...], axes: tuple[str, ...]) -> SimpleNamespace:
    """A mesh of devices that have only places, in row-major order."""
    places = [place for place in np.ndindex(*topology.shape) for _ in range(topology.chip.devices_per_chip)]
    devices = np.empty(len(places), object)
    devices[:] = [SimpleNamespace(coords=place) for place in places]
    return SimpleNamespace(devices=devices.reshape(shape), axis_names=axes)


@pytest.mark.parametrize("name", [name for chip in hardware.CHIPS.values() for name in hardware.names(chip)])
def test_every_topology_has_the_name_it_is_read_from(name):
    assert hardware.topology(name).name == name


def test_a_tpu7x_chip_is_two_devices():
    assert hardware.topology("tpu7x:2x2x1").num_devices == 8
    assert hardware.topology("v5p:2x2x1").num_devices == 4
    assert hardware.topology("h100:16").num_devices == 16


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v9:4x4", "no chip 'v9'; wanted one of v5e, v5p"),
        ("v5e", "wanted v5e:SIZE, as v5e:1x1, v5e:2x2"),
        ("v5e:4x", "wanted v5e:SIZE"),
        ("v5e:3x3", "no such v5e; there are v5e:1x1, .*v5e:16x16"),
        ("v5p:4x4", "no such v5p; there are .*v5p:2x2x1"),
        ("h100:12", "1 to 8, or a multiple of 8"),
        ("h100:2x4", "wanted a number of GPUs"),
    ],
)
def test_a_topology_that_does_not_exist_is_refused_with_those_that_do(name, message):
    with pytest.raises(ValueError, match=message):
        hardware.topology(name)


def test_gpus_cannot_be_made_without_ptxas(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match="h100:8: there is no ptxas in the path"):
        hardware.devices(hardware.topology("h100:8"))


def test_no_program_can_have_more_memory_than_there_is():
    for chip in hardware.CHIPS.values():
        assert 0.7 * chip.hbm_bytes < chip.usable_bytes < chip.hbm_bytes


@pytest.mark.parametrize(
    ("name", "shape", "along", "links"),
    [
        ("v5e:16x16", (16, 16), "b", 2),  # a ring
        ("v5e:16x16", (16, 16), "ab", 4),  # rings both ways
        ("v5e:4x4", (4, 4), "b", 1),  # a line: no links around
        ("v5e:4x4", (1, 16), "b", 2),  # a plane without links around
        ("v5e:8x16", (8, 16), "a", 1),
        ("v5e:8x16", (8, 16), "b", 2),
        ("v5e:16x16", (64, 4), "b", 1),  # a part of a ring is a line
        ("v5p:4x4x4", (16, 4), "b", 2),
        ("v5p:4x4x4", (16, 4), "a", 4),
        ("v5p:2x2x2", (1, 8), "b", 3),
    ],
)
def test_links_follow_from_the_places_of_devices(name, shape, along, links):
    topology = hardware.topology(name)
    found = hardware.bandwidth(topology, mesh(topology, shape, ("a", "b")), tuple(along))
    assert found == links * topology.chip.link_bandwidth


def test_groups_between_each_other_share_links():
    topology = hardware.topology("v5e:16x16")
    between = mesh(topology, (16, 4, 4), ("a", "b", "c"))
    assert hardware.bandwidth(topology, between, ("b",)) == 2 * topology.chip.link_bandwidth / 4


def test_two_devices_of_a_chip_need_no_link():
    topology = hardware.topology("tpu7x:2x2x1")
    assert hardware.bandwidth(topology, mesh(topology, (4, 2), ("a", "b")), ("b",)) == float("inf")


@pytest.mark.parametrize(
    ("shape", "along", "wanted"),
    [((2, 8), "b", 4.5e11), ((2, 8), "a", 5e10), ((2, 8), "ab", 4e11), ((4, 4), "a", 1e11)],
)
def test_gpus_of_several_nodes_share_their_network_adapters(shape, along, wanted):
    topology = hardware.topology("h100:16")
    assert hardware.bandwidth(topology, mesh(topology, shape, ("a", "b")), tuple(along)) == wanted


def test_slices_are_connected_by_the_network():
    topology = hardware.topology("v5e:2x2")
    devices = np.array([SimpleNamespace(coords=(0, 0), slice_index=index) for index in range(2)])
    slices = SimpleNamespace(devices=devices, axis_names=("replica",))
    assert hardware.bandwidth(topology, slices, ("replica",)) == topology.chip.network_bandwidth


def test_an_axis_the_mesh_has_not_is_refused():
    topology = hardware.topology("v5e:4x4")
    with pytest.raises(ValueError, match="'c'"):
        hardware.bandwidth(topology, mesh(topology, (4, 4), ("a", "b")), ("c",))


@tpu.needs_libtpu
@pytest.mark.parametrize("name", ["v5e:1x1", "v5e:4x4", "v5p:2x2x2", "v6e:2x4", "tpu7x:2x2x1"])
def test_libtpu_makes_the_devices(name):
    topology = hardware.topology(name)
    devices = hardware.devices(topology)
    assert len(devices) == topology.num_devices
    whole = jax.make_mesh((len(devices),), ("x",), devices=devices)
    lines = sum(size > 1 for size in topology.shape)
    assert hardware.bandwidth(topology, whole, ("x",)) == (lines * topology.chip.link_bandwidth or float("inf"))
