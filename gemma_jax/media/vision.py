"""Images on their way into the decoder: which places of a prompt they take, and whether they fit."""

from typing import Any

import numpy as np
from jaxtyping import Float, Int

from gemma_jax.configs.config import DecoderConfig, VisionConfig


def check_pixels(images: Any, config: DecoderConfig) -> Float[np.ndarray, "N height width 3"]:
    """Images as the tower takes them. Raises ValueError for another shape, values that are no numbers, or no tower."""
    tower = config.vision
    if not isinstance(tower, VisionConfig):
        raise ValueError(f"{config.name} has no vision tower; images need a Gemma 3 of 4B or more")
    array = np.asarray(images)
    wanted = (tower.image_size, tower.image_size, 3)
    if array.ndim != 4 or array.shape[1:] != wanted or array.dtype.kind != "f":
        raise ValueError(
            f"images has shape {array.shape} and dtype {array.dtype}; wanted floats of shape [N, {wanted[0]}, "
            f"{wanted[1]}, 3]"
        )
    if not np.isfinite(array).all():
        raise ValueError("images has values that are infinite or no numbers; pixels lie between -1 and 1")
    return array


def soft_index(tokens: Int[np.ndarray, "B T"], num_images: int, config: DecoderConfig) -> Int[np.ndarray, "B T"]:
    """Which of the images' soft tokens, counted through all images, stands at each place; -1 for a token's own row.

    Raises ValueError unless there are places for just these images, each in one piece.
    """
    tower = config.vision
    if not isinstance(tower, VisionConfig):
        if num_images:
            raise ValueError(f"{config.name} has no vision tower, but {num_images} images were given")
        return np.full(tokens.shape, -1, np.int32)
    is_soft, size = tokens == tower.soft_token, tower.num_soft_tokens
    if is_soft.sum() != num_images * size:
        raise ValueError(
            f"tokens has {int(is_soft.sum())} times the image token {tower.soft_token}, but {num_images} images take "
            f"{num_images} x {size}; give each image its {size} places"
        )
    padded = np.pad(is_soft, ((0, 0), (1, 1)))
    starts, stops = (np.argwhere(np.diff(padded.astype(np.int8)) == step) for step in (1, -1))
    lengths = stops[:, 1] - starts[:, 1]
    if wrong := [int(length) for length in lengths if length != size]:
        raise ValueError(
            f"{wrong[0]} image tokens {tower.soft_token} stand in a row; an image takes {size}, and text parts images"
        )
    return np.where(is_soft, np.cumsum(is_soft).reshape(tokens.shape) - 1, -1).astype(np.int32)
