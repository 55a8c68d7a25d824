"""Figures that are checked in, one file for each version of libtpu: with another compiler they mean nothing."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks.kernels import dump, spills
from benchmarks.kernels.case import PEERS
from benchmarks.protocol import ROOT

FOLDER = ROOT / "benchmarks" / "results" / "kernels"
ALLOWED = 1.02  # times the cycles of the baseline

Record = Mapping[str, Any]


def path(folder: Path = FOLDER) -> Path:
    """The file of the libtpu that is installed."""
    return folder / f"libtpu-{dump.libtpu_version()}.json"


def read(folder: Path = FOLDER) -> dict[str, Record]:
    """The records, by `key`. Raises FileNotFoundError that says what to do if this version has none."""
    if not path(folder).exists():
        there = ", ".join(sorted(file.stem for file in folder.glob("libtpu-*.json"))) or "none"
        raise FileNotFoundError(
            f"no baseline for libtpu {dump.libtpu_version()} (there are: {there}); figures of another version cannot "
            "be compared: install that version, or write a baseline with --update-baseline"
        )
    return json.loads(path(folder).read_text())["records"]


def key(record: Record) -> str:
    return f"{record['case']}/{record['generation']}"


def update(records: Sequence[Record], folder: Path = FOLDER) -> None:
    """Puts records into the file of this version; those of other cases stay."""
    kept = read(folder) if path(folder).exists() else {}
    merged = {**kept, **{key(record): _numbers(record) for record in records if "error" not in record}}
    about = {"libtpu": dump.libtpu_version(), "jax": jax.__version__, "figures": "static estimates"}
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(merged[name])}" for name in sorted(merged))
    folder.mkdir(parents=True, exist_ok=True)
    path(folder).write_text(f'{json.dumps(about)[:-1]}, "records": {{\n{lines}\n}}}}\n')


def _numbers(record: Record) -> dict[str, Any]:
    kernels = [{name: value for name, value in kernel.items() if name != "tree"} for kernel in record["kernels"]]
    return {**record, "kernels": kernels}


def complaints(records: Sequence[Record], known: Mapping[str, Record]) -> list[str]:
    """What of our kernels got worse, or cannot be compared, as sentences."""
    found: list[str] = []
    for record in records:
        name = key(record)
        if record["case"].split("/")[-1] in PEERS:
            continue
        if "error" in record:
            found.append(f"{name}: does not compile: {record['error']}")
            continue
        before = {kernel["name"]: kernel for kernel in known.get(name, {"kernels": ()})["kernels"]}
        said = (spills.complaint(kernel, before.get(kernel["name"])) for kernel in record["kernels"])
        found += [f"{name}: {complaint}" for complaint in said if complaint]
        if name not in known:
            found.append(f"{name}: has no baseline; write it with --update-baseline")
        elif record["cycles"] > ALLOWED * known[name]["cycles"]:
            cycles = known[name]["cycles"]
            more = record["cycles"] / cycles - 1
            found.append(f"{name}: {record['cycles']:,} cycles, {more:.1%} more than the baseline's {cycles:,}")
    return found
