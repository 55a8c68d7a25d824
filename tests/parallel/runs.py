"""Starts several processes of `process_worker` on this machine."""

import atexit
import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Ended:
    """A process that has ended."""

    code: int
    output: str
    errors: str
    when: float  # time.time()

    @property
    def said(self) -> list[Any]:
        """The values that it has said, among what gloo prints."""
        lines = self.output.splitlines()
        return [json.loads(line.removeprefix("said ")) for line in lines if line.startswith("said ")]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@functools.cache
def _cache() -> str:
    folder = tempfile.mkdtemp(prefix="gemma_jax-tests-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def start(count: int, *, devices: int = 2, port: int | None = None, indices=None, **task) -> list[subprocess.Popen]:
    """`count` processes, or those with `indices` of them, with `devices` virtual devices each.

    Programs are compiled without optimisation, and once for all runs of a session: compiling is most of what they do.
    """
    port = free_port() if port is None else port
    script = str(ROOT / "tests/parallel/process_worker.py")
    indices = range(count) if indices is None else indices
    tasks = [json.dumps({"index": index, "count": count, "port": port, **task}) for index in indices]
    return launch([[script, each] for each in tasks], devices)


def launch(commands: list[list[str]], devices: int = 2) -> list[subprocess.Popen]:
    """A Python process for each command."""
    environment = {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "checkpoints", "kernels")),
        "JAX_COMPILATION_CACHE_DIR": _cache(),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    return [
        subprocess.Popen(
            [sys.executable, *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            cwd=ROOT,
        )
        for command in commands
    ]  # fmt: skip


def wait(processes: list[subprocess.Popen], timeout_s: float = 120, frozen: int = 0) -> list[Ended]:
    """All of them ended, in the order of `processes`. Those that have not after `timeout_s` are killed, and so are the
    last ones once all but `frozen` have ended.
    """
    ended: dict[int, float] = {}
    deadline = time.monotonic() + timeout_s
    while len(ended) < len(processes) - frozen and time.monotonic() < deadline:
        for i, process in enumerate(processes):
            if i not in ended and process.poll() is not None:
                ended[i] = time.time()
        time.sleep(0.02)
    for process in processes:
        process.kill()
    results = [process.communicate() for process in processes]
    return [
        Ended(process.returncode, *result, ended.get(i, float("inf")))
        for i, (process, result) in enumerate(zip(processes, results, strict=True))
    ]


def lines(script: str, *arguments: str, devices: int = 8) -> list[Any]:
    """What a script of `tests` writes, a line of JSON each, in one process with so many devices; it must end well."""
    (ended,) = wait(launch([[str(ROOT / "tests" / script), *arguments]], devices), timeout_s=900)
    assert ended.code == 0, ended.errors[-3000:]
    return [json.loads(line) for line in ended.output.splitlines()]


def run(count: int, **task) -> list[Ended]:
    """As `start` and `wait`; all must end well."""
    ended = wait(start(count, **task))
    for each in ended:
        assert each.code == 0, each.errors[-3000:]
    return ended
