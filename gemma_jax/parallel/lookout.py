"""Notices that a process of a run has ended, and ends the others with one line that says which, and what to do.

Process 0 holds a connection to each of the others; all say each second that they are there. A closed connection is seen
at once, a silent one after `lost_after_s`. What JAX alone does, measured with JAX 0.10.2, 3 processes, gloo on Linux:

* one is killed: the others stay in their collective until the timeout of JAX's heartbeats (100 s by default), then
  abort (SIGABRT) with a stack trace in C++ around the line that tells which it was;
* process 0 is killed, or frozen: they abort, after 0.2 s or that timeout, and no process is named;
* one has an exception: it waits at JAX's shutdown barrier for the others, and they in a collective for it, for
  `shutdown_timeout_seconds` (300); then all abort, and the message names the two healthy ones.

JAX's heartbeats stay on below this, with a longer timeout.
"""

import contextlib
import hmac
import json
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: it may work when started again
PING_S = 1.0
PARTING_S = 3.0  # process 0 goes last: JAX's coordinator dies with it, and takes the others along before they can tell
HELLO_S = 5.0
MAX_LINE = 1 << 16  # bytes; longer ones are not ours
CLOSED = "its connection closed, so it was killed, or crashed, or never closed its run"
ADVICE = "Look into its log, then start all processes again: a training resumes from its newest whole checkpoint."


def end_process(message: str) -> None:
    """Writes the message to standard error and ends this process at once, whatever its other threads wait for."""
    os.write(2, f"\ngemma_jax: {message}\n".encode())
    os._exit(EXIT_CODE)


@dataclass(eq=False)
class _Link:
    """A connection to a process."""

    index: int
    socket: socket.socket
    buffer: bytes = b""
    heard: float = field(default_factory=time.monotonic)
    has_left: bool = False  # it is done with its work
    is_open: bool = True

    def read(self) -> list[Any]:
        """The messages that have come. Sets `is_open` to False at the end of the connection."""
        try:
            data = self.socket.recv(MAX_LINE)
        except OSError:
            data = b""
        self.is_open = bool(data) and len(self.buffer) < MAX_LINE
        self.heard = time.monotonic()
        *lines, self.buffer = (self.buffer + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def send(self, *message: Any) -> None:
        with contextlib.suppress(OSError):  # reading tells what happened
            self.socket.sendall(_line(*message))


def _line(*message: Any) -> bytes:
    return json.dumps(message).encode() + b"\n"


class Lookout:
    """The thread that looks out in one process. It begins at once.

    Args:
        index, count: of this process, and how many there are.
        sockets: connections by the index of the process at the other end: to all others in process 0 (see `gather`),
            to process 0 in the others (see `join`).
        lost_after_s: seconds of silence after which a process counts as lost.
        end: what ends this process; gets the message.
    """

    def __init__(
        self,
        index: int,
        count: int,
        sockets: Mapping[int, socket.socket],
        lost_after_s: float,
        end: Callable[[str], None] = end_process,
    ):
        self.index, self.count, self.lost_after_s, self._end = index, count, lost_after_s, end
        self._links = [_Link(peer, connection) for peer, connection in sockets.items()]
        self._lock = threading.Lock()  # of sending, and of what follows
        self._has_left = False
        self._message: str | None = None  # once this process is to end
        self._lost: int | None = None  # the process that is not there any more
        self._parting = self._next_ping = 0.0  # times: when it ends at the latest
        self._over, self._alone = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="gemma_jax.lookout", daemon=True)
        self._thread.start()

    def leave(self) -> None:
        """Says that this process is done, and waits until all are. A process that is lost meanwhile ends this one."""
        with self._lock:
            self._has_left = True
            self._tell(self._links, "bye")
        self._over.wait()
        self._thread.join()

    def fail(self, reason: str) -> None:
        """Tells the others that this process ends because of an error. It is for the caller to end it then."""
        with self._lock:
            if self._message is not None:
                return  # they know, and this process is about to end
            self._message, self._parting = "", float("inf")
            if self.index != 0:
                self._tell(self._links, "failed", reason)
                return
            self._tell(self._links, "lost", self.index, reason)
        self._alone.wait(PARTING_S)

    def wait_for_loss(self, timeout_s: float) -> None:
        """Gives the thread the time to see whether an error here comes from another process that was lost. If so, it
        ends this process.
        """
        self._over.wait(timeout_s)

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for link in self._links:
                selector.register(link.socket, selectors.EVENT_READ, link)
            while not self._over.is_set():
                for key, _ in selector.select(PING_S / 4 if self._message is None else 0.01):
                    self._hear(key.data)
                    if not key.data.is_open:
                        selector.unregister(key.data.socket)
                with self._lock:
                    self._keep_watch()
        for link in self._links:
            link.socket.close()

    def _hear(self, link: _Link) -> None:
        for kind, *rest in link.read():
            with self._lock:
                if kind == "bye":
                    link.has_left = True
                elif kind == "failed":
                    self._lose(link.index, rest[0])
                elif kind == "lost":
                    self._lose(*rest)
                elif kind == "over":
                    self._over.set()
        if not link.is_open and not self._over.is_set():
            with self._lock:
                self._lose(link.index, CLOSED)

    def _keep_watch(self) -> None:
        """What is to be done some times a second: pings, silence, and the end of the run."""
        now = time.monotonic()
        here = [link for link in self._links if link.is_open and link.index != self._lost]
        if not here:
            self._alone.set()
        if self._message is not None:
            if self._message and (not here or self.index != 0 or now > self._parting):
                self._end(self._message)
                self._over.set()
            return
        for link in here:
            if now - link.heard > self.lost_after_s:
                reason = f"nothing was heard of it for {self.lost_after_s:g} s, so it is frozen or cut off"
                self._lose(link.index, reason)
        if now > self._next_ping:
            self._next_ping = now + PING_S
            self._tell(here, "ping")
        if self.index == 0 and self._has_left and all(link.has_left for link in self._links):
            self._tell(here, "over")
            self._over.set()

    def _lose(self, index: int, reason: str) -> None:
        """Prepares the end of this process, and tells the others."""
        if self._message is not None:
            return
        self._lost = index
        self._message = (
            f"process {index} of {self.count} was lost: {reason}. Process {self.index} cannot go on without it and "
            f"ends with code {EXIT_CODE}. {ADVICE}"
        )
        self._parting = time.monotonic() + PARTING_S
        if self.index == 0:
            self._tell((link for link in self._links if link.index != index), "lost", index, reason)

    def _tell(self, links: Iterable[_Link], *message: Any) -> None:
        for link in links:
            if link.is_open:
                link.send(*message)


