"""`gemma-jax embed`: vectors of texts."""

import argparse
import json
import sys
from typing import Any

from gemma_jax.cli import arguments


def add_parser(verbs: Any) -> None:
    """The verb's options."""
    parser = arguments.verb(verbs, "embed", run, "Unit vectors of texts, one line each. For EmbeddingGemma.")
    parser.add_argument("text", nargs="*", help="texts; without any, the lines of standard input")
    arguments.add_model(parser)
    parser.add_argument("--task", metavar="TASK", help="query, document, classification, clustering, similarity, ...")
    parser.add_argument("--title", help="of documents")
    parser.add_argument("--dim", type=int, metavar="N", help="keep the first N components (768, 512, 256 or 128)")
    parser.add_argument("--truncate", action="store_true", help="cut texts that are too long")


def run(options: argparse.Namespace) -> None:
    """Prints numbers with spaces between, or a JSON object a line."""
    texts = options.text or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not texts:
        raise ValueError("there is no text; give some, or lines on standard input")
    gemma = arguments.load(options)
    given = {name: getattr(options, name) for name in ("task", "title", "dim", "truncate")}
    for text, vector in zip(texts, gemma.embed(texts, **given).tolist(), strict=True):
        if options.json:
            print(json.dumps({"text": text, "embedding": vector}, ensure_ascii=False))
        else:
            print(" ".join(f"{value:.7g}" for value in vector))
