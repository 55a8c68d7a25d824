"""Accelerators by name, what they can do at most, and how they are connected.

Sources of the numbers:
- book: How to Scale Your Model, jax-ml.github.io/scaling-book, tables of the chapters on TPUs and GPUs.
- cloud: docs.cloud.google.com/tpu/docs/v5e, v5p, v6e and tpu7x, tables of key specifications.
- libtpu: what libtpu 0.0.52 reports as the limit when a program does not fit ("Used 34.15G of 15.75G hbm").
- nvidia: the data sheets of the H100 SXM and H200 SXM, without sparsity.
"""

import itertools
import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from gemma_jax.parallel import gpus

GiB = 2**30
_FULL_PLANE, _CUBE = 16, 4  # what an axis of a torus needs for links around: see `Chip.wraps`


@dataclass(frozen=True, kw_only=True)
class Chip:
    """What one device of JAX has: a chip, or one of the two of a tpu7x. None: no source tells."""

    name: str
    platform: Literal["tpu", "gpu"]
    devices_per_chip: int = 1
    hbm_bytes: int  # as sold
    usable_bytes: int  # what a program can have
    bf16_flops: float  # a second, multiplications and additions
    int8_flops: float | None
    hbm_bandwidth: float  # bytes a second
    link_bandwidth: float  # bytes a second one way: of a link to a neighbour, or on GPUs of all links into the node
    network_bandwidth: float  # bytes a second one way, from one device to other nodes or slices
    node_size: int  # devices of a GPU node, or of a TPU host
    shapes: tuple[tuple[int, ...], ...] = ()  # topologies that can be had, smallest first; of GPUs any number

    @property
    def wraps(self) -> int:
        """An axis of a multiple of this many chips has links around its ends (book: "subslices" and cubes)."""
        return _FULL_PLANE if len(self.shapes[0]) == 2 else _CUBE


def _shapes(text: str) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(map(int, shape.split("x"))) for shape in text.split())


_PLANES = _shapes("1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16")  # cloud: v5e, v6e
_CUBES = _shapes("1x1x1 2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16 16x16x16 16x16x24")  # cloud: v5p

