"""`gemma-jax chat`: a conversation in the terminal."""

import argparse
import json
import sys
from typing import Any

from gemma_jax.cli import arguments

HELP = "/reset begins anew, /quit (or end of input) ends."


def add_parser(verbs: Any) -> None:
    """The verb's options."""
    parser = arguments.verb(verbs, "chat", run, f"Talk with an instruction-tuned model. {HELP}")
    arguments.add_model(parser)
    arguments.add_sampling(parser)
    arguments.add_images(parser, "an image in front of the first message")
    arguments.add_sound(parser, "a sound in front of the first message")
    parser.add_argument("--video", action="append", default=[], metavar="FILE", help="likewise; may be repeated")
    parser.add_argument("--system", metavar="TEXT", help="instructions put in front of the first message")


def run(options: argparse.Namespace) -> None:
    """Reads a line, streams the answer, keeps both; with --json one object a line for each answer."""
    gemma = arguments.load(options)
    sampling = {**arguments.sampling(options), "image_options": arguments.image_options(options)}
    sampling["audio_options"] = arguments.audio_options(options)
    is_terminal = sys.stdin.isatty()
    beginning = [{"role": "system", "content": options.system}] if options.system else []
    messages: list[dict[str, Any]] = list(beginning)
    if is_terminal:
        print(HELP)
    while (line := _line(is_terminal)) is not None and line != "/quit":
        if line == "/reset":
            messages = list(beginning)
        elif line:
            turn = [*messages, {"role": "user", "content": _content(line, options, messages == beginning)}]
            try:
                messages = [*turn, {"role": "assistant", "content": _answer(gemma, turn, sampling, options.json)}]
            except ValueError as error:  # the history has outgrown the context: the conversation is not lost
                if not is_terminal:
                    raise
                print(f"{error}. {HELP}", file=sys.stderr)


def _content(line: str, options: argparse.Namespace, is_first: bool) -> str | list[dict[str, str]]:
    shown = [{"type": kind, kind: file} for kind in ("image", "audio", "video") for file in getattr(options, kind)]
    return [*shown, {"type": "text", "text": line}] if shown and is_first else line


def _line(is_terminal: bool) -> str | None:
    if is_terminal:
        print("> ", end="", flush=True)
    line = sys.stdin.readline()
    return line.strip() if line else None


def _answer(gemma: Any, messages: list[dict[str, Any]], sampling: dict[str, Any], as_json: bool) -> str:
    text, reason = "", None
    for piece in gemma.stream_chat(messages, **sampling):
        text, reason = text + piece.text, piece.finish_reason
        if not as_json:
            print(piece.text, end="", flush=True)
    print(json.dumps({"text": text, "finish_reason": reason}, ensure_ascii=False) if as_json else "", flush=True)
    return text
