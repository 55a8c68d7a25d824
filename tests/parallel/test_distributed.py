"""Arguments of a start are checked before JAX sees them; real processes start, compute, and end together."""

import socket

import jax
import numpy as np
import pytest

import gemma_jax as gj
from gemma_jax.parallel import distributed
from tests.parallel import runs

MANUAL = {"coordinator": "127.0.0.1:9", "processes": 2, "process": 1, "timeout_s": 1}
SECONDS = 5  # within which the others have to end, on a busy machine; 0.05 on an idle one


@pytest.mark.parametrize(
    ("how", "arguments", "message"),
    [
        ("kubernetes", {}, "how is 'kubernetes'; wanted 'auto', 'tpu', 'slurm', 'manual'"),
        ("auto", {"process": 1}, "how='auto' finds out process by itself"),
        ("tpu", {"coordinator": "a:1", "processes": 2}, "how='tpu' finds out coordinator, processes by itself"),
        (
            "manual",
            {},
            r"needs coordinator \(or \$JAX_COORDINATOR_ADDRESS\), processes .*, process \(or \$JAX_PROCESS_ID\)",
        ),
        ("manual", MANUAL | {"process": None}, r"needs process \(or \$JAX_PROCESS_ID\)$"),
        ("manual", MANUAL | {"process": 2}, "process is 2 of 2; wanted one of 0 to 1"),
        ("manual", MANUAL | {"process": -1}, "process is -1 of 2"),
        ("manual", MANUAL | {"processes": 0}, "process is 1 of 0"),
        ("manual", MANUAL | {"coordinator": "10.0.0.1"}, "coordinator is '10.0.0.1'; wanted 'host:port'"),
        ("manual", MANUAL | {"coordinator": "host:99999"}, "wanted 'host:port'"),
        ("auto", {"timeout_s": 0}, "timeout_s is 0"),
        ("auto", {"lost_after_s": 1}, "lost_after_s 1; wanted at least 1 and 3 seconds"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(how, arguments, message, monkeypatch):
    for name in distributed.FALLBACKS.values():
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=message):
        distributed.start(how, **arguments)


def test_the_environment_stands_for_arguments(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:1234")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
    monkeypatch.setenv("JAX_PROCESS_ID", "four")
    with pytest.raises(ValueError, match="process is 'four'; wanted a whole number"):
        distributed.start("manual")


def test_slurm_without_srun_names_what_is_missing(monkeypatch):
    for name in distributed.SLURM:
        monkeypatch.setenv(name, "1")
    monkeypatch.delenv("SLURM_PROCID")
    with pytest.raises(RuntimeError, match="not started by srun: SLURM_PROCID not set"):
        distributed.start("slurm")


def test_a_coordinator_that_does_not_answer_is_named():
    port = runs.free_port()
    with pytest.raises(
        TimeoutError, match=rf"process 1 could not reach the coordinator at 127.0.0.1:{port} within 1 s"
    ):
        distributed.start("manual", **MANUAL | {"coordinator": f"127.0.0.1:{port}"})


def test_a_taken_port_is_refused():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen at port {port}"):
            distributed.start("manual", **MANUAL | {"coordinator": f"127.0.0.1:{port}", "process": 0})


def test_devices_that_are_in_use_are_refused():
    jax.devices()
    coordinator = f"127.0.0.1:{runs.free_port()}"
    with pytest.raises(RuntimeError, match="JAX has used its devices already"):
        distributed.start("manual", coordinator=coordinator, processes=1, process=0)
    assert not jax.distributed.is_initialized()


def test_a_second_start_is_refused(monkeypatch):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="already initialised"):
        distributed.start()


@pytest.mark.parametrize(
    ("error", "code"),
    [(None, 0), (SystemExit(), 0), (SystemExit(0), 0), (SystemExit(3), 3), (SystemExit("no"), 1), (ValueError(), 1),
     (KeyboardInterrupt(), 130)],
)  # fmt: skip
def test_a_process_ends_with_the_code_that_python_would_give_it(error, code):
    assert distributed.exit_code(error) == code


@pytest.mark.slow
def test_two_processes_compute_together(model_folder, tmp_path):
    ended = runs.run(2, task="together", source=str(model_folder), logits=str(tmp_path / "logits.npy"))
    for each in ended:
        assert each.said == [{"sum": 28.0, "devices": 2, "of": 4}]
    tokens = np.stack([np.arange(8) + process for process in (0, 0, 1, 1)])
    wanted = gj.load(model_folder, dtype="float32").logits(tokens)
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), wanted, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("deed", "victim", "code", "reason"),
    [
        ("killed", 1, -9, "its connection closed"),
        ("killed", 0, -9, "its connection closed"),
        ("fails", 0, 1, "LookupError: batch 20 is missing"),
        ("exits", 2, 3, "SystemExit: 3"),
        ("stopped", 1, -9, "nothing was heard of it for 5 s"),
    ],
)
def test_when_one_process_ends_the_others_end_and_say_which(deed, victim, code, reason):
    frozen = deed == "stopped"
    ended = runs.wait(runs.start(3, devices=1, task="spin", deed=deed, victim=victim), frozen=int(frozen))
    lost = ended.pop(victim)
    assert lost.code == code, lost.errors[-3000:]
    assert ("LookupError" in lost.errors) == (deed == "fails")
    for each in ended:
        assert each.code == 75, each.errors[-3000:]
        assert each.errors.count(f"gemma_jax: process {victim} of 3 was lost: {reason}") == 1
        assert each.when - lost.said[0] < SECONDS + 5 * frozen


@pytest.mark.slow
def test_processes_that_do_not_all_come_say_so():
    (alone,) = runs.wait(runs.start(2, indices=[0], task="early", timeout_s=3))
    assert alone.code == 75
    assert "gemma_jax: not all processes of the run came within 3 s" in alone.errors


@pytest.mark.slow
def test_processes_that_were_told_different_numbers_say_so():
    port = runs.free_port()
    processes = [
        *runs.start(2, indices=[0], port=port, task="early"),
        *runs.start(3, indices=[1], port=port, task="early"),
    ]
    ended = runs.wait(processes)
    assert [each.code for each in ended] == [75, 75]
    for each in ended:
        assert "process 1 was started as one of 3, but process 0 counts 2" in each.errors


@pytest.mark.slow
def test_processes_that_are_done_at_different_times_end_well():
    for each in runs.run(3, devices=1, task="early"):
        assert each.said == ["done"]
