"""Whether tokens can be given to a model."""

from collections.abc import Sequence

import numpy as np

from gemma_jax.configs.config import DecoderConfig


def check_prompts(config: DecoderConfig, prompts: Sequence[Sequence[int]]) -> None:
    """Raises ValueError for an empty batch, an empty or too long prompt, and ids that are no tokens."""
    if not prompts:
        raise ValueError("the batch is empty; give at least one prompt")
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {row} is empty; give at least one token (a text gets its BOS by itself)")
        if len(prompt) > config.context:
            raise ValueError(
                f"prompt {row} has {len(prompt)} tokens; {config.name} reads at most {config.context}; shorten it"
            )
        check_ids(prompt, config.num_ids, f"prompt {row}")


def check_ids(ids: Sequence[int], num_ids: int, what: str) -> None:
    """Raises ValueError unless all ids are whole numbers from 0 to num_ids - 1."""
    array = np.asarray(ids)
    if array.dtype.kind not in "iu":
        raise ValueError(f"{what} holds {array.dtype} values; wanted token ids, whole numbers")
    wrong = np.flatnonzero((array < 0) | (array >= num_ids))
    if wrong.size:
        at = int(wrong[0])
        raise ValueError(f"{what} has id {array.flat[at]} at place {at}; wanted 0 to {num_ids - 1}")
