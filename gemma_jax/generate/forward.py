"""What a forward pass takes for checked tokens, images, sound and mask, and where it runs."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax.configs.config import VisionConfig
from gemma_jax.generate.checks import check_ids
from gemma_jax.generate.request import Speaker, sensed
from gemma_jax.media import audio as hearing
from gemma_jax.media import images as media
from gemma_jax.media import places
from gemma_jax.nn.decoder import Decoder, Inserted
from gemma_jax.nn.edited import Edited
from gemma_jax.nn.masks import Places
from gemma_jax.prompts import Prompt

Method = TypeVar("Method", bound=Callable[..., Any])


def on_mesh(method: Method) -> Method:
    """A method of a `Speaker` whose programs run where the model lies."""

    @functools.wraps(method)
    def run(self: Speaker, *args: Any, **kwargs: Any) -> Any:
        with self.scope():
            return method(self, *args, **kwargs)

    return run  # pyright: ignore[reportReturnType]


@jax.jit
def logits(model: Decoder | Edited, tokens: jax.Array, where: Places, inserted: Inserted | None) -> jax.Array:
    """Of every position; see `Decoder.__call__`."""
    return model(tokens, where, inserted)


@jax.jit
def hidden_states(model: Decoder | Edited, tokens: jax.Array, where: Places, inserted: Inserted | None) -> jax.Array:
    """See `Decoder.hidden_states`."""
    return model.hidden_states(tokens, where, inserted)


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
