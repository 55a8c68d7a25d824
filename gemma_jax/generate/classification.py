"""Images against policies: ShieldGemma 2's two logits, as probabilities (gemma3.md section 10)."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from gemma_jax import prompts
from gemma_jax.generate.engine import Soft, next_logits
from gemma_jax.media import places
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
        prompts.assemble(
            shieldgemma.prompt(pixels[0], text), tokenizer, config, prompts.MediaOptions(image=options)
        ).ids
        for text in policies.values()
    ]
    index = places.soft_indices(ids, config, len(ids))
    ids = [np.where(part >= 0, 0, row).tolist() for part, row in zip(index, ids, strict=True)]
    soft = Soft(jnp.tile(seen[0], (len(ids), 1)), index, seen.shape[1])
    answers = [tokenizer.id_of(shieldgemma.YES), tokenizer.id_of(shieldgemma.NO)]
    logits = next_logits(model, ids, answers, soft).astype(np.float64)
    violated = 1 / (1 + np.exp(logits[:, 1] - logits[:, 0]))
    return dict(zip(policies, violated.tolist(), strict=True))
