"""Plans of all sizes on TPUs that need not be there: the smallest topology that holds each, and its tightest mesh.

python -m benchmarks.plans                                  # minutes; docs/planner.md, results/plans.json
python -m benchmarks.plans --models gemma-3-1b --chips v6e  # these rows anew, the others as they were
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import tables
from gemma_jax import configs
from gemma_jax.parallel import hardware
from gemma_jax.parallel.hardware import CHIPS, GiB
from gemma_jax.planner import report, search
from gemma_jax.planner.plan import Question, plan

RESULTS, PAGE = Path("benchmarks/results"), Path("docs/planner.md")
MODELS = ("gemma-3-270m", "gemma-3-1b", "gemma-3-4b", "gemma-3-12b", "gemma-3-27b", "gemma-3n-e2b", "gemma-3n-e4b")
CHIP_NAMES = ("v5e", "v5p", "v6e")
BATCH = 8
HEADER = ["model", "tokens", "smallest", "mesh", "weights", "cache", "temporaries", "peak, GiB", "all-reduce, MB",
          "other, MB", "at least, ms", "bound by"]  # fmt: skip


def decoding(model: str, chip: str) -> dict[str, Any]:
    """The plan of decoding with a full cache of BATCH rows, as data."""
    question = Question(model=model, topology="", batch=BATCH)
    for topology in map(hardware.topology, hardware.names(CHIPS[chip])):
        for candidate in search.candidates(question, topology)[:1]:
            found = plan(replace(question, topology=topology.name, mesh=candidate.mesh))
            if found.fits:
                return report.as_data(found)
    raise ValueError(f"{model} fits no {chip}")


def row(data: Mapping[str, Any]) -> list[str]:
    """One plan's line of the table."""
    (program,) = data["programs"]
    held, time = program["held"], program["roofline"]
    sizes = {"all-reduce": 0, "other": 0}
    for exchange in program["exchanges"]:
        sizes[exchange["kind"] if exchange["kind"] in sizes else "other"] += exchange["nbytes"] or 0
    memory = [held["weights"], held["cache"], program["temporaries"], program["peak"]]
    mesh = ", ".join(f"{axis} {size}" for axis, size in data["mesh"].items()) or "–"
    return [
        data["question"]["model"], f"{data['context']:,}", data["topology"], mesh,
        *(f"{size / GiB:.2f}" for size in memory), *(f"{size / 1e6:.2f}" for size in sizes.values()),
        f"{1000 * time['seconds']:.2f}", time["bound"],
    ]  # fmt: skip


def main() -> None:
    """Plans, and publishes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=configs.names(), metavar="MODEL")
    parser.add_argument("--chips", nargs="+", default=CHIP_NAMES, choices=CHIP_NAMES)
    options = parser.parse_args()
    path = RESULTS / "plans.json"
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for model in options.models:
        for chip in options.chips:
            known[f"{model} {chip}"] = decoding(model, chip)
            ordered = {key: known[key] for key in (f"{m} {c}" for c in CHIP_NAMES for m in MODELS) if key in known}
            tables.publish("plans", ordered, tables.table(HEADER, list(map(row, ordered.values()))), RESULTS, PAGE)


if __name__ == "__main__":
    main()
