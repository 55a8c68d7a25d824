"""`gemma-jax convert`: a checkpoint in another format."""

import argparse
import dataclasses
import json
from typing import Any

from gemma_jax.cli import arguments

# those of `gemma_checkpoints.families`, which would take time to import
FORMATS = ("orbax", "huggingface", "deepmind", "gguf")
STYLES = ("text", "bare", "A", "B", "C")


def add_parser(verbs: Any) -> None:
    """The verb's options."""
    summary = "Write a checkpoint in another format, tensor by tensor; the destination is absent or whole."
    parser = arguments.verb(verbs, "convert", run, summary, has_overrides=False)
    parser.add_argument("source", help="a checkpoint in any format, or the name of installed weights")
    parser.add_argument("destination", help="a new folder; for gguf a new file")
    add_target(parser)
    parser.add_argument("--lora", metavar="ADAPTER", help="merge a LoRA adapter into the weights")
    parser.add_argument("--base", metavar="MODEL", help="SOURCE is a LoRA adapter for MODEL; it is converted alone")


def add_target(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Options of verbs that write a checkpoint."""
    parser.add_argument("--to", required=default is None, default=default, choices=FORMATS)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: as the source stores its matrices")
    parser.add_argument("--quantize", choices=("q8_0", "q4_0"), help="for gguf")
    parser.add_argument("--text-only", action="store_true", help="leave out the towers of a multimodal model")
    parser.add_argument("--style", choices=STYLES, help="of prefixes in huggingface names; default: as released")
    parser.add_argument("--verify", action="store_true", help="read all back and compare; then compare logits")


def run(options: argparse.Namespace) -> None:
    """Converts and reports."""
    from gemma_jax.conversion import convert, convert_lora

    if options.base:
        report = convert_lora(options.source, options.destination, base=options.base, to=options.to)
        print(
            json.dumps(dataclasses.asdict(report))
            if options.json
            else f"{report.destination}: {report.num_tensors} tensors"
        )
        return
    names = ("to", "dtype", "quantize", "text_only", "style", "lora", "verify")
    report = convert(options.source, options.destination, **{name: getattr(options, name) for name in names})
    show(report, options.json)


def show(report: Any, as_json: bool) -> None:
    """What was written."""
    if as_json:
        print(json.dumps(dataclasses.asdict(report)))
        return
    print(f"{report.destination}: {report.num_tensors} tensors, {report.num_bytes:,} bytes")
    if report.left_out:
        print(f"left out: {len(report.left_out)} tensors, such as {report.left_out[0]}")
    if report.is_verified:
        difference = report.logit_difference
        logits = "" if difference is None else f"; logits differ by at most {difference:.3g}"
        print(f"verified: every digest{logits}")
