"""Weights that stay as the file has them, beside llama.cpp on the same files: quantised and bfloat16, on CPU.

    python -m benchmarks.stored --output benchmarks/results --markdown docs/benchmarks.md

Measured as in `compare`; see docs/benchmarks.md.
"""

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine, summary, tables
from benchmarks.measure import QUICK, Record, Run, Settings
from benchmarks.registry import DEFAULT_WORK, US, Entry, chosen

ABOUT = "Weights that stay as the file has them, beside llama.cpp on the same files."
FILES: Mapping[str, str] = {
    "Q8_0": "demo-q8_0.gguf",
    "Q4_0": "demo-q4_0.gguf",
    "Q4_K_M": "demo.gguf",
    "BF16": "demo-bf16.gguf",
}
GOALS: Mapping[str, float] = {"Q8_0": 0.8, "Q4_0": 0.6, "Q4_K_M": 0.6, "BF16": 0.9}  # of llama.cpp's decoding, one row
OURS, THEIRS = "stored", "llama_cpp"
# against our own float32, the share of its speed that reading a prompt must keep
PREFILL_GOAL = 0.8


def entries_of(files: Sequence[str]) -> list[Entry]:
    """Ourselves in float32, then ourselves and llama.cpp on each file."""
    found = chosen(US)
    for name in files:
        found.append(Entry(f"{OURS}_{name}", f"gemma_jax {name}", "gemma_jax_stored", None, FILES[name], compiles=True))
        found.append(Entry(f"{THEIRS}_{name}", f"llama.cpp {name}", "llama_cpp", "llama_cpp", FILES[name]))
    return found


def result_of(record: Record, settings: Settings, files: Sequence[str]) -> dict[str, Any]:
    """Everything worth keeping of a run, ready for JSON."""
    return {
        "machine": machine.describe(),
        "settings": dataclasses.asdict(settings),
        "files": list(files),
        "versions": record.versions,
        "medians": summary.medians(record.samples),
        "medians_per_cpu_second": summary.medians(record.per_cpu_second),
        "first_call_seconds": record.first_calls,
        "first_tokens": record.first_tokens,
        "skipped": record.skipped,
        "samples": record.samples,
    }


def page(result: Mapping[str, Any]) -> str:
    """The table, the goals and who is missing. Raises ValueError if nobody was measured."""
    if not result["medians"]:
        raise ValueError(f"nothing was measured: {result['skipped']}")
    medians, files = result["medians"], result["files"]
    columns = [(US, "ours, float32")]
    for name in files:
        columns += [(f"{OURS}_{name}", f"ours, {name}"), (f"{THEIRS}_{name}", f"llama.cpp, {name}")]
    rows = [
        [figure.label, *(tables.number(medians.get(peer, {}).get(figure.key)) for peer, _ in columns)]
        for figure in summary.figures_of(medians)
    ]
    words = {True: "yes", False: "**no**", None: "not measured"}
    goals = [
        [label, tables.number(wanted), tables.number(reached), words[None if reached is None else reached >= wanted]]
        for name in files
        for label, wanted, reached in goals_of(medians, name)
    ]
    settings = result["settings"]
    noise = [summary.spread(values) for samples in result["samples"].values() for values in samples.values()]
    parts = [
        f"{result['machine']['cpu']}, {settings['threads']} cores, {result['machine']['date']}. "
        f"Medians of {settings['repeats']}; (largest - smallest) / median is {statistics.median(noise):.0%} for the "
        f"middle figure and "
        f"{max(noise):.0%} for the noisiest.",
        tables.table(["", *(label for _, label in columns)], rows),
        tables.table(["goal", "wanted", "reached", "met"], goals),
    ]
    parts += ["\n".join(f"- {peer}: skipped: {reason}" for peer, reason in result["skipped"].items())]
    return "\n\n".join(parts).strip()


def goals_of(medians: Mapping[str, Mapping[str, float]], name: str) -> list[tuple[str, float, float | None]]:
    """What is wanted of a file, how much, and what was reached: None if it was not measured."""
    ours, theirs, plain = (medians.get(peer, {}) for peer in (f"{OURS}_{name}", f"{THEIRS}_{name}", US))

    def ratio(figure: str, base: Mapping[str, float]) -> float | None:
        return ours[figure] / base[figure] if figure in ours and figure in base else None

    return [
        (f"{name}: decoding one row, of llama.cpp's speed", GOALS[name], ratio("decode_1", theirs)),
        (f"{name}: prefill of 512 tokens, of float32's speed", PREFILL_GOAL, ratio("prefill_512", plain)),
    ]


def parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(prog="python -m benchmarks.stored", description=ABOUT)
    command.add_argument("--files", default=",".join(FILES), help=f"comma-separated, of: {', '.join(FILES)}")
    command.add_argument("--repeats", type=int, default=5, help="samples of each figure (default: 5)")
    command.add_argument("--threads", type=int, default=2, help="cores that each peer may use (default: 2)")
    command.add_argument("--quick", action="store_true", help="short prompts, to try the harness, not to publish")
    command.add_argument("--work", type=Path, default=DEFAULT_WORK, help="folder that prepare.py filled")
    command.add_argument("--output", type=Path, default=DEFAULT_WORK / "results", help="folder for JSON")
    command.add_argument("--markdown", type=Path, help="a page to write the table into, between its markers")
    return command


def main() -> int:
    arguments = parser().parse_args()
    files = arguments.files.split(",")
    if unknown := set(files) - set(FILES):
        parser().error(f"unknown files {', '.join(sorted(unknown))}; there are {', '.join(FILES)}")
    sizes = QUICK if arguments.quick else {"prefill_tokens": (512,)}
    settings = Settings(repeats=arguments.repeats, threads=arguments.threads, has_cold_starts=False, **sizes)
    run = Run(entries_of(files), arguments.work, settings, lambda line: print(line, file=sys.stderr, flush=True))
    result = result_of(run.measure(), settings, files)
    if not result["medians"]:
        return 1  # why has been said
    arguments.output.mkdir(parents=True, exist_ok=True)
    tables.publish("stored", result, page(result), arguments.output, arguments.markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
