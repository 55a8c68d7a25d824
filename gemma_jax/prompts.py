"""Prompts with images and sound: parts become ids, each gets its place (gemma3.md, 6.3; gemma3n.md, 4.4)."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from gemma_jax.configs.config import DecoderConfig
from gemma_jax.media import audio as hearing
from gemma_jax.media import images as media
from gemma_jax.media import places, video
from gemma_jax.media.audio import AudioOptions
from gemma_jax.media.images import ImageOptions
from gemma_jax.media.video import VideoOptions
from gemma_jax.text import parts
from gemma_jax.text.chat import AUDIO, BOS, IMAGE
from gemma_jax.text.parts import Control, Film, Ids, Item, Medium, Part, Picture, Sound
from gemma_jax.text.tokenizer import Tokenizer

BEFORE_CROPS = ("Here is the original image ", " and here are some crops to help you see better ")


@dataclass(frozen=True, kw_only=True)
class MediaOptions:
    """How images, sound and videos are prepared."""

    image: ImageOptions = ImageOptions()
    audio: AudioOptions = AudioOptions()
    video: VideoOptions = VideoOptions()


@dataclass(frozen=True, eq=False)
class Prompt:
    """What the model reads: ids, among them the places of images and sound, and these in their order."""

    ids: list[int]
    pixels: Float[np.ndarray, "N height width 3"] | None = None
    clips: Sequence[Float[np.ndarray, " n"]] = ()  # at 16 kHz


def assemble(prompt: Iterable[Item], tokenizer: Tokenizer, config: DecoderConfig, options: MediaOptions) -> Prompt:
    """A prompt of parts. By default the place of an image or clip is a row of ids of its own, two newlines on each side
    of it, as in DeepMind's library; with `hf_compat` those newlines merge with the text's, as transformers does it.
    A video is its images, each with its time in front.

    Raises ImageError, AudioError, VideoError for what is none; ValueError for media given to a model without a tower.
    """
    prompt = list(_with_frames(prompt, options))
    if not any(isinstance(part, Medium) for part in prompt):
        return Prompt(parts.encode(tokenizer, prompt))  # pyright: ignore[reportArgumentType]
    filled: list[Part] = []
    seen: list[np.ndarray] = []
    clips: list[np.ndarray] = []
    is_merged = options.image.hf_compat
    for part in prompt:
        if isinstance(part, Picture):
            tower = places.tower_of(config)
            seen.append(media.prepare(part.source, tower.image_size, options.image, places.black(config)))
            filled += _of_image(len(seen[-1]), _place(tower, tokenizer, is_merged))
        elif isinstance(part, Sound):
            ears = places.ears_of(config)
            heard = hearing.clips(part.source, options.audio)
            clips += heard
            filled += _place(ears, tokenizer, is_merged) * len(heard)
        else:
            assert not isinstance(part, Film)
            filled.append(part)
    return Prompt(parts.encode(tokenizer, filled), np.concatenate(seen) if seen else None, clips)


def _with_frames(prompt: Iterable[Item], options: MediaOptions) -> Iterable[Item]:
    for part in prompt:
        if isinstance(part, Film):
            for frame in video.read(part.source, options.video):
                yield from (frame.clock, Picture(frame.image))
        else:
            yield part


def _place(tower: places.Tower, tokenizer: Tokenizer, is_merged: bool) -> list[Part]:
    """The place of one image or clip."""
    place = (tower.begin_token, *[tower.soft_token] * tower.num_soft_tokens, tower.end_token)
    newlines = tuple(tokenizer.encode("\n\n", bos=False))
    return ["\n\n", Ids(place), "\n\n"] if is_merged else [Ids((*newlines, *place, *newlines))]


def _of_image(count: int, one: list[Part]) -> list[Part]:
    """The places of an image, or of an image and its crops."""
    if count == 1:
        return one
    before, between = BEFORE_CROPS
    others = [part for _ in range(count - 1) for part in (" ", *one)]
    return [before, *one, between, *others[1:]]


def assemble_all(
    prompts: Sequence[str | Sequence[int]],
    images: Any,
    tokenizer: Tokenizer | None,
    config: DecoderConfig,
    options: MediaOptions,
    audio: Any = None,
) -> list[Prompt]:
    """Prompts of text or ids with the images and sound that belong to them, in the order in which these stand in them.

    Without images `<start_of_image>` is text like any other, and so is `<start_of_audio>` without sound. Raises as
    `assemble`, and ValueError for media and places that differ in number, text without a tokenizer, and pan and scan
    for ids, whose places are fixed.
    """
    pictures = [Picture(source) for source in media.sources(images)]
    sounds = [Sound(source) for source in hearing.sources(audio)]
    waiting = {IMAGE: iter(pictures), AUDIO: iter(sounds)}
    counts = {
        IMAGE: [_count_places(prompt, IMAGE, places.tower_of, config) if pictures else 0 for prompt in prompts],
        AUDIO: [_count_places(prompt, AUDIO, places.ears_of, config) if sounds else 0 for prompt in prompts],
    }
    for what, mark, given in (("images", IMAGE, pictures), ("clips", AUDIO, sounds)):
        if sum(counts[mark]) != len(given):
            raise ValueError(
                f"{len(given)} {what} were given, but the prompts have {sum(counts[mark])} places for {what}; in a "
                f"text write {mark} where one stands, in ids as often as it has tokens its token"
            )
    found = []
    for row, prompt in enumerate(prompts):
        taken = {mark: [next(waiting[mark]) for _ in range(counts[mark][row])] for mark in waiting}
        found.append(_assembled(prompt, taken, tokenizer, config, options))
    return found


def _assembled(
    prompt: str | Sequence[int],
    taken: dict[str, list[Any]],
    tokenizer: Tokenizer | None,
    config: DecoderConfig,
    options: MediaOptions,
) -> Prompt:
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError(f"{config.name} was loaded without a tokenizer; give a list of token ids")
        if not prompt:
            raise ValueError("the prompt is empty; give some text, or token ids such as [2] for BOS alone")
        return assemble([Control(BOS), *_of_text(prompt, taken)], tokenizer, config, options)
    pictures, sounds = taken[IMAGE], taken[AUDIO]
    if pictures and options.image.pan_and_scan:
        raise ValueError("pan and scan makes more places for images, so it needs prompts of text, not of ids")
    pixels, clips = None, []
    if pictures:
        size, black = places.tower_of(config).image_size, places.black(config)
        pixels = media.stack([picture.source for picture in pictures], size, options.image, black)
    for sound in sounds:
        heard = hearing.clips(sound.source, options.audio)
        if len(heard) != 1:
            raise ValueError(f"a sound makes {len(heard)} clips, so it needs a prompt of text, not of ids; or cut it")
        clips += heard
    return Prompt(list(prompt), pixels, clips)


def _of_text(text: str, taken: dict[str, list[Any]]) -> list[Item]:
    """A text's parts: in it marks stand for images and sounds, for each in its order."""
    marks = [mark for mark, media in taken.items() if media]
    if not marks:
        return [text]
    waiting = {mark: iter(taken[mark]) for mark in marks}
    pieces = re.split("(" + "|".join(map(re.escape, marks)) + ")", text)
    return [next(waiting[piece]) if i % 2 else piece for i, piece in enumerate(pieces)]


def _count_places(prompt: str | Sequence[int], mark: str, tower_of: Any, config: DecoderConfig) -> int:
    tower = tower_of(config)
    if isinstance(prompt, str):
        return prompt.count(mark)
    return int(np.sum(np.asarray(prompt) == tower.soft_token)) // tower.num_soft_tokens


def is_single(prompt: Any) -> bool:
    """Whether this is one prompt, not several. Raises TypeError for what is neither."""
    if isinstance(prompt, str):
        return True
    if not isinstance(prompt, Sequence | np.ndarray) or isinstance(prompt, bytes | bytearray):
        raise TypeError(f"prompt is a {type(prompt).__name__}; wanted a text, a list of token ids, or a list of these")
    return len(prompt) > 0 and isinstance(prompt[0], int | np.integer)
