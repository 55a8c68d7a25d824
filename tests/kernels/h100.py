"""Kernels compiled for an H100 that need not be there: JAX's CUDA plugin and `ptxas` alone make them.

What is proven is that a kernel lowers, compiles, and fits into registers; not how fast it is. One compilation by hand:
`python -m tests.kernels.h100 '{"kernel": "forward", "head_width": 256}'`, with the fields of `Case`.
"""

import collections
import dataclasses
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gemma_jax.parallel import gpus
from gemma_kernels.gpu import window_attention, window_backward
from gemma_kernels.gpu.window import Tile, Window

PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
NAME, CONFIG = gpus.MODELS["h100"].name, gpus.target_config("h100")

# XLA calls ptxas with <PTX> -o <cubin> ..., and reads what it complains of to learn which PTX it knows.
WRAPPER = """#!/bin/sh
{ptxas} -v "$@" 2>{folder}/last
code=$?
cat {folder}/last >>{folder}/log
cat {folder}/last >&2
cp "$3" {folder}/cubin 2>/dev/null
exit $code
"""


def has_plugin() -> bool:
    """Whether JAX's CUDA plugin is installed; it needs no CUDA library and no GPU."""
    return importlib.util.find_spec("jax_plugins") is not None and any(map(importlib.util.find_spec, PLUGINS))


def needs_cuda_plugin(test: Any) -> Any:
    """Marks a test as one of `make test-aot`, which has the plugin; ptxas must be there too."""
    is_missing = not has_plugin() or shutil.which("ptxas") is None
    skip = pytest.mark.skipif(is_missing, reason="needs ptxas, and JAX's CUDA plugin: aot extra, make test-aot")
    return pytest.mark.aot(skip(test))


@dataclass(frozen=True, kw_only=True)
class Case:
    """One kernel of window attention: "forward", "dq" or "dkv". tile: None takes the default one."""

    kernel: str
    head_width: int
    dtype: str = "bfloat16"
    window: int | None = 1024
    softcap: float | None = None
    is_packed: bool = False
    tile: dict[str, int] | None = None
    heads: tuple[int, int] = (8, 4)  # of queries and of keys
    num_tokens: int = 8192


@dataclass(frozen=True)
class Report:
    """What ptxas said, and the SASS instructions of note by name, if `cuobjdump` is installed."""

    registers: int
    spilled_bytes: int
    seconds: float
    instructions: dict[str, int]


def report(case: Case) -> Report:
    """Compiles in a process of its own, where ptxas is wrapped to tell more. Raises RuntimeError if that fails."""
    with tempfile.TemporaryDirectory() as folder:
        log, wrapper = Path(folder, "log"), Path(folder, "bin", "ptxas")
        wrapper.parent.mkdir()
        wrapper.write_text(WRAPPER.format(ptxas=shutil.which("ptxas"), folder=folder))
        wrapper.chmod(0o755)
        flags = f"--xla_gpu_cuda_data_dir={folder} --xla_gpu_autotune_level=0"
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": flags,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "TF_CPP_MIN_LOG_LEVEL": "3",
        }
        code = f"from tests.kernels import h100; h100.compile_case({json.dumps(dataclasses.asdict(case))!r})"
        start = time.perf_counter()
        run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - start
        if run.returncode:
            told = log.read_text() if log.exists() else ""
            raise RuntimeError(f"{case} does not compile: {run.stderr[-3000:]}\n{told}")
        return _read(log.read_text(), Path(folder, "cubin"), seconds)


def _read(log: str, cubin: Path, seconds: float) -> Report:
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    registers = re.findall(r"Used (\d+) registers", log)
    instructions: collections.Counter[str] = collections.Counter()
    if shutil.which("cuobjdump"):
        sass = subprocess.run(["cuobjdump", "-sass", cubin], capture_output=True, text=True, check=True).stdout
        instructions.update(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9]+)", sass, re.MULTILINE))
    return Report(max(map(int, registers)), sum(map(int, spills)), seconds, dict(instructions))


def compile_case(text: str) -> None:
    """In the process that `report` starts: only the compilation, whose traces are ptxas's."""
    case = Case(**json.loads(text))
    device = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=CONFIG).devices[0]
    mesh = Mesh(np.array([device]), ("one",))
    where = NamedSharding(mesh, PartitionSpec())
    with jax.set_mesh(mesh):
        jax.jit(kernel_call(case)).lower(*shapes(case, where)).compile()


def lowered(case: Case) -> str:
    """The kernel's StableHLO for CUDA: Triton's own IR is made by then. Needs neither the plugin nor ptxas."""
    calls = ("triton_kernel_call", "__gpu$xla.gpu.triton")
    checks = [jax.export.DisabledSafetyCheck.custom_call(call) for call in calls]
    device = jax.sharding.AbstractDevice(device_kind=NAME, num_cores=132, platform="gpu")
    kinds = (jax.sharding.AxisType.Auto,)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("one",), kinds, abstract_device=device)):
        export = jax.export.export(jax.jit(kernel_call(case)), platforms=["cuda"], disabled_checks=checks)
        return export(*shapes(case, None)).mlir_module()


def shapes(case: Case, where: NamedSharding | None) -> list[jax.ShapeDtypeStruct]:
    """The arrays of a kernel: q, k, v, for gradients also d_out, log_sum and delta, and at last the segments."""
    (heads, key_heads), rows = case.heads, case.num_tokens
    q, k = (1, heads, rows, case.head_width), (1, key_heads, rows, case.head_width)
    dtype = jnp.dtype(case.dtype)
    found = [(q, dtype), (k, dtype), (k, dtype)]
    if case.kernel != "forward":
        found += [(q, dtype), (q[:3], jnp.float32), (q[:3], jnp.float32)]
    found += [((1, rows), jnp.int32)] * (2 * case.is_packed)
    return [jax.ShapeDtypeStruct(shape, dtype, sharding=where) for shape, dtype in found]


def kernel_call(case: Case):
    """A function of the arrays that `shapes` describes."""
    kind = Window(case.window, case.softcap)
    default = window_attention.default_blocks(case.head_width, jnp.dtype(case.dtype))
    tile = getattr(default, case.kernel) if case.tile is None else Tile(**case.tile)

    def call(*arrays):
        arrays, segments = (arrays[:-2], arrays[-2:]) if case.is_packed else (arrays, None)
        if case.kernel == "forward":
            return window_attention._forward(*arrays, segments, kind, tile, False)
        if case.kernel == "dq":
            return window_backward.query_gradient(arrays, segments, kind, tile, False)
        return window_backward.key_gradients(arrays, segments, kind, tile, False)

    return call


if __name__ == "__main__":
    sys.stdout.write(f"{report(Case(**json.loads(sys.argv[1])))}\n")
