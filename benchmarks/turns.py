"""Peers in processes of their own that take turns on one input: seconds, peaks, and how far their outputs are apart."""

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.protocol import Worker
from benchmarks.registry import chosen, python_of

MIB = 2**20


def measure(
    prefix: str, verb: str, peers: Iterable[str], model: Path, values: np.ndarray, threads: int, repeats: int
) -> dict[str, Any]:
    """Asks two peers, modules `{prefix}_{peer}` of `benchmarks.peers`, to `verb` the values; the first call apart."""
    rows: dict[str, dict[str, Any]] = {}
    names = list(peers)
    with tempfile.TemporaryDirectory() as scratch:
        np.save(given := f"{scratch}/values.npy", values)
        asked = {name: {"values": given, "output": f"{scratch}/{name}.npy"} for name in names}
        workers = {}
        try:
            for name in names:
                python = str(python_of(chosen(name)[0]))
                workers[name] = Worker([python, "-m", "benchmarks.worker", f"{prefix}_{name}", str(threads)])
                rows[name] = {"versions": workers[name].ask("start")}
                rows[name]["load_seconds"] = workers[name].ask("load", model=str(model), threads=threads)
                rows[name]["load_mib"] = workers[name].ask("peak") / MIB
                rows[name]["first_seconds"] = workers[name].ask(verb, **asked[name])
                rows[name]["seconds"] = []
            for _ in range(repeats):
                for name, worker in workers.items():
                    rows[name]["seconds"].append(worker.ask(verb, **asked[name]))
            for name, worker in workers.items():
                rows[name]["peak_mib"] = worker.ask("peak") / MIB
        finally:
            for worker in workers.values():
                worker.close()
        ours, theirs = (np.load(asked[name]["output"]) for name in names)
    return {
        "peers": rows,
        "largest_difference": float(np.abs(ours - theirs).max()),
        "scale": float(np.abs(theirs).max()),
    }