CHIPS: Mapping[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip(
            name="v5e",
            platform="tpu",
            hbm_bytes=16 * GiB,  # book
            usable_bytes=int(15.75 * GiB),  # libtpu
            bf16_flops=1.97e14,  # cloud, book
            int8_flops=3.93e14,  # cloud
            hbm_bandwidth=8.1e11,  # book; cloud 8.19e11
            link_bandwidth=4.5e10,  # book, of 5e10 by cloud: 400 GB/s both ways over 4 links
            network_bandwidth=25e9 / 8,  # cloud: 6.4 Tbit/s a pod of 256
            node_size=8,  # cloud
            shapes=_PLANES,
        ),
        Chip(
            name="v5p",
            platform="tpu",
            hbm_bytes=96 * GiB,  # book
            usable_bytes=int(95.73 * GiB),  # libtpu
            bf16_flops=4.59e14,  # cloud, book
            int8_flops=9.18e14,  # book
            hbm_bandwidth=2.765e12,  # cloud
            link_bandwidth=9e10,  # book, of 1e11 by cloud: 1200 GB/s both ways over 6 links
            network_bandwidth=50e9 / 8,  # cloud
            node_size=4,  # cloud
            shapes=_CUBES,
        ),
        Chip(
            name="v6e",
            platform="tpu",
            hbm_bytes=32 * GiB,  # cloud
            usable_bytes=int(31.24 * GiB),  # libtpu
            bf16_flops=9.18e14,  # cloud
            int8_flops=1.836e15,  # cloud
            hbm_bandwidth=1.6e12,  # book; cloud 1.638e12
            link_bandwidth=9e10,  # book, of 1e11 by cloud: 800 GB/s both ways over 4 links
            network_bandwidth=100e9 / 8,  # cloud
            node_size=8,  # cloud
            shapes=_PLANES,
        ),
        Chip(
            name="tpu7x",  # per device: half of a chip, also of its links, which both devices share
            platform="tpu",
            devices_per_chip=2,  # cloud
            hbm_bytes=96 * GiB,  # cloud: 192 a chip
            usable_bytes=int(94.74 * GiB),  # libtpu
            bf16_flops=2.307e15 / 2,  # cloud
            int8_flops=None,
            hbm_bandwidth=7.38e12 / 2,  # cloud
            link_bandwidth=9e10 / 2,  # estimate: links as fast as v5p's, for cloud has 1200 GB/s a chip for both
            network_bandwidth=100e9 / 8 / 2,  # cloud
            node_size=8,  # cloud: 4 chips
            shapes=_CUBES[:-1],  # estimate: those of v5p that libtpu knows
        ),
        Chip(
            name="h100",
            platform="gpu",
            hbm_bytes=80 * 10**9,  # nvidia
            usable_bytes=int(0.75 * 80e9),  # docs.jax.dev, GPU memory allocation: JAX takes 75 % unless told otherwise
            bf16_flops=9.89e14,  # nvidia
            int8_flops=1.979e15,  # nvidia
            hbm_bandwidth=3.35e12,  # nvidia
            link_bandwidth=4.5e11,  # nvidia: NVLink 900 GB/s both ways; book
            network_bandwidth=5e10,  # book: one adapter of 400 Gbit/s a GPU
            node_size=8,  # book
        ),
        Chip(
            name="h200",
            platform="gpu",
            hbm_bytes=141 * 10**9,  # nvidia
            usable_bytes=int(0.75 * 141e9),  # docs.jax.dev, as above
            bf16_flops=9.89e14,  # nvidia
            int8_flops=1.979e15,  # nvidia
            hbm_bandwidth=4.8e12,  # nvidia
            link_bandwidth=4.5e11,  # nvidia
            network_bandwidth=5e10,  # book
            node_size=8,  # book
        ),
    )
}


