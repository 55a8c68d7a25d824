"""What libtpu writes about the kernels it compiles, into a folder that its flags name.

The flags are undocumented: figures are compared only within one version of libtpu, and files that are missing raise
MissingDump. libtpu reads its flags once, when it is loaded: a process has one folder. The files are libtpu's; only
numbers taken from them leave the folder.
"""

import importlib.metadata
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.kernels.bundles import Block, block_tree, read_bundles, read_units
from benchmarks.kernels.generations import Generation

_SUFFIX = re.compile(r"-\d+-final_bundles\.txt$")
_VMEM = re.compile(r"^ +#allocation\d+ \[.*?space=vmem, size = (0x[0-9a-f]+)", re.M)
_LENGTH = re.compile(r"^\s*Length to end: (\d+)", re.M)


class MissingDump(RuntimeError):
    """libtpu wrote no schedule where one is expected."""


@dataclass(frozen=True)
class Schedule:
    """One compiled kernel."""

    name: str
    tree: Block
    num_bundles: int
    vmem_bytes: int  # its windows, scratch and spills
    critical_cycles: int  # the compiler's own longest path through one straight part


def libtpu_version() -> str:
    """Of the libtpu that is installed. Raises ImportError that names the extra."""
    try:
        return importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError("static estimates need libtpu, the compiler for TPU: pip install 'gemma-jax[tpu]'") from error


def set_environment(folder: Path) -> None:
    """Makes libtpu write schedules into the folder. Only of use before libtpu is loaded."""
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # what is not compiled is not written
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ["LIBTPU_INIT_ARGS"] = " ".join(
        [
            os.environ.get("LIBTPU_INIT_ARGS", ""),
            f"--xla_jf_dump_to={folder}",
            "--xla_jf_dump_llo_text=true",
            "--xla_jf_dump_llo_pass_label_regex=(final|critical-path)",
            "--xla_mosaic_enable_llo_source_annotations=true",
        ]
    ).strip()


def clear(folder: Path) -> None:
    """Forgets what was compiled so far."""
    for path in folder.iterdir():
        path.unlink()


def schedules(folder: Path, pattern: str, generation: Generation) -> Iterator[Schedule]:
    """The kernels whose whole name, but for a trailing number, matches the pattern; in the order of their compilation.

    Raises MissingDump if there are none.
    """
    names = {path: _SUFFIX.sub("", path.name).split("-", 1)[1] for path in sorted(folder.glob("*-final_bundles.txt"))}
    names = {path: name for path, name in names.items() if not name.endswith("schedule-analysis_final_bundles.txt")}
    chosen = {path: name for path, name in names.items() if re.fullmatch(pattern, re.sub(r"\.\d+$", "", name))}
    if not chosen:
        there = ", ".join(sorted(set(names.values()))) or "nothing: its flags have no effect"
        raise MissingDump(f"libtpu {libtpu_version()} wrote no schedule of {pattern!r}; it wrote {there}")
    return (_schedule(path, name, generation) for path, name in chosen.items())


def _schedule(path: Path, name: str, generation: Generation) -> Schedule:
    bundles = read_bundles(path.read_text())
    text = _SUFFIX.sub("", path.name)
    units = read_units(_beside(path, text, "final_hlo-static-per-bundle-utilization").read_text())
    if len(units) != len(bundles):
        raise MissingDump(f"{name}: {len(bundles)} bundles but {len(units)} rows of utilization")
    allocations = _VMEM.findall(_beside(path, text, "pre-finalize-registers-and-allocations").read_text())
    lengths = _LENGTH.findall(_beside(path, text, "critical-path").read_text())
    return Schedule(
        name,
        block_tree(bundles, units, generation),
        len(bundles),
        sum(int(size, 16) for size in allocations),
        max(map(int, lengths), default=0),
    )


def _beside(path: Path, text: str, label: str) -> Path:
    """The file of the same kernel with another label."""
    found = [
        other for other in path.parent.iterdir() if re.fullmatch(rf"{re.escape(text)}-\d+-{label}\.txt", other.name)
    ]
    if not found:
        raise MissingDump(f"libtpu {libtpu_version()} wrote no {label} of {text}")
    return found[0]
