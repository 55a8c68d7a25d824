"""A whole comparison, with a fake peer in place of real ones: order, warm-up, failure."""

import dataclasses
from collections.abc import Sequence

import pytest

from benchmarks import measure
from benchmarks.measure import Run, Settings
from benchmarks.protocol import PeerError
from benchmarks.registry import Entry

SETTINGS = Settings(repeats=2, prefill_tokens=(8,), decode_batches=(2,), new_tokens=4)


class FakeWorker:
    """Answers as a worker does, and notes who was asked what. The peer "broken" cannot decode."""

    log: list[tuple[str, str]] = []  # noqa: RUF012

    def __init__(self, command: Sequence[str], environment: object = None):
        self.module = command[3]

    def ask(self, op: str, **arguments: object) -> object:
        self.log.append((self.module, op))
        if op == "stream":
            return {"gemv": 1e9}
        if op == "peak":
            return 2**21
        if op == "start":
            return {"version": "1"}
        if op == "decode" and self.module == "broken":
            raise PeerError("cannot decode")
        return {"seconds": 2.0, "cpu_seconds": 4.0, "tokens": 8, "first_row": [1, 2]}

    def seconds_since_start(self) -> float:
        return 3.0

    def close(self) -> None:
        self.log.append((self.module, "close"))

    def __enter__(self) -> "FakeWorker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Makes a run over fake peers of the given names."""
    monkeypatch.setattr(measure, "Worker", FakeWorker)
    monkeypatch.setattr(FakeWorker, "log", [])
    (tmp_path / "weights").touch()

    def make(*names: str) -> Run:
        entries = [Entry(name, name, name, None, "weights", compiles=name == "jitted") for name in names]
        return Run(entries, tmp_path, SETTINGS, lambda line: None)

    return make


def test_every_figure_gets_one_sample_a_repeat_and_warm_up_is_kept_apart(run):
    record = run("a", "jitted").measure()
    assert record.samples["a"] == {
        "cold_start_warm": [3.0] * 2, "peak_mib": [2.0] * 2, "prefill_8": [4.0] * 2, "decode_2": [4.0] * 2
    }  # fmt: skip
    assert record.samples["jitted"]["cold_start_empty"] == [3.0] * 2
    assert record.per_cpu_second["a"]["decode_2"] == [2.0] * 2
    assert record.first_calls["a"] == {"prefill_8": 2.0, "decode_2": 2.0}
    assert record.bandwidth == {"gemv": [1e9] * 2}


def test_peers_take_turns_within_a_repeat_and_the_first_one_changes(run):
    run("a", "b").measure()
    prefills = [module for module, op in FakeWorker.log if op == "prefill"]
    assert sorted(prefills[:2]) == sorted(prefills[2:4]) == sorted(prefills[4:]) == ["a", "b"]
    assert prefills[2:] == ["a", "b", "b", "a"]


def test_a_peer_that_fails_is_skipped_with_its_reason_and_the_others_go_on(run):
    record = run("broken", "a").measure()
    assert record.skipped == {"broken": "memory: cannot decode"}
    assert len(record.samples["a"]["decode_2"]) == 2


def test_no_worker_is_left_running(run):
    run("a", "broken").measure()
    started = [module for module, op in FakeWorker.log if op == "start"]
    assert len(started) == len([op for _, op in FakeWorker.log if op == "close"])


def test_absent_peers_are_skipped_before_anything_starts(run, tmp_path):
    entry = Entry("absent", "absent", "absent", None, "no weights")
    other = Run([entry, dataclasses.replace(entry, name="too")], tmp_path, SETTINGS, lambda line: None)
    assert set(other.record.skipped) == {"absent", "too"}
    assert other.entries == []
