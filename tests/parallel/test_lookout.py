"""What the lookout of each process says when another is lost, here with threads for processes."""

import json
import socket
import threading
import time

import pytest

from gemma_jax.parallel import lookout
from gemma_jax.parallel.lookout import Lookout

TOKEN = "a secret"


def connected(count: int) -> list[dict[int, socket.socket]]:
    """The sockets of each process."""
    found: list[dict[int, socket.socket]] = [{}]

    def gather() -> None:
        found[0] = lookout.gather(listener, TOKEN, count, 10)

    with lookout.listen() as listener:
        port = listener.getsockname()[1]
        hub = threading.Thread(target=gather)
        hub.start()
        found += [{0: lookout.join(["nohost.invalid", "127.0.0.1"], port, TOKEN, i, 10)} for i in range(1, count)]
        hub.join()
    return found


@pytest.fixture
def run():
    """Starts lookouts for `count` processes; gives them, their sockets, and what each would end with."""
    sockets: list[dict[int, socket.socket]] = []

    def make(count: int, lost_after_s: float = 30.0):
        sockets.extend(connected(count))
        ends: list[list[str]] = [[] for _ in range(count)]
        outs = [Lookout(i, count, sockets[i], lost_after_s, ends[i].append) for i in range(count)]
        return outs, sockets, ends

    yield make
    for each in sockets:
        for connection in each.values():
            connection.close()


def eventually(ends: list[list[str]], who: list[int]) -> None:
    deadline = time.monotonic() + 10
    while not all(ends[i] for i in who) and time.monotonic() < deadline:
        time.sleep(0.01)


def cut_off(sockets: dict[int, socket.socket]) -> None:
    """As the kernel does for a killed process."""
    for connection in sockets.values():
        connection.shutdown(socket.SHUT_RDWR)


def test_those_that_are_done_wait_for_all(run):
    outs, _, ends = run(3)
    leaving = [threading.Thread(target=out.leave) for out in outs[:2]]
    for thread in leaving:
        thread.start()
    leaving[0].join(0.6)
    assert all(thread.is_alive() for thread in leaving)
    outs[2].leave()
    for thread in leaving:
        thread.join(5)
        assert not thread.is_alive()
    assert ends == [[], [], []]


@pytest.mark.parametrize(("lost", "others"), [(1, [0, 2]), (2, [0, 1])])
def test_a_killed_process_ends_the_others_with_its_name(run, lost, others):
    _, sockets, ends = run(3)
    cut_off(sockets[lost])
    eventually(ends, others)
    for i in others:
        (message,) = ends[i]
        assert message.startswith(f"process {lost} of 3 was lost: its connection closed")
        assert f"Process {i} cannot go on without it and ends with code 75." in message
        assert "start all processes again" in message


def test_process_0_killed_is_named_too():
    sockets = connected(3)
    ends: list[list[str]] = [[], [], []]
    for i in (1, 2):
        Lookout(i, 3, sockets[i], 30.0, ends[i].append)
    for connection in sockets[0].values():
        connection.close()
    eventually(ends, [1, 2])
    assert all(len(ends[i]) == 1 and ends[i][0].startswith("process 0 of 3 was lost") for i in (1, 2))


@pytest.mark.parametrize(("failing", "others"), [(0, [1, 2]), (2, [0, 1])])
def test_the_error_of_one_process_is_told_to_the_others(run, failing, others):
    outs, sockets, ends = run(3)
    telling = threading.Thread(target=outs[failing].fail, args=("ValueError: row 7\nis bad",))
    telling.start()
    time.sleep(0.1)
    cut_off(sockets[failing])
    eventually(ends, others)
    telling.join(5)
    for i in others:
        assert ends[i] == [ends[i][0]]
        assert ends[i][0].startswith(f"process {failing} of 3 was lost: ValueError: row 7\nis bad.")
    assert ends[failing] == []  # its caller ends it


def test_a_silent_process_is_lost_after_some_time():
    sockets = connected(3)
    ends: list[list[str]] = [[], [], []]
    begin = time.monotonic()
    for i in (0, 2):
        Lookout(i, 3, sockets[i], 2.5, ends[i].append)
    eventually(ends, [0, 2])
    assert 2.5 <= time.monotonic() - begin < 5
    assert all("process 1 of 3 was lost: nothing was heard of it for 2.5 s" in ends[i][0] for i in (0, 2))
    sockets[1][0].close()


def test_strangers_are_turned_away_and_those_who_stay_away_are_named():
    failed: list[str] = []

    def gather() -> None:
        try:
            lookout.gather(listener, TOKEN, 3, 1.5)
        except TimeoutError as error:
            failed.append(str(error))

    with lookout.listen() as listener:
        hub = threading.Thread(target=gather)
        hub.start()
        port = listener.getsockname()[1]
        for hello in (["wrong", 1], [TOKEN, 7], [TOKEN], "GET / HTTP/1.1", {"a": 1}):
            with socket.create_connection(("127.0.0.1", port)) as stranger:
                stranger.sendall(json.dumps(hello).encode() + b"\n")
                assert stranger.recv(100) == b""
        one = lookout.join(["127.0.0.1"], port, TOKEN, 1, 5)
        hub.join()
        one.close()
    assert "processes [2] did not connect to process 0" in failed[0]


def test_a_lookout_that_cannot_be_reached_names_where():
    with lookout.listen() as closed:
        port = closed.getsockname()[1]
    with pytest.raises(
        TimeoutError, match=rf"process 3 cannot reach process 0 at port {port} of 127.0.0.1 within 0.3 s"
    ):
        lookout.join(["127.0.0.1"], port, TOKEN, 3, 0.3)
