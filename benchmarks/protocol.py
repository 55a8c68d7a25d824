"""How a measurement talks to a peer: a process in the peer's own environment, one JSON object a line each way.

A request is {"op": name, ...arguments}; an answer is {"ok": result} or {"error": text}. The peer's own prints cannot
disturb this: the worker keeps a private copy of stdout and sends everything else to stderr.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
SHOWN_ERROR_CHARACTERS = 600  # of a dead worker's stderr, from its end


class PeerError(RuntimeError):
    """A peer could not be started, died, or answered with an error."""


def serve(handlers: Mapping[str, Callable[..., Any]], requests: IO[str], answers: IO[str]) -> None:
    """Answers requests until "quit" or the end of input. A failing handler is answered, and ends the worker."""
    for line in requests:
        request = json.loads(line)
        name = request.pop("op")
        if name == "quit":
            return
        if name not in handlers:
            _send(answers, {"error": f"unknown op {name!r}; there are {', '.join(sorted(handlers))}"})
            continue
        try:
            result = handlers[name](**request)
        except (ImportError, OSError, RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
            _send(answers, {"error": f"{type(error).__name__}: {error}"})
            raise
        _send(answers, {"ok": result})


def _send(to: IO[str], message: Mapping[str, Any]) -> None:
    to.write(json.dumps(message) + "\n")
    to.flush()


def private_stdout() -> IO[str]:
    """The real stdout, for answers alone; from now on prints, those of C libraries too, go to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return answers


class Worker:
    """A running peer. `started` is the time.perf_counter() just before its process was made."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None, cwd: Path = ROOT):
        self.started = time.perf_counter()
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env={**os.environ, **(environment or {})},
                cwd=cwd,
                text=True,
            )
        except OSError as error:
            self._log.close()
            raise PeerError(f"{command[0]} does not start: {error}") from error

    def ask(self, op: str, **arguments: Any) -> Any:
        """The result of one request. Raises PeerError with the peer's own words."""
        requests, answers = self._process.stdin, self._process.stdout
        assert requests is not None
        assert answers is not None
        try:
            _send(requests, {"op": op, **arguments})
            line = answers.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise PeerError(f"the worker ended during {op!r} with code {self._process.wait()}: {self._last_words()}")
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer["ok"]

    def seconds_since_start(self) -> float:
        """Wall seconds since just before the process was made."""
        return time.perf_counter() - self.started

    def _last_words(self) -> str:
        self._log.seek(0)
        return self._log.read()[-SHOWN_ERROR_CHARACTERS:].strip() or "it printed nothing"

    def close(self) -> None:
        """Ends the process; safe to call twice."""
        if self._process.poll() is None:
            self._process.terminate()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            if pipe is not None and not pipe.closed:
                _close_quietly(pipe)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _close_quietly(pipe: IO[str]) -> None:
    try:
        pipe.close()
    except BrokenPipeError:
        return  # unsent bytes for a process that is gone
