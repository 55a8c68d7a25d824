"""The dispatch tables of `gemma_kernels`: blocks for each generation, written from sweeps."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gemma_kernels
from benchmarks.kernels.case import Blocks, Case, Entry
from benchmarks.protocol import ROOT

FOLDER = ROOT / "kernels" / "gemma_kernels" / "tables"


def blocks_of(case: Case, generation: str, folder: Path = FOLDER) -> Blocks:
    """What `gemma_kernels` would choose, or its table says for exactly this case, else the case's first choice."""
    if case.dispatched is not None:
        with gemma_kernels.using(generation):
            return case.dispatched() or case.choices[0]
    found = None if case.entry is None else _find(_read(folder, generation), case.entry)
    if found is None or case.entry is None:
        return case.choices[0]
    if not case.entry.parts:
        return found["blocks"]
    blocks = {part: found["blocks"].get(part) for part in case.entry.parts}
    return case.choices[0] if None in blocks.values() else blocks


def write(case: Case, generation: str, record: Mapping[str, Any], folder: Path = FOLDER) -> None:
    """Puts the blocks of a record, and their cycles, into the table."""
    if case.entry is None:
        raise ValueError(f"{case.name} has no entry in the tables")
    table = _read(folder, generation)
    found = _find(table, case.entry)
    if found is None:
        found = {"kernel": case.entry.kernel, "shape": dict(case.entry.shape), "blocks": {}, "cycles": {}}
        table["entries"].append(found)
    kept = found["blocks"] if case.entry.parts else {}
    rival = found["cycles"].get(f"{case.kernel}/{case.entry.rival}")
    is_worse = rival is not None and rival <= record["cycles"]
    found["blocks"] = {**kept, **(dict.fromkeys(record["blocks"]) if is_worse else record["blocks"])}
    found["cycles"][f"{case.kernel}/{case.implementation}"] = record["cycles"]
    table["entries"].sort(key=lambda entry: (entry["kernel"], json.dumps(entry["shape"])))
    folder.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f"  {json.dumps(entry)}" for entry in table["entries"])
    about = json.dumps({key: value for key, value in table.items() if key != "entries"})[1:-1]
    (folder / f"{generation}.json").write_text(f'{{{about}, "entries": [\n{lines}\n]}}\n')


def _read(folder: Path, generation: str) -> dict[str, Any]:
    path = folder / f"{generation}.json"
    if path.exists():
        return json.loads(path.read_text())
    return {"about": "static estimates: python -m benchmarks.kernels --sweep", "entries": []}


def _find(table: Mapping[str, Any], entry: Entry) -> dict[str, Any] | None:
    same = (row for row in table["entries"] if row["kernel"] == entry.kernel and row["shape"] == dict(entry.shape))
    return next(same, None)
