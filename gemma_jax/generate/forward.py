"""What a forward pass takes for checked tokens, images, sound and mask."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax.configs.config import VisionConfig
from gemma_jax.generate.engine import check_ids
from gemma_jax.generate.request import Speaker, sensed
from gemma_jax.media import audio as hearing
from gemma_jax.media import images as media
from gemma_jax.media import places
from gemma_jax.nn.decoder import Inserted
from gemma_jax.nn.masks import Places
from gemma_jax.prompts import Prompt


def batch(
    gemma: Speaker, tokens: Any, images: Any = None, audio: Any = None, mask: Any = None
) -> tuple[jax.Array, Places, Inserted | None]:
    """See `Gemma.logits`; raises as that does."""
    array = np.asarray(tokens)
    if array.ndim != 2 or not array.size:
        raise ValueError(f"tokens has shape {array.shape}; wanted [B, T] with at least one token")
    pictures, clips = media.sources(images), [hearing.read(source) for source in hearing.sources(audio)]
    rows = places.soft_indices(array, gemma.config, len(pictures), len(clips))
    index = np.asarray(rows)
    ids = np.where(index >= 0, 0, array)
    check_ids(ids, gemma.config.num_ids, "tokens")  # pyright: ignore
    if mask is None:
        where = Places.plain(*array.shape)
    elif np.shape(mask) != array.shape:
        raise ValueError(f"mask has shape {np.shape(mask)}, but tokens has {array.shape}; wanted the same")
    else:
        real = np.asarray(mask, bool)
        where = Places.of(jnp.asarray(real), is_dense=bool(np.all(real[:, :-1] >= real[:, 1:])))
    if not pictures and not clips:
        return jnp.asarray(ids, jnp.int32), where, None
    pixels = None
    if pictures:
        pixels = media.stack(pictures, places.tower_of(gemma.config).image_size, black=places.black(gemma.config))
    soft = sensed(gemma.model, [Prompt([], pixels, clips)], rows)
    inserted = Inserted(soft.vectors, jnp.asarray(index))
    if isinstance(gemma.config.vision, VisionConfig):
        where = dataclasses.replace(where, blocks=inserted.blocks(gemma.config.vision.num_soft_tokens))
    return jnp.asarray(ids, jnp.int32), where, inserted