@dataclass(frozen=True)
class Topology:
    """Connected chips: a slice of TPUs, or a number of GPUs in nodes."""

    chip: Chip
    shape: tuple[int, ...]  # chips along each axis of the torus; of GPUs their number

    @property
    def name(self) -> str:
        """As `topology` reads it."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def num_devices(self) -> int:
        """Devices as JAX counts them."""
        return math.prod(self.shape) * self.chip.devices_per_chip


def names(chip: Chip) -> tuple[str, ...]:
    """Its topologies, smallest first; of GPUs those of one node and examples of more."""
    shapes = chip.shapes or tuple((count,) for count in (1, 2, 4, 8, 16, 32, 64))
    return tuple(Topology(chip, shape).name for shape in shapes)


def chip_named(name: str) -> Chip:
    """The chip of a name such as "v5e". Raises ValueError for one that is not known, and says which are."""
    if name not in CHIPS:
        raise ValueError(f"there is no chip {name!r}; wanted one of {', '.join(CHIPS)}, as in the topology 'v5e:4x4'")
    return CHIPS[name]


def topology(name: str) -> Topology:
    """The topology of a name such as "v5e:4x4", "v5p:2x2x2" or "h100:8".

    Raises ValueError for one that does not exist, and says what does.
    """
    kind, _, size = name.strip().lower().partition(":")
    chip = chip_named(kind)
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", size):
        raise ValueError(f"topology {name!r}: wanted {chip.name}:SIZE, as {', '.join(names(chip))}")
    shape = tuple(map(int, size.split("x")))
    if chip.platform == "gpu":
        if len(shape) != 1 or (shape[0] > chip.node_size and shape[0] % chip.node_size):
            limit = f"1 to {chip.node_size}, or a multiple of {chip.node_size}"
            raise ValueError(f"topology {name!r}: wanted a number of GPUs, {limit}, as {chip.name}:8")
    elif shape not in chip.shapes:
        raise ValueError(f"topology {name!r}: there is no such {chip.name}; there are {', '.join(names(chip))}")
    return Topology(chip, shape)


_WITHOUT_TPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else a second process aborts on a lock
    "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server off Google Cloud
    "TPU_WORKER_HOSTNAMES": "localhost",  # else libtpu complains of these two on standard error
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
}


def devices(of: Topology) -> list[Any]:
    """Devices to compile for, that need not be there; needs libtpu, for GPUs JAX's CUDA plugin and `ptxas`.

    Raises RuntimeError where the compiler is missing, and says what to install.
    """
    if of.chip.platform == "gpu":
        return _gpus(of)
    for name, value in _WITHOUT_TPU.items():
        os.environ.setdefault(name, value)
    try:
        return list(topologies.get_topology_desc(of.name, "tpu").devices)
    except (jax.errors.JaxRuntimeError, NotImplementedError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise RuntimeError(f"{of.name}: libtpu makes no such devices ({reason}); pip install gemma-jax[tpu]") from error


def _gpus(of: Topology) -> list[Any]:
    per_node = min(of.num_devices, of.chip.node_size)
    shape = f"1x{of.num_devices // per_node}x{per_node}"  # slices, nodes, GPUs of a node
    config = gpus.target_config(of.chip.name)
    advice = "needs JAX's CUDA plugin and ptxas: pip install gemma-jax[aot], and CUDA's nvcc package"
    if shutil.which("ptxas") is None:
        raise RuntimeError(f"{of.name}: there is no ptxas in the path; compiling for GPUs that are not there {advice}")
    try:
        return list(topologies.get_topology_desc(platform="cuda", topology=shape, target_config=config).devices)
    except (jax.errors.JaxRuntimeError, NotImplementedError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise RuntimeError(f"{of.name}: compiling for GPUs that are not there {advice} ({reason})") from error


def bandwidth(of: Topology, mesh: Mesh, axes: Sequence[str]) -> float:
    """Bytes a second that one device can receive in an exchange along mesh axes. An estimate.

    TPUs: all links of the torus axes along which the devices of a group lie; both directions only where links around
    the ends make it a ring, and a part where groups share links (book, chapters on TPUs and sharding).
    GPUs: within a node its switch, beyond it the network adapters of a group's GPUs in one node.
    """
    group = _group(mesh, axes)
    if of.chip.platform == "gpu":
        place = {id(device): index for index, device in enumerate(mesh.devices.flat)}
        nodes = [place[id(device)] // of.chip.node_size for device in group]
        if len(set(nodes)) == 1:
            return of.chip.link_bandwidth
        return min(of.chip.link_bandwidth, of.chip.network_bandwidth * nodes.count(nodes[0]))
    if len({getattr(device, "slice_index", 0) for device in group}) > 1:
        return of.chip.network_bandwidth
    along = zip(of.shape, zip(*(device.coords for device in group), strict=True), strict=False)
    links = sum(_links(set(places), size, of.chip.wraps) for size, places in along)
    return of.chip.link_bandwidth * links if links else math.inf  # inf: between the two devices of one chip


def _group(mesh: Mesh, axes: Iterable[str]) -> list[Any]:
    """Devices that differ in these axes only, from the first."""
    wanted = set(axes)
    if not wanted <= set(mesh.axis_names):
        raise ValueError(f"axes {sorted(wanted)} are not all axes of the mesh, {mesh.axis_names}")
    return list(np.asarray(mesh.devices[tuple(slice(None) if axis in wanted else 0 for axis in mesh.axis_names)]).flat)


def _links(places: set[int], size: int, wraps: int) -> float:
    """Links into a device along one torus axis; fewer than one where groups between each other share them."""
    if len(places) < 2:
        return 0
    ordered = sorted(places)
    spacing = max(after - before for before, after in itertools.pairwise(ordered))
    is_ring = size % wraps == 0 and len(places) * spacing == size
    return (2 if is_ring else 1) / spacing
