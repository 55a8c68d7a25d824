"""Ourselves against our peers on this machine, with the same weights, in one run.

    python -m benchmarks.compare --output benchmarks/results --markdown docs/benchmarks.md

What is measured and how is told in docs/benchmarks.md; how peers get their environments in benchmarks/README.md.
"""

import argparse
import dataclasses
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks import machine, plot, summary, tables
from benchmarks.measure import QUICK, Record, Run, Settings
from benchmarks.registry import DEFAULT_WORK, ENTRIES, US, chosen

ABOUT = "Ourselves against our peers on this machine, with the same weights, in one run."

PARAMETERS_270M = 268_098_176  # gemma_jax.configs counts the same; 4 bytes each are read once a decode step


def bound(record: Record, parameters: int = PARAMETERS_270M) -> dict[str, Any] | None:
    """The decode steps a second that reading every float32 parameter once allows, by the fastest way of reading."""
    if not record.bandwidth:
        return None
    ways = {way: statistics.median(values) for way, values in record.bandwidth.items()}
    way = max(ways, key=ways.__getitem__)
    size = 4 * parameters
    return {
        "way": way,
        "bytes_per_second": ways[way],
        "bytes_per_step": size,
        "tokens_per_second": ways[way] / size,
        "samples": record.bandwidth,
    }


def result_of(record: Record, settings: Settings) -> dict[str, Any]:
    """Everything worth keeping of a run, ready for JSON."""
    order = [entry.name for entry in ENTRIES if entry.name in record.samples]
    samples = {name: record.samples[name] for name in order}
    medians = summary.medians(samples)
    limit = bound(record)
    return {
        "machine": machine.describe(),
        "settings": dataclasses.asdict(settings),
        "labels": {entry.name: entry.label for entry in ENTRIES},
        "versions": record.versions,
        "medians": medians,
        "ratios": summary.ratios(medians, US),
        "goals": summary.verdicts(medians, US, limit and limit["tokens_per_second"]),
        "bound": limit,
        "medians_per_cpu_second": summary.medians(record.per_cpu_second),
        "first_call_seconds": record.first_calls,
        "first_tokens": record.first_tokens,
        "skipped": record.skipped,
        "samples": samples,
    }


def parser() -> argparse.ArgumentParser:
    names = ", ".join(entry.name for entry in ENTRIES)
    command = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=ABOUT)
    command.add_argument("--peers", default="all", help=f"comma-separated, of: {names} (default: all)")
    command.add_argument("--repeats", type=int, default=5, help="samples of each figure (default: 5)")
    command.add_argument("--threads", type=int, default=2, help="cores that each peer may use (default: 2)")
    command.add_argument("--quick", action="store_true", help="short prompts, to try the harness, not to publish")
    command.add_argument("--work", type=Path, default=DEFAULT_WORK, help="folder that prepare.py filled")
    command.add_argument("--output", type=Path, default=DEFAULT_WORK / "results", help="folder for JSON and PNG")
    command.add_argument("--markdown", type=Path, help="a page to write the tables into, between its markers")
    command.add_argument("--no-plot", action="store_true", help="no PNG")
    return command


def main() -> int:
    arguments = parser().parse_args()
    if arguments.repeats < 1 or arguments.threads < 1:
        parser().error("--repeats and --threads are at least 1")
    try:
        entries = chosen(arguments.peers)
    except ValueError as error:
        parser().error(str(error))
    settings = Settings(repeats=arguments.repeats, threads=arguments.threads, **(QUICK if arguments.quick else {}))
    record = Run(entries, arguments.work, settings, lambda line: print(line, file=sys.stderr, flush=True)).measure()
    result = result_of(record, settings)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "compare.json").write_text(json.dumps(result, indent=1) + "\n")
    if not arguments.no_plot and result["medians"]:
        plot.draw(result, arguments.output / "compare.png")
    parts = tables.sections(result)
    if arguments.markdown:
        tables.fill_file(arguments.markdown, parts)
    print("\n\n".join(parts.values()))
    return 0 if result["medians"] else 1


if __name__ == "__main__":
    sys.exit(main())
