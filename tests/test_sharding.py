"""Weights land on the shards of a mesh, each process reads what it holds, and a save is restored on another mesh."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gemma_checkpoints
import gemma_jax as gj
from gemma_jax import matformer
from gemma_jax.nn.paths import weights

ROOT = Path(__file__).parent.parent
DEVICES = 8


def run(count: int, **task) -> list[int]:
    """Runs `count` processes with DEVICES devices in all; the bytes each read."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = f"--xla_force_host_platform_device_count={DEVICES // count}"
    path = os.pathsep.join(str(ROOT / part) for part in (".", "checkpoints", "kernels"))
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    workers = []
    for index in range(count):
        arguments = json.dumps({"index": index, "count": count, "port": port, **task})
        command = [sys.executable, str(ROOT / "tests/sharded_worker.py"), arguments]
        workers.append(
            subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
            )
        )
    results = [worker.communicate(timeout=240) for worker in workers]
    for worker, (_, errors) in zip(workers, results, strict=True):
        assert worker.returncode == 0, errors[-3000:]
    return [int(output.split()[-1]) for output, _ in results]


def values(source: Path) -> dict[str, np.ndarray]:
    model = gj.load(source, dtype="float32").model
    return {path: place.view(np.asarray(place.param[...])) for path, place in weights(model).items()}


def assert_same(found, wanted):
    assert set(found) == set(wanted)
    for path, value in wanted.items():
        np.testing.assert_array_equal(found[path].view(np.uint32), value.view(np.uint32), err_msg=path)


@pytest.mark.slow
def test_one_process_with_eight_devices_saves_and_restores_on_any_mesh(model_folder, tmp_path):
    run(1, source=str(model_folder), mesh={"data": 2, "model": 4}, save=str(tmp_path / "saved"))
    run(1, source=str(tmp_path / "saved"), mesh={"data": 4, "model": 2}, values=str(tmp_path / "values.npz"))
    wanted = values(model_folder)
    with np.load(tmp_path / "values.npz") as found:
        assert_same(dict(found), wanted)
    assert_same(values(tmp_path / "saved"), wanted)


@pytest.mark.slow
def test_a_slice_of_a_model_on_eight_devices_is_the_slice(tiny_3n, tmp_path):
    gemma = gj.Gemma(tiny_3n.config, tiny_3n)
    gemma.save(tmp_path / "whole")
    run(1, source=str(tmp_path / "whole"), mesh={"data": 2, "model": 4}, slice=str(tmp_path / "logits.npz"))
    wanted = matformer.slice(gemma, ffw=24, skip=(5, 6)).logits(np.arange(16).reshape(2, 8))
    with np.load(tmp_path / "logits.npz") as found:
        for name in ("own", "shared"):
            np.testing.assert_allclose(found[name], wanted, atol=2e-5, err_msg=name)


@pytest.mark.slow
def test_two_processes_read_each_their_part_and_save_together(model_folder, tmp_path):
    with gemma_checkpoints.open(model_folder) as reader:
        size = sum(info.nbytes for info in reader.tensors.values())
    read = run(2, source=str(model_folder), mesh={"model": 2, "data": 4}, save=str(tmp_path / "saved"))
    assert max(read) < 0.75 * size  # norms and the rows that tell columns apart are read by both
    assert_same(values(tmp_path / "saved"), values(model_folder))
    assert gj.load(tmp_path / "saved").tokenizer is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved"]
    again = run(2, source=str(tmp_path / "saved"), mesh={"model": 2, "data": 4}, save=str(tmp_path / "again"))
    assert max(again) < 0.75 * size
    assert_same(values(tmp_path / "again"), values(model_folder))
    run(1, source=str(tmp_path / "again"), mesh={"data": 8}, values=str(tmp_path / "values.npz"))
    with np.load(tmp_path / "values.npz") as found:
        assert_same(dict(found), values(model_folder))
