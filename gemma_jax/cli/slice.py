"""`gemma-jax slice`: a smaller model within a larger one's checkpoint."""

import argparse
from typing import Any

from gemma_jax.cli import arguments, convert


def add_parser(verbs: Any) -> None:
    """The verb's options."""
    summary = "Write a slice of a MatFormer model as a checkpoint of its own; only the slice is read."
    parser = arguments.verb(verbs, "slice", run, summary, has_overrides=False)
    parser.add_argument("source", help="a checkpoint in any format, or a name")
    parser.add_argument("destination", help="a new folder; for gguf a new file")
    parser.add_argument("--config", metavar="NAME", help="e2b, or the name of a slice in --configs")
    parser.add_argument("--configs", metavar="FILE", help="slices as a .csv in the form of gemma3n-slicing-configs")
    parser.add_argument(
        "--ffw", metavar="WIDTHS", help="of all kept layers, or of each: 8192, or '[16384]*5+[8192]*30'"
    )
    parser.add_argument("--skip", metavar="LAYERS", default="", help="to leave out, for example 20,21,22,23,24")
    convert.add_target(parser, default="orbax")


def run(options: argparse.Namespace) -> None:
    """Slices and reports."""
    from gemma_jax.conversion import convert as write

    given = {name: getattr(options, name) for name in ("to", "dtype", "quantize", "text_only", "style", "verify")}
    report = write(options.source, options.destination, slicing=_slicing(options), **given)
    convert.show(report, options.json)


def _slicing(options: argparse.Namespace) -> Any:
    from gemma_jax.configs import slicing

    if options.config is None and options.configs:
        raise ValueError(f"--configs {options.configs} needs --config, the name of one of its slices")
    if options.config is None:
        if options.ffw is None and not options.skip:
            raise ValueError("nothing to cut: give --config, or --ffw and --skip")
        widths = None if options.ffw is None else slicing.parse_numbers(options.ffw)
        return slicing.Slicing(slicing.parse_list(options.skip), widths)
    if options.ffw is not None or options.skip:
        raise ValueError("give --config, or --ffw and --skip, not both")
    named = {"e2b": slicing.E2B} if options.configs is None else slicing.read_slicings(options.configs)
    if options.config not in named:
        raise ValueError(f"there is no slice {options.config!r}; there are {', '.join(named)}")
    return named[options.config]
