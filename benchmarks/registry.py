"""Who is measured, in which environment, on which file; and why someone is not."""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.protocol import ROOT

BENCHMARKS = ROOT / "benchmarks"
DEFAULT_WORK = BENCHMARKS / ".work"
DEFAULT_ENVIRONMENTS = BENCHMARKS / ".venvs"


@dataclass(frozen=True)
class Entry:
    """One column of the tables."""

    name: str  # in JSON and on the command line
    label: str  # in tables and plots
    module: str  # of benchmarks.peers
    environment: str | None  # folder below .venvs; None: the python that runs the comparison
    model: str  # file or folder below the work folder, made by prepare.py
    compiles: bool = False  # has a compilation cache that a cold start may find empty or full

    @property
    def variable(self) -> str:
        """The environment variable that names this peer's python."""
        return f"GEMMA_BENCH_PYTHON_{(self.environment or self.name).upper().replace('-', '_')}"


US = "gemma_jax"
ENTRIES = (
    Entry(US, "gemma_jax f32", "gemma_jax", None, "demo.gguf", compiles=True),
    Entry("huggingface", "Hugging Face f32", "huggingface", "huggingface", "huggingface"),
    Entry("deepmind", "DeepMind gemma f32", "deepmind", "deepmind", "deepmind", compiles=True),
    Entry("llama_cpp_f32", "llama.cpp F32", "llama_cpp", "llama_cpp", "demo-f32.gguf"),
    Entry("llama_cpp_q4", "llama.cpp Q4_K_M", "llama_cpp", "llama_cpp", "demo.gguf"),
)


def chosen(names: str) -> list[Entry]:
    """The entries of a comma-separated list, in the list's order; "all" for all. Raises ValueError for unknown ones."""
    known = {entry.name: entry for entry in ENTRIES}
    wanted = list(known) if names == "all" else [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        raise ValueError(f"unknown peers {', '.join(unknown) or '(none given)'}; there are {', '.join(known)}")
    return [known[name] for name in wanted]


def python_of(entry: Entry, environ: Mapping[str, str] = os.environ) -> Path:
    """The python that runs a peer: its variable's, else that of benchmarks/.venvs, else (ourselves) the running one."""
    if entry.variable in environ:
        return Path(environ[entry.variable])
    if entry.environment is None:
        return Path(sys.executable)
    return DEFAULT_ENVIRONMENTS / entry.environment / "bin" / "python"


def absence(entry: Entry, work: Path, environ: Mapping[str, str] = os.environ) -> str | None:
    """Why a peer cannot be measured, and what to do; None if nothing is known to stand against it."""
    python = python_of(entry, environ)
    if not python.exists():
        return f"no environment: run benchmarks/setup_peers.sh {entry.environment}, or set {entry.variable}"
    if not (work / entry.model).exists():
        return f"no weights {entry.model} in the work folder: run python -m benchmarks.prepare"
    return None
