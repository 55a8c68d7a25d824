"""Activations out of a compiled forward pass, and logits of one that is edited."""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from gemma_jax.generate.checks import check_prompts
from gemma_jax.model import Gemma, Text
from gemma_jax.nn.decoder import Decoder, Inserted
from gemma_jax.nn.edits import Edit, prepared
from gemma_jax.nn.masks import Places
from gemma_jax.nn.sites import Taps, find

SMALLEST_LENGTH = 16  # texts are padded to a power of two from here on: a few programs serve all lengths


@functools.partial(jax.jit, static_argnames="names")
def forward(
    model: Decoder,
    tokens: jax.Array,
    where: Places,
    inserted: Inserted | None,
    edits: tuple[Edit, ...],
    names: tuple[str, ...],
) -> dict[str, jax.Array]:
    """The values at the sites `names`. XLA leaves out what they do not need: the head, layers above them."""
    taps = Taps(model.config, edits, names)
    model(tokens, where, inserted, taps=taps)
    return taps.captured


def capture(
    gemma: Gemma,
    tokens: Int[Array, "B T"],
    sites: Iterable[str],
    *,
    images: Any = None,
    mask: Bool[Array, "B T"] | None = None,
    edits: Sequence[Edit] = (),
) -> dict[str, jax.Array]:
    """The values at sites, by name, after the edits.

    Args:
        tokens, images, mask: as for `Gemma.logits`. What stands at padding has no meaning.
        sites: names or patterns of `nn/sites.py`, as "layers.*.resid_post". All values are held at once; attention
            maps take B*N*T*T*4 bytes a layer.

    Raises ValueError for a site that the model does not have, with those it has.
    """
    names = tuple(find(gemma.config, [sites] if isinstance(sites, str) else sites))
    with gemma.scope():
        batch = gemma.batch(tokens, images, mask=mask)
        found = forward(gemma.model, *batch, prepared(gemma.config, edits, len(batch[0])), names)
    return {name: found[name] for name in names}


def run(gemma: Gemma, tokens: Int[Array, "B T"], *, edits: Sequence[Edit] = (), **inputs: Any) -> Float[Array, "B T V"]:
    """Logits of an edited forward; without edits the baseline that edited ones agree with bit for bit.

    `inputs` are images and mask, as for `capture`.
    """
    return capture(gemma, tokens, ["logits"], edits=edits, **inputs)["logits"]


def encode(
    gemma: Gemma, texts: Sequence[Text], layer: int = -1, *, edits: Sequence[Edit] = ()
) -> tuple[Float[Array, "B T D"], Bool[Array, "B T"]]:
    """Hidden states of texts (or lists of ids), and True where they are real: the model as a frozen encoder.

    Rows are padded on the right to the longest. `layer` counts as in `Gemma.hidden_states`: 0 is the stream before the
    first layer, -1 after the last and the final norm. Raises ValueError as `generate` does, and for no such layer.
    """
    if isinstance(texts, str):
        raise TypeError("texts is one text; wanted a list of them")
    count = gemma.config.num_layers + 1
    if not -count <= layer < count:
        raise ValueError(f"layer is {layer}; {gemma.config.name} has {-count} to {count - 1}")
    rows = [gemma.ids(text) for text in texts]
    check_prompts(gemma.config, rows)
    longest = max(len(row) for row in rows)
    tokens = np.zeros((len(rows), max(SMALLEST_LENGTH, 1 << (longest - 1).bit_length())), np.int32)
    mask = np.arange(tokens.shape[1]) < np.asarray([len(row) for row in rows])[:, None]
    tokens[mask] = np.concatenate(rows)
    site = stream_sites(gemma.config.num_layers)[layer] if layer % count < count - 1 else "final"
    states = capture(gemma, jnp.asarray(tokens), [site], mask=jnp.asarray(mask), edits=edits)[site]
    return states[:, :longest], jnp.asarray(mask[:, :longest])


def stream_sites(num_layers: int) -> list[str]:
    """The stream before the first layer and after each."""
    return ["embed", *(f"layers.{i}.resid_post" for i in range(num_layers))]
