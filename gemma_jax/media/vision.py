"""Images on their way into the decoder: which places of a prompt they take, and whether they fit."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from gemma_jax.configs.config import DecoderConfig, VisionConfig


def tower_of(config: DecoderConfig) -> VisionConfig:
    """The config of the tower. Raises ValueError for a model without one."""
    if not isinstance(config.vision, VisionConfig):
        raise ValueError(f"{config.name} has no vision tower; images need a Gemma 3 of 4B or more")
    return config.vision


def soft_indices(
    prompts: Sequence[Sequence[int]] | np.ndarray, num_images: int, config: DecoderConfig
) -> list[Int[np.ndarray, " T"]]:
    """Of each prompt which of the images' soft tokens, counted through all images, stands at each place; else -1.

    Raises ValueError unless there are places for just these images, each in one piece.
    """
    tower = config.vision
    if not isinstance(tower, VisionConfig):
        if num_images:
            raise ValueError(f"{config.name} has no vision tower, but {num_images} images were given")
        return [np.full(len(prompt), -1, np.int32) for prompt in prompts]
    found, count, size = [], 0, tower.num_soft_tokens
    for prompt in prompts:
        is_soft = np.asarray(prompt) == tower.soft_token
        found.append(np.where(is_soft, count + np.cumsum(is_soft) - 1, -1).astype(np.int32))
        count += int(is_soft.sum())
    if count != num_images * size:
        raise ValueError(
            f"there are {count} image tokens {tower.soft_token}, but {num_images} images take {num_images} x {size}; "
            f"give each image its {size} places"
        )
    for index in found:
        edges = np.diff(np.pad(index >= 0, 1).astype(np.int8))
        lengths = np.flatnonzero(edges == -1) - np.flatnonzero(edges == 1)
        if wrong := lengths[lengths != size].tolist():
            raise ValueError(
                f"{wrong[0]} image tokens {tower.soft_token} stand in a row; an image takes {size}, text parts images"
            )
    return found
