"""`gemma-jax transcribe`: what is said in sounds."""

import argparse
import json
from typing import Any

from gemma_jax.cli import arguments


def add_parser(verbs: Any) -> None:
    """The verb's options."""
    parser = arguments.verb(verbs, "transcribe", run, "Write down what is said in sounds, with Gemma 3n.")
    parser.add_argument("sound", nargs="+", help="files: WAV, FLAC, Ogg, MP3; beyond 30 s they are heard in clips")
    arguments.add_model(parser)
    arguments.add_sampling(parser)
    parser.add_argument("--language", metavar="CODE", help="that is spoken, such as en")
    parser.add_argument("--translate-to", metavar="CODE", help="the text is then followed by its translation")


def run(options: argparse.Namespace) -> None:
    """One text for each sound."""
    gemma = arguments.load(options)
    languages = {"language": options.language, "translate_to": options.translate_to}
    texts = gemma.transcribe(options.sound, **languages, **arguments.sampling(options))
    if options.json:
        report = [{"sound": sound, "text": text} for sound, text in zip(options.sound, texts, strict=True)]
        print(json.dumps({"model": gemma.config.name, "transcripts": report}, ensure_ascii=False))
        return
    print("\n".join(texts))
