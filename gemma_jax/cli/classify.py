"""`gemma-jax classify`: whether images violate policies."""

import argparse
import json
from typing import Any

from gemma_jax.cli import arguments


def add_parser(verbs: Any) -> None:
    """The verb's options."""
    summary = "The probability that images violate policies. For ShieldGemma 2."
    parser = arguments.verb(verbs, "classify", run, summary)
    parser.add_argument("image", nargs="+", help="files")
    arguments.add_model(parser)
    parser.add_argument(
        "--policy",
        action="append",
        metavar="NAME[=TEXT]",
        help="dangerous, sexual or violence, or your own with its text; may be repeated (default: the three)",
    )


def run(options: argparse.Namespace) -> None:
    """A line for each image and policy, or a JSON object for each image."""
    policies = _policies(options.policy) if options.policy else None
    gemma = arguments.load(options)
    for image in options.image:
        found = gemma.classify_image(image, policies)
        if options.json:
            print(json.dumps({"image": image, "violated": found}, ensure_ascii=False))
            continue
        for name, probability in found.items():
            print(f"{probability:.4f}  {name}  {image}")


def _policies(given: list[str]) -> dict[str, str]:
    from gemma_jax.text import shieldgemma

    named = [text.split("=", 1)[0] for text in given if "=" not in text]
    own = dict(text.split("=", 1) for text in given if "=" in text)
    return {**(shieldgemma.chosen(named) if named else {}), **own}
