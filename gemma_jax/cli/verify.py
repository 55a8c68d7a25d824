"""`gemma-jax verify`: is a checkpoint whole, undamaged, and what its config says?"""

import argparse
import dataclasses
import json
from typing import Any

from gemma_jax.cli import arguments

DAMAGED = 1


def add_parser(verbs: Any) -> None:
    """The verb's options."""
    summary = "Look at every byte of a checkpoint; exit code 1 if anything is damaged, missing or foreign."
    parser = arguments.verb(verbs, "verify", run, summary, has_overrides=False)
    parser.add_argument("source", help="a checkpoint in any format, or the name of installed weights")


def run(options: argparse.Namespace) -> int:
    """Prints every problem found."""
    from gemma_jax.conversion import verify

    report = verify(options.source)
    if options.json:
        print(json.dumps(dataclasses.asdict(report)))
    else:
        for problem in report.problems:
            print(problem)
        print(_verdict(report))
    return DAMAGED if report.problems else 0


def _verdict(report: Any) -> str:
    if report.problems:
        return f"damaged: {len(report.problems)} problems; get the checkpoint anew"
    size = f"{report.num_tensors} tensors, {report.num_bytes:,} bytes"
    if report.is_sealed:
        return f"whole: {size}; every file has the digest that it was written with"
    return f"readable: {size}; they fit the config and all values are numbers, but the format holds no digests"
