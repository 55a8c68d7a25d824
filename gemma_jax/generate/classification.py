"""Images against policies: ShieldGemma 2's two logits, as probabilities (gemma3.md section 10)."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from gemma_jax import prompts
from gemma_jax.generate.engine import Images, next_logits
from gemma_jax.media import vision
from gemma_jax.media.images import ImageOptions
from gemma_jax.nn.decoder import Decoder
from gemma_jax.text import shieldgemma
from gemma_jax.text.tokenizer import Tokenizer


def violations(
    model: Decoder,
    tokenizer: Tokenizer,
    pixels: Float[np.ndarray, "1 height width 3"],
    seen: Float[jax.Array, "1 M D"],
    policies: Mapping[str, str],
    options: ImageOptions,
) -> dict[str, float]:
    """The probability of "Yes" against "No" for each policy; `seen` are the image's soft tokens."""
    config = model.config
    ids = [
        prompts.assemble(shieldgemma.prompt(pixels[0], text), tokenizer, config, options).ids
        for text in policies.values()
    ]
    index = vision.soft_indices(ids, len(ids), config)
    ids = [np.where(part >= 0, 0, row).tolist() for part, row in zip(index, ids, strict=True)]
    images = Images(jnp.broadcast_to(seen, (len(ids), *seen.shape[1:])), index)
    answers = [tokenizer.id_of(shieldgemma.YES), tokenizer.id_of(shieldgemma.NO)]
    logits = next_logits(model, ids, answers, images).astype(np.float64)
    violated = 1 / (1 + np.exp(logits[:, 1] - logits[:, 0]))
    return dict(zip(policies, violated.tolist(), strict=True))