def listen() -> socket.socket:
    """A free port on all interfaces, as JAX's coordinator has."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def own_hosts() -> list[str]:
    """Names and addresses under which other machines may reach this one."""
    hosts = [socket.getfqdn(), socket.gethostname()]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing: it tells the address of the interface that would
            hosts.append(probe.getsockname()[0])
        except OSError:
            pass  # a machine without a network: the names are enough for itself
    return list(dict.fromkeys(hosts))


def gather(listener: socket.socket, token: str, count: int, timeout_s: float) -> dict[int, socket.socket]:
    """In process 0: a connection of each other process. Strangers, who do not know the token, are turned away.

    Raises TimeoutError that names the processes which did not come.
    """
    found: dict[int, socket.socket] = {}
    deadline = time.monotonic() + timeout_s
    while len(found) < count - 1:
        listener.settimeout(max(0.01, deadline - time.monotonic()))
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            for connection in found.values():
                connection.close()
            missing = sorted(set(range(1, count)) - set(found))
            raise TimeoutError(
                f"processes {missing} did not connect to process 0 (port {listener.getsockname()[1]}) within "
                f"{timeout_s:g} s; allow connections between the machines, or start with lost_after_s=None"
            ) from None
        hello = _greeting(connection)
        is_ours = len(hello) == 2 and hmac.compare_digest(str(hello[0]), token) and hello[1] in range(1, count)
        if not is_ours or hello[1] in found:
            connection.close()
            continue
        connection.sendall(_line(token))
        connection.settimeout(PING_S)
        found[hello[1]] = connection
    return found


def join(hosts: Sequence[str], port: int, token: str, index: int, timeout_s: float) -> socket.socket:
    """In the others: the connection to process 0, by the first of its hosts that answers with the token.

    Raises TimeoutError that names the hosts.
    """
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        for host in hosts:
            try:
                connection = socket.create_connection((host, port), timeout=HELLO_S)
            except OSError:
                continue
            connection.sendall(_line(token, index))
            if _greeting(connection) == [token]:
                connection.settimeout(PING_S)
                return connection
            connection.close()
        time.sleep(0.2)
    raise TimeoutError(
        f"process {index} cannot reach process 0 at port {port} of {', '.join(hosts)} within {timeout_s:g} s; allow "
        "connections between the machines, or start with lost_after_s=None"
    )


def _greeting(connection: socket.socket) -> list[Any]:
    """The first line that comes, and no byte after it; empty for none in time, or for what is not ours."""
    line, deadline = b"", time.monotonic() + HELLO_S
    try:
        while not line.endswith(b"\n") and len(line) < 1024:
            connection.settimeout(max(0.01, deadline - time.monotonic()))
            data = connection.recv(1)
            if not data:
                return []
            line += data
        hello = json.loads(line)
    except (OSError, ValueError):
        return []
    return hello if isinstance(hello, list) else []
