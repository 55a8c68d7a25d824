"""Talking to worker processes, with a fake peer."""

import io
import json
import sys
from pathlib import Path

import pytest

from benchmarks.protocol import ROOT, PeerError, Worker, serve

FAKE = [sys.executable, str(Path(__file__).with_name("fake_peer.py")), str(ROOT)]


@pytest.fixture
def worker():
    with Worker(FAKE) as running:
        yield running


def test_a_worker_answers_request_after_request(worker):
    assert [worker.ask("double", value=value) for value in (1, 21)] == [2, 42]


def test_prints_of_a_peer_do_not_disturb_its_answers(worker):
    assert worker.ask("double", value=0.5) == 1.0


def test_an_error_of_a_peer_arrives_with_its_type_and_words(worker):
    with pytest.raises(PeerError, match="ValueError: no such weights"):
        worker.ask("fail")


def test_an_unknown_request_names_the_known_ones(worker):
    with pytest.raises(PeerError, match="unknown op 'treble'; there are die, double, fail"):
        worker.ask("treble")


def test_a_peer_that_dies_is_reported_with_its_last_words(worker):
    with pytest.raises(PeerError, match="ended during 'die' with code 1: ") as caught:
        worker.ask("die")
    assert str(caught.value).endswith("out of memory")


def test_time_is_counted_from_before_the_process_began(worker):
    before = worker.seconds_since_start()
    worker.ask("double", value=1)
    assert 0 < before < worker.seconds_since_start()


def test_a_python_that_is_not_there_is_a_peer_error():
    with pytest.raises(PeerError, match="/no/such/python does not start"):
        Worker(["/no/such/python"])


def test_quit_ends_the_serving_before_the_end_of_input():
    answers = io.StringIO()
    serve({"one": lambda: 1}, io.StringIO('{"op": "one"}\n{"op": "quit"}\n{"op": "one"}\n'), answers)
    assert [json.loads(line) for line in answers.getvalue().splitlines()] == [{"ok": 1}]
