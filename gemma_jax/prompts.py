"""Prompts with images: parts become ids, images become pixels, each image gets its place (gemma3.md section 6.3)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from gemma_jax.configs.config import DecoderConfig, VisionConfig
from gemma_jax.media import images as media
from gemma_jax.media import vision
from gemma_jax.media.images import ImageOptions
from gemma_jax.text import parts
from gemma_jax.text.chat import BOS, IMAGE
from gemma_jax.text.parts import Control, Ids, Part, Picture
from gemma_jax.text.tokenizer import Tokenizer

BEFORE_CROPS = ("Here is the original image ", " and here are some crops to help you see better ")


@dataclass(frozen=True, eq=False)
class Prompt:
    """What the model reads: ids, among them the places of images, and the images' pixels in their order."""

    ids: list[int]
    pixels: Float[np.ndarray, "N height width 3"] | None = None


def assemble(
    prompt: Iterable[Part | Picture], tokenizer: Tokenizer, config: DecoderConfig, options: ImageOptions
) -> Prompt:
    """A prompt of parts. By default an image's place is a row of ids of its own, two newlines on each side of it, as
    in DeepMind's library; with `hf_compat` those newlines merge with the text's, as transformers does it.

    Raises ImageError for what is no image; ValueError for images given to a model without a tower.
    """
    prompt = list(prompt)
    sources = [part.source for part in prompt if isinstance(part, Picture)]
    if not sources:
        return Prompt(parts.encode(tokenizer, prompt))  # pyright: ignore[reportArgumentType]
    tower = vision.tower_of(config)
    pixels = iter(prepared := [media.prepare(source, tower.image_size, options) for source in sources])
    filled: list[Part] = []
    for part in prompt:
        filled += _places(len(next(pixels)), tokenizer, tower, options) if isinstance(part, Picture) else [part]
    return Prompt(parts.encode(tokenizer, filled), np.concatenate(prepared))


def _places(count: int, tokenizer: Tokenizer, tower: VisionConfig, options: ImageOptions) -> list[Part]:
    """The place of one image, or of an image and its crops."""
    place = (tower.begin_token, *[tower.soft_token] * tower.num_soft_tokens, tower.end_token)
    newlines = tuple(tokenizer.encode("\n\n", bos=False))
    one: list[Part] = ["\n\n", Ids(place), "\n\n"] if options.hf_compat else [Ids((*newlines, *place, *newlines))]
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
    options: ImageOptions,
) -> list[Prompt]:
    """Prompts of text or ids with the images that belong to them, in the order in which these stand in them.

    Without images `<start_of_image>` is text like any other. Raises as `assemble`, and ValueError for images and places
    that differ in number, text without a tokenizer, and pan and scan for ids, whose places are fixed.
    """
    sources = media.sources(images)
    counts = [_count_places(prompt, config) if sources else 0 for prompt in prompts]
    if sum(counts) != len(sources):
        vision.tower_of(config)
        raise ValueError(
            f"{len(sources)} images were given, but the prompts have {sum(counts)} places for images; in a text write "
            f"{IMAGE} where an image stands, in ids as often as an image has tokens the image token"
        )
    ends = np.cumsum(counts, dtype=int).tolist()
    return [
        _assembled(prompt, sources[end - count : end], tokenizer, config, options)
        for prompt, count, end in zip(prompts, counts, ends, strict=True)
    ]


def _assembled(
    prompt: str | Sequence[int],
    sources: Sequence[Any],
    tokenizer: Tokenizer | None,
    config: DecoderConfig,
    options: ImageOptions,
) -> Prompt:
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError(f"{config.name} was loaded without a tokenizer; give a list of token ids")
        if not prompt:
            raise ValueError("the prompt is empty; give some text, or token ids such as [2] for BOS alone")
        return assemble(
            [Control(BOS), *(_of_text(prompt, sources) if sources else [prompt])], tokenizer, config, options
        )
    if not sources:
        return Prompt(list(prompt))
    if options.pan_and_scan:
        raise ValueError("pan and scan makes more places for images, so it needs prompts of text, not of ids")
    return Prompt(list(prompt), media.stack(sources, vision.tower_of(config).image_size, options))


def _of_text(text: str, images: Sequence[Any]) -> list[Part | Picture]:
    """A text's parts: in it `<start_of_image>` stands for each of the images."""
    first, *texts = text.split(IMAGE)
    return [first, *(part for pair in zip(map(Picture, images), texts, strict=True) for part in pair)]


def _count_places(prompt: str | Sequence[int], config: DecoderConfig) -> int:
    if isinstance(prompt, str):
        return prompt.count(IMAGE)
    tower = vision.tower_of(config)
    return int(np.sum(np.asarray(prompt) == tower.soft_token)) // tower.num_soft_tokens


def is_single(prompt: Any) -> bool:
    """Whether this is one prompt, not several. Raises TypeError for what is neither."""
    if isinstance(prompt, str):
        return True
    if not isinstance(prompt, Sequence | np.ndarray) or isinstance(prompt, bytes | bytearray):
        raise TypeError(f"prompt is a {type(prompt).__name__}; wanted a text, a list of token ids, or a list of these")
    return len(prompt) > 0 and isinstance(prompt[0], int | np.integer)
