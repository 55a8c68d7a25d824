"""The command line: `python -m benchmarks.kernels`. Everything it prints is a static estimate, see `estimate`."""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.kernels import baseline, calibrate, cases, dispatch_tables, dump, report, run
from benchmarks.kernels.case import Case
from benchmarks.kernels.generations import GENERATIONS

ABOUT = "Static estimates of the TPU kernels, from libtpu's schedules; no TPU is needed."


def parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=ABOUT)
    command.add_argument("--kernel", help="only cases whose name KERNEL/SHAPE/IMPLEMENTATION contains this")
    command.add_argument("--generation", action="append", choices=GENERATIONS, help="only this; may be repeated")
    command.add_argument("--quick", action="store_true", help="a handful of cases, of ours only")
    command.add_argument("--no-peers", action="store_true", help="not splash, not tokamax")
    command.add_argument("--list", action="store_true", help="the names of the cases, and nothing else")
    command.add_argument("--jobs", type=int, default=1, metavar="N", help="compile N cases at once (default: 1)")
    command.add_argument("--json", action="store_true", help="print the records and not the tables")
    command.add_argument("--tree", action="store_true", help="print the blocks of each schedule and how often they run")
    command.add_argument("--sweep", metavar="KERNEL", help="try all blocks of a kernel; the best go into the tables")
    command.add_argument("--check", action="store_true", help="fail if ours takes 2 %% more cycles, or spills more")
    command.add_argument("--update-baseline", action="store_true", help="write the figures into the baseline")
    command.add_argument("--report", action="store_true", help="write docs/kernels.md from the baseline")
    command.add_argument("--calibrate", action="store_true", help="the estimate beside times jax published for v5e")
    return command


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        return _run(options)
    except (ImportError, FileNotFoundError) as error:
        print(f"{parser().prog}: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    chosen = _chosen(options)
    if options.list:
        print("\n".join(case.name for case in chosen))
        return 0
    print(f"Static estimates, libtpu {dump.libtpu_version()}", file=sys.stderr)
    if options.calibrate:
        print(calibrate.text())
        return 0
    if options.report:
        report.publish(baseline.read())
        return 0
    if not chosen:
        print("there is no such case; see --list", file=sys.stderr)
        return 2
    known = baseline.read() if options.check else {}  # before an hour of compiling
    records = _records(chosen, options)
    _print(records, options)
    if options.update_baseline:
        baseline.update(records)
    if options.check:
        return _check(records, known)
    return 1 if any("error" in record for record in records) and not options.sweep else 0


def _chosen(options: argparse.Namespace) -> list[Case]:
    """The cases that were asked for. `--quick` means few cases, unless a kernel is named too."""
    chosen = cases.every_case()
    if options.sweep:
        return [case for case in chosen if options.sweep in case.name and case.is_ours]
    if options.kernel:
        chosen = [case for case in chosen if options.kernel in case.name]
    if options.quick:
        chosen = [case for case in chosen if case.is_quick]
    if options.no_peers or options.quick:
        chosen = [case for case in chosen if case.is_ours]
    return chosen


def _records(chosen: Sequence[Case], options: argparse.Namespace) -> list[dict[str, Any]]:
    """The best of each case: of the tables' blocks alone for ours, unless sweeping; else of all its choices."""
    tasks = [(case, generation) for case in chosen for generation in options.generation or GENERATIONS]

    def record(case: Case, generation: str, compiler: run.Compiler) -> dict[str, Any]:
        choices = case.choices
        if case.is_ours:
            served = dispatch_tables.blocks_of(case, generation)
            others = [blocks for blocks in choices if blocks != served] if options.sweep else []
            choices = (served, *others)
        return run.best(compiler, case, generation, choices)

    records = run.each(tasks, record, options.jobs)
    if options.sweep:
        for (case, generation), best in zip(tasks, records, strict=True):
            if case.entry is not None and "error" not in best:
                dispatch_tables.write(case, generation, best)
    return records


def _print(records: Sequence[dict[str, Any]], options: argparse.Namespace) -> None:
    if options.json:
        print(json.dumps(records, indent=1))
        return
    if options.tree:
        for record in records:
            for kernel in record.get("kernels", ()):
                print(f"\n{baseline.key(record)} {kernel['name']}{kernel['tree']}")
    print(report.figures([record for record in records if "error" not in record]))
    for record in records:
        if "error" in record:
            print(f"\n{baseline.key(record)} {record['blocks']}: {record['error']}")


def _check(records: Sequence[dict[str, Any]], known: dict[str, baseline.Record]) -> int:
    found = baseline.complaints(records, known)
    for complaint in found:
        print(complaint)
    if not found:
        print(f"{len(records)} static estimates are within what the baseline of libtpu {dump.libtpu_version()} allows")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
