"""A prompt in parts: text, which is never control, and the control tokens that a template puts between."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from gemma_jax.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Control:
    """A control token, by its piece, such as `<start_of_turn>`."""

    piece: str


@dataclass(frozen=True)
class Ids:
    """Tokens that are known as ids only, such as those of an image's place."""

    ids: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Picture:
    """The place of an image in a prompt, and what holds it (see `media.images.read`)."""

    source: Any


@dataclass(frozen=True, eq=False)
class Sound:
    """The place of a clip in a prompt, and what holds it (see `media.audio.read`)."""

    source: Any


@dataclass(frozen=True, eq=False)
class Film:
    """Images of a video with their times (see `media.video.read`)."""

    source: Any


Medium = Picture | Sound | Film
Part = str | Control | Ids  # what a prompt is encoded from, once its images and sound have become ids
Item = Part | Medium


def encode(tokenizer: Tokenizer, parts: Iterable[Part]) -> list[int]:
    """The ids of a prompt, without `<bos>` unless it is among the parts.

    Text between two others is encoded in one piece, as a tokenizer that splits at control tokens would, so newlines
    merge as in the reference. Raises ValueError for a control piece that the vocabulary has not.
    """
    ids: list[int] = []
    for part in merged(parts):
        if isinstance(part, str):
            ids += tokenizer.encode(part, bos=False)
        else:
            ids += part.ids if isinstance(part, Ids) else [tokenizer.id_of(part.piece)]
    return ids


def decode(tokenizer: Tokenizer, ids: Sequence[int]) -> list[Part]:
    """The parts of generated ids: what only looks like a control token is text."""
    pieces = {id_: piece for piece, id_ in tokenizer.control_ids.items()}
    parts: list[Part] = []
    plain: list[int] = []
    for token in ids:
        if token not in pieces:
            plain.append(token)
            continue
        parts += [tokenizer.decode(plain)] if plain else []
        parts.append(Control(pieces[token]))
        plain = []
    return [*parts, tokenizer.decode(plain)] if plain else parts


def merged(parts: Iterable[Part]) -> Iterator[Part]:
    """Texts that stand side by side as one; empty ones vanish."""
    text = ""
    for part in parts:
        if isinstance(part, str):
            text += part
            continue
        if text:
            yield text
        text = ""
        yield part
    if text:
        yield text
