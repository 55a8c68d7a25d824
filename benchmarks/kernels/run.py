"""Compiles cases one after another in a worker process, and tries the blocks that were asked for."""

import contextlib
import queue
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import registry
from benchmarks.kernels import spills
from benchmarks.kernels.case import Blocks, Case
from benchmarks.protocol import ROOT, PeerError, Worker

LIMIT = 300  # seconds for one compilation

Record = dict[str, Any]


class Compiler:
    """A worker for each environment, which is started again when it dies: some blocks kill the compiler."""

    def __init__(self, limit: int = LIMIT):
        self._limit = limit
        self._folder = Path(tempfile.mkdtemp(prefix="kernels-"))
        self._workers: dict[str | None, Worker] = {}

    def figures(self, case: Case, generation: str, blocks: Blocks) -> Record:
        """Static estimates as `measure.figures` gives them, or {"error": why there are none}."""
        if case.environment not in self._workers:
            python = python_of(case)
            if not python.exists():
                return {"error": f"no environment: see benchmarks/kernels/setup_{case.environment}.sh"}
            folder = self._folder / (case.environment or "here")
            command = ["nice", "-n", "10", str(python), "-m", "benchmarks.kernels.worker", str(folder)]
            paths = {"PYTHONPATH": str(ROOT / "kernels"), "PYTHONWARNINGS": "ignore"}
            self._workers[case.environment] = Worker(command, paths)
        worker = self._workers[case.environment]
        try:
            return worker.ask("estimate", name=case.name, generation=generation, blocks=dict(blocks), limit=self._limit)
        except PeerError as error:
            worker.close()
            del self._workers[case.environment]
            return {"error": f"no answer in {self._limit} s, or the compiler died: {error}"}

    def close(self) -> None:
        for worker in self._workers.values():
            worker.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> "Compiler":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def python_of(case: Case) -> Path:
    """The python a case is compiled by; it need not exist."""
    name = case.environment or ""
    return registry.python_of(registry.Entry(name, name, "", case.environment, ""))


def sweep(compiler: Compiler, case: Case, generation: str, choices: Sequence[Blocks]) -> list[Record]:
    """The figures for each choice of blocks, the fastest first, failures last."""
    records = []
    for blocks in choices:
        start = time.perf_counter()
        record = compiler.figures(case, generation, blocks)
        record |= {"case": case.name, "generation": generation, "blocks": dict(blocks)}
        records.append(record)
        said = record.get("error") or _said(record)
        took = f"{time.perf_counter() - start:.0f} s"
        print(f"{case.name} {generation} {dict(blocks)}: {said} ({took})", file=sys.stderr, flush=True)
    return sorted(records, key=_worth)


def _said(record: Record) -> str:
    stores = "; ".join(f"{kernel['name']}: {spills.text(kernel)}" for kernel in record["kernels"])
    return f"{record['cycles']:,} cycles; {stores}"


def best(compiler: Compiler, case: Case, generation: str, choices: Sequence[Blocks]) -> Record:
    """The best record of a sweep. A case of several kernels gets the best blocks of each, together."""
    records = sweep(compiler, case, generation, choices)
    good = [record for record in records if "error" not in record]
    if not good or case.entry is None or len(case.entry.parts) < 2:
        return records[0]
    joined = {
        part: min(good, key=lambda record: record["kernels"][i]["cycles"])["blocks"][part]
        for i, part in enumerate(case.entry.parts)
    }
    same = [record for record in good if record["blocks"] == joined]
    return (same or sweep(compiler, case, generation, [joined]))[0]


def each(tasks: Sequence[tuple[Case, str]], record: Callable[[Case, str, Compiler], Record], jobs: int) -> list[Record]:
    """The record of each case and generation, in order; each of `jobs` threads has workers of its own."""
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(jobs) as threads:
        idle = queue.SimpleQueue[Compiler]()
        for _ in range(jobs):
            idle.put(stack.enter_context(Compiler()))

        def one(task: tuple[Case, str]) -> Record:
            compiler = idle.get()
            try:
                return record(*task, compiler)
            finally:
                idle.put(compiler)

        return list(threads.map(one, tasks))


def _worth(record: Record) -> tuple[float, float]:
    """The longest of a record's least times; where cycles are not what bounds it, of equals that of less VMEM.

    Smaller blocks begin sooner: the first copy has nothing to hide behind.
    """
    if "error" in record:
        return float("inf"), float("inf")
    longest = max(record["milliseconds"].values())
    if record["bound"] == "compute":
        return longest, record["cycles"]
    return float(f"{longest:.2g}"), sum(kernel["vmem_bytes"] for kernel in record["kernels"])
