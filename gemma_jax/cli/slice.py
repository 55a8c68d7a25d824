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
    parser.add_argument("--sweep", action="store_true", help="measure many slices instead; DESTINATION gets the table")
    parser.add_argument("--text", metavar="FILE", help="with --sweep: what they are measured on")
    convert.add_target(parser, default="orbax")


def run(options: argparse.Namespace) -> None:
    """Slices and reports."""
    if options.sweep:
        _sweep(options)
        return
    if options.text:
        raise ValueError("--text is for --sweep")
    from gemma_jax.conversion import convert as write

    given = {name: getattr(options, name) for name in ("to", "dtype", "quantize", "text_only", "style", "verify")}
    report = write(options.source, options.destination, slicing=_slicing(options), **given)
    convert.show(report, options.json)


def _sweep(options: argparse.Namespace) -> None:
    """All slices of --configs, or all ffws narrowed alike, on a text."""
    from pathlib import Path

    if options.config or options.ffw or options.skip:
        raise ValueError("a sweep takes its slices from --configs, or narrows all ffws alike; leave out the others")
    if not options.text:
        raise ValueError("a sweep needs --text, a file to measure on")
    text, folder = Path(options.text).read_text(encoding="utf-8"), Path(options.destination)
    if folder.exists():
        raise FileExistsError(f"{folder} exists; name a new folder")
    from gemma_jax.configs import slicing
    from gemma_jax.loading import load
    from gemma_jax.matformer import sweep

    named = slicing.read_slicings(options.configs) if options.configs else None
    gemma = load(options.source, dtype=options.dtype or "auto")
    say = (lambda line: None) if options.json else print
    points = sweep.sweep(gemma, named or sweep.default_slicings(gemma.config), text, say=say)
    files = sweep.write(points, folder)
    print(files[0].read_text() if options.json else f"written: {', '.join(map(str, files))}")


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
