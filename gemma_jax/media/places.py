"""Images and sound on their way into the decoder: which places of a prompt they take, and whether they fit."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from gemma_jax.configs.config import DecoderConfig, VisionConfig
from gemma_jax.configs.towers import AudioConfig, MobileNetConfig

Tower = VisionConfig | MobileNetConfig | AudioConfig


def tower_of(config: DecoderConfig) -> VisionConfig | MobileNetConfig:
    """The config of the vision tower. Raises ValueError for a model without one."""
    if config.vision is None:
        raise ValueError(f"{config.name} has no vision tower; images need a Gemma 3 of 4B or more, or a Gemma 3n")
    return config.vision


def ears_of(config: DecoderConfig) -> AudioConfig:
    """The config of the audio tower. Raises ValueError for a model without one."""
    if config.audio is None:
        raise ValueError(f"{config.name} has no audio tower; sound needs a Gemma 3n")
    return config.audio


def black(config: DecoderConfig) -> float:
    """The value of a black pixel; a white one is 1."""
    return -1.0 if isinstance(config.vision, VisionConfig) else 0.0


def soft_indices(
    prompts: Sequence[Sequence[int]] | np.ndarray, config: DecoderConfig, num_images: int = 0, num_clips: int = 0
) -> list[Int[np.ndarray, " T"]]:
    """Of each prompt which of the soft tokens stands at each place; else -1. They are counted through all images of all
    prompts, then through all clips.

    Raises ValueError unless there are places for just these images and clips, each in one piece.
    """
    found = [np.full(len(prompt), -1, np.int32) for prompt in prompts]
    first = 0
    for name, tower, count in (("image", config.vision, num_images), ("audio", config.audio, num_clips)):
        if tower is None and count:
            (tower_of if name == "image" else ears_of)(config)
        if tower is not None:
            masks = [np.asarray(prompt) == tower.soft_token for prompt in prompts]
            _check(masks, tower, name, count)
            for index, is_soft in zip(found, masks, strict=True):
                index[is_soft] = first + np.arange(np.count_nonzero(is_soft))
                first += int(np.count_nonzero(is_soft))
    return found


def _check(masks: Sequence[Bool[np.ndarray, " T"]], tower: Tower, name: str, given: int) -> None:
    count, size = sum(map(np.count_nonzero, masks)), tower.num_soft_tokens
    what = "images" if name == "image" else "clips"
    if count != given * size:
        raise ValueError(
            f"there are {count} {name} tokens {tower.soft_token}, but {given} {what} take {given} x {size}; give each "
            f"its {size} places"
        )
    for is_soft in masks:
        edges = np.diff(np.pad(is_soft, 1).astype(np.int8))
        lengths = np.flatnonzero(edges == -1) - np.flatnonzero(edges == 1)
        if wrong := lengths[lengths != size].tolist():
            raise ValueError(
                f"{wrong[0]} {name} tokens {tower.soft_token} stand in a row; one of the {what} takes {size}, text "
                f"parts {what}"
            )
