"""The process that measures one peer: `python -m benchmarks.worker NAME THREADS`. See `protocol` for how to talk to it.

Run by the python of the peer's own environment, so it imports nothing but the standard library until it loads the peer.
"""

import importlib
import os
import random
import resource
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

from benchmarks.protocol import private_stdout, serve

BOS = 2
ORDINARY_IDS = (1000, 200_000)  # ids in this range are ordinary pieces of text


class Peer(Protocol):
    """What each module of `benchmarks.peers` offers as `Peer`. Prompts are lists of token ids, one a row."""

    def versions(self) -> dict[str, str]:
        """Versions of what decides the figures."""
        ...

    def load(self, model: str, threads: int) -> None:
        """Loads the weights at `model`, float32 unless the file itself is quantised."""
        ...

    def prefill(self, prompts: list[list[int]], new_tokens: int) -> Any:
        """Reads the prompts up to the greedy choice of the next token; finished when it returns. Gives a state."""
        ...

    def decode(self, state: Any, new_tokens: int) -> list[list[int]]:
        """Draws `new_tokens` more greedy tokens a row, stop tokens ignored; gives these and the first one."""
        ...


def prompt(length: int, row: int = 0) -> list[int]:
    """`length` token ids, the same in every process: BOS, then pieces drawn with a fixed seed."""
    draw = random.Random(1000 * length + row)
    return [BOS, *(draw.randrange(*ORDINARY_IDS) for _ in range(length - 1))]


def peak_bytes() -> int:
    """The most memory this process ever held. From VmHWM where there is one: ru_maxrss may count the parent's."""
    try:
        with open("/proc/self/status") as status:
            lines = [line.split() for line in status if line.startswith("VmHWM")]
        return int(lines[0][1]) * 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def timed(action: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """The result, and wall and CPU seconds (all threads) that it took."""
    start, start_cpu = time.perf_counter(), time.process_time()
    result = action()
    return result, {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - start_cpu}


class Measurements:
    """The ops of a worker."""

    def __init__(self, peer: Peer, threads: int):
        self.peer, self.threads = peer, threads

    def versions(self) -> dict[str, str]:
        return self.peer.versions()

    def load(self, model: str) -> dict[str, float]:
        return timed(lambda: self.peer.load(model, self.threads))[1]

    def prefill(self, tokens: int) -> dict[str, float]:
        """One prompt of `tokens` tokens up to its next token."""
        took = timed(lambda: self.peer.prefill([prompt(tokens)], 1))[1]
        return took | {"tokens": tokens}

    def decode(self, batch: int, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
        """`new_tokens` steps after a prompt, the prompt not timed."""
        prompts = [prompt(prompt_tokens, row) for row in range(batch)]
        state = self.peer.prefill(prompts, new_tokens + 1)
        drawn, took = timed(lambda: self.peer.decode(state, new_tokens))
        if any(len(row) != new_tokens + 1 for row in drawn):
            raise RuntimeError(f"drew {[len(row) for row in drawn]} tokens a row; wanted {new_tokens + 1} each")
        return took | {"tokens": batch * new_tokens, "first_row": drawn[0]}

    def first_token(self, prompt_tokens: int) -> dict[str, float]:
        """One token after a prompt."""
        return timed(lambda: self.peer.decode(self.peer.prefill([prompt(prompt_tokens)], 1), 0))[1]

    def peak(self) -> int:
        return peak_bytes()


def main() -> None:
    name, threads = sys.argv[1], int(sys.argv[2])
    answers = private_stdout()
    if hasattr(os, "sched_setaffinity"):  # thread pools size themselves by what the process may use
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])

    def start() -> dict[str, str]:
        peer = importlib.import_module(f"benchmarks.peers.{name}").Peer()
        measurements = Measurements(peer, threads) if hasattr(peer, "prefill") else peer
        handlers.update({op: getattr(measurements, op) for op in dir(measurements) if not op.startswith("_")})
        return peer.versions()

    handlers: dict[str, Callable[..., Any]] = {"start": start}
    serve(handlers, sys.stdin, answers)


if __name__ == "__main__":
    main()
