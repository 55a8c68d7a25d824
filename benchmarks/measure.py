"""The measurements themselves, interleaved: in each repeat every peer takes its turn, so that noise hits all alike."""

import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.protocol import PeerError, Worker
from benchmarks.registry import Entry, absence, python_of
from benchmarks.summary import DECODE_BATCHES, PREFILL_TOKENS

MIB = 2**20
COLD_PROMPT = 16  # tokens of the prompt of a cold start
STREAM_BYTES = 2**30


@dataclass(frozen=True)
class Settings:
    """How much is measured. The defaults are those of published figures."""

    repeats: int = 5
    threads: int = 2
    prefill_tokens: Sequence[int] = PREFILL_TOKENS
    decode_batches: Sequence[int] = DECODE_BATCHES
    decode_prompt: int = 128
    new_tokens: int = 64
    memory_prompt: int = 512
    has_cold_starts: bool = True


QUICK = {"prefill_tokens": (64,), "decode_batches": (1, 4), "decode_prompt": 16, "new_tokens": 8, "memory_prompt": 64}


@dataclass
class Record:
    """Everything a run brought. samples: peer -> figure -> value of each repeat."""

    samples: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    per_cpu_second: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    first_calls: dict[str, dict[str, float]] = field(default_factory=dict)  # seconds, compilation included
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    first_tokens: dict[str, list[int]] = field(default_factory=dict)  # the greedy tokens each peer drew
    skipped: dict[str, str] = field(default_factory=dict)
    bandwidth: dict[str, list[float]] = field(default_factory=dict)  # bytes/s

    def add(self, peer: str, figure: str, value: float, cpu_value: float | None = None) -> None:
        self.samples.setdefault(peer, {}).setdefault(figure, []).append(value)
        if cpu_value is not None:
            self.per_cpu_second.setdefault(peer, {}).setdefault(figure, []).append(cpu_value)


class Run:
    """One comparison. `say` receives a line of progress for each step."""

    def __init__(self, entries: Sequence[Entry], work: Path, settings: Settings, say: Callable[[str], None]):
        self.work, self.settings, self.say, self.record = work, settings, say, Record()
        self.entries = []
        self._caches = Path(tempfile.mkdtemp(prefix="gemma-bench-"))
        for entry in entries:
            reason = absence(entry, work)
            if reason is None:
                self.entries.append(entry)
            else:
                self._skip(entry, reason)

    def measure(self) -> Record:
        """All figures. Peers that fail are skipped from then on, with the reason."""
        try:
            self._fresh_processes()
            self._warm_processes()
        finally:
            shutil.rmtree(self._caches, ignore_errors=True)
        return self.record

    def _skip(self, entry: Entry, reason: str) -> None:
        self.record.skipped[entry.name] = reason
        self.say(f"{entry.name}: skipped: {reason}")

    def _turns(self, what: str, repeat: int, turn: Callable[[Entry], None]) -> None:
        """Everyone's turn in one repeat; who goes first changes from repeat to repeat."""
        shift = repeat % max(1, len(self.entries))
        for entry in [*self.entries[shift:], *self.entries[:shift]]:
            self.say(f"{what}, repeat {repeat + 1}: {entry.name}")
            try:
                turn(entry)
            except PeerError as error:
                self.entries.remove(entry)
                self._skip(entry, f"{what}: {error}")

    def _start(self, entry: Entry, cache: Path | None = None) -> Worker:
        environment = {"OMP_NUM_THREADS": str(self.settings.threads)}
        if entry.compiles:
            folder = str(cache or self._caches / entry.name)
            environment |= {
                "JAX_PLATFORMS": "cpu",
                "JAX_COMPILATION_CACHE_DIR": folder,
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            }
        command = [str(python_of(entry)), "-m", "benchmarks.worker", entry.module, str(self.settings.threads)]
        return Worker(command, environment)

    def _load(self, worker: Worker, entry: Entry) -> None:
        self.record.versions[entry.name] = worker.ask("start")
        worker.ask("load", model=str((self.work / entry.model).resolve()))

    def _fresh_processes(self) -> None:
        for repeat in range(self.settings.repeats):
            if self.settings.has_cold_starts:
                self._turns("cold start", repeat, self._cold_starts)
            self._turns("memory", repeat, self._memory)

    def _cold_starts(self, entry: Entry) -> None:
        figures = ("cold_start_empty", "cold_start_warm") if entry.compiles else ("cold_start_warm",)
        with tempfile.TemporaryDirectory(dir=self._caches) as cache:
            for figure in figures:
                with self._start(entry, Path(cache)) as worker:
                    self._load(worker, entry)
                    worker.ask("first_token", prompt_tokens=COLD_PROMPT)
                    self.record.add(entry.name, figure, worker.seconds_since_start())

    def _memory(self, entry: Entry) -> None:
        """Peak of a process that loads, reads a prompt and answers. Each repeat anew; the compile cache is kept."""
        settings = self.settings
        with self._start(entry) as worker:
            self._load(worker, entry)
            drawn = worker.ask("decode", batch=1, prompt_tokens=settings.memory_prompt, new_tokens=settings.new_tokens)
            self.record.first_tokens[entry.name] = drawn["first_row"]
            self.record.add(entry.name, "peak_mib", worker.ask("peak") / MIB)

    def _warm_processes(self) -> None:
        workers: dict[str, Worker] = {}
        memory = Worker([sys.executable, "-m", "benchmarks.worker", "memory", str(self.settings.threads)])
        try:
            memory.ask("start")
            memory.ask("prepare", size=STREAM_BYTES, threads=self.settings.threads)

            def begin(entry: Entry) -> None:
                workers[entry.name] = self._start(entry)
                self._load(workers[entry.name], entry)

            self._turns("load", 0, begin)
            for repeat in range(-1, self.settings.repeats):
                self._turns("speed", repeat, lambda entry, repeat=repeat: self._speeds(entry, workers, repeat))
                for way, bytes_a_second in memory.ask("stream").items() if repeat >= 0 else ():
                    self.record.bandwidth.setdefault(way, []).append(bytes_a_second)
        finally:
            for worker in [memory, *workers.values()]:
                worker.close()

    def _speeds(self, entry: Entry, workers: dict[str, Worker], repeat: int) -> None:
        """All speed figures once. Repeat -1 compiles and warms up: its seconds are kept apart."""
        settings = self.settings
        asked = [(f"prefill_{n}", "prefill", {"tokens": n}) for n in settings.prefill_tokens]
        for batch in settings.decode_batches:
            sizes = {"batch": batch, "prompt_tokens": settings.decode_prompt, "new_tokens": settings.new_tokens}
            asked.append((f"decode_{batch}", "decode", sizes))
        for figure, op, arguments in asked:
            took = workers[entry.name].ask(op, **arguments)
            if repeat < 0:
                self.record.first_calls.setdefault(entry.name, {})[figure] = took["seconds"]
            else:
                tokens = took["tokens"]
                self.record.add(entry.name, figure, tokens / took["seconds"], tokens / took["cpu_seconds"])
