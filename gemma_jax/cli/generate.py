"""`gemma-jax generate`: continue prompts."""

import argparse
import dataclasses
import json
import sys
import time
from typing import Any

from gemma_jax.cli import arguments


def add_parser(verbs: Any) -> None:
    """The verb's options."""
    parser = arguments.verb(verbs, "generate", run, "Continue one or more prompts.")
    parser.add_argument("prompt", nargs="*", help="texts to continue; without any, standard input is read")
    arguments.add_model(parser)
    arguments.add_sampling(parser)
    arguments.add_draft(parser)
    arguments.add_images(parser, "an image for each <start_of_image> in the prompts, in order")
    arguments.add_sound(parser, "a sound for each <start_of_audio> in the prompts, in order")
    parser.add_argument("--logprobs", type=int, metavar="N", help="report log-probabilities (with --json)")
    parser.add_argument("--ignore-eos", action="store_true", help="do not end at a stop token")


def run(options: argparse.Namespace) -> None:
    """Streams one continuation; several are computed together and printed one after another."""
    prompts = options.prompt or [sys.stdin.read().rstrip("\n")]
    if not all(prompts):
        raise ValueError("the prompt is empty; give some text")
    gemma = arguments.load(options)
    sampling = {**arguments.sampling(options), "ignore_eos": options.ignore_eos}
    sampling |= {"images": options.image or None, "image_options": arguments.image_options(options)}
    sampling |= {"audio": options.audio or None, "audio_options": arguments.audio_options(options)}
    sampling |= arguments.draft(options)
    start = time.perf_counter()
    if len(prompts) == 1 and not options.json:
        stream = gemma.stream(prompts[0], **sampling)  # checks the prompt, so before it is shown
        print(prompts[0], end="", flush=True)
        for piece in stream:
            print(piece.text, end="", flush=True)
        print()
        return
    done = gemma.generate(prompts, **sampling)
    seconds = time.perf_counter() - start
    if options.json:
        answers = [{"prompt": p, **dataclasses.asdict(c)} for p, c in zip(prompts, done, strict=True)]
        print(json.dumps({"model": gemma.config.name, "seconds": seconds, "completions": answers}, ensure_ascii=False))
        return
    for prompt, completion in zip(prompts, done, strict=True):
        print(f"{prompt}{completion.text}\n")
