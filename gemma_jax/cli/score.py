"""`gemma-jax score`: how likely texts are."""

import argparse
import json
import sys
from typing import Any

from gemma_jax.cli import arguments


def add_parser(verbs: Any) -> None:
    """The verb's options."""
    parser = arguments.verb(verbs, "score", run, "Log-probability of each token of a text, and its perplexity.")
    parser.add_argument("text", nargs="*", help="texts; without any, standard input is read as one")
    arguments.add_model(parser)


def run(options: argparse.Namespace) -> None:
    """One table for each text, or one JSON object a line."""
    texts = options.text or [sys.stdin.read().rstrip("\n")]
    gemma = arguments.load(options)
    for text in texts:
        score = gemma.score(text)
        summary = {"nll": score.nll, "perplexity": score.perplexity}
        if options.json:
            values = {"text": text, "tokens": score.tokens, "logprobs": score.logprobs, **summary}
            print(json.dumps(values, ensure_ascii=False))
            continue
        for token, logprob in zip(score.tokens[1:], score.logprobs, strict=True):
            piece = token if gemma.tokenizer is None else repr(gemma.tokenizer.decode([token]))
            print(f"{logprob:9.3f}  {piece}")
        print(f"nll {score.nll:.4f} nats a token, perplexity {score.perplexity:.3f}")
