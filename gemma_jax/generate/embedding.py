"""One vector of a text: EmbeddingGemma (arXiv:2509.20354), prompts, batches and matryoshka sizes."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from gemma_jax.configs.config import DecoderConfig
from gemma_jax.nn import logical
from gemma_jax.nn.decoder import Decoder
from gemma_jax.nn.masks import Places
from gemma_jax.text.tokenizer import Tokenizer

ROWS = 8  # texts computed at once
SHORTEST = 16  # tokens a row is padded to at least; longer ones to powers of two, so that few programs are compiled
QUERY_TASKS = {  # the task that stands in front of a query
    "query": "search result",
    "question answering": "question answering",
    "fact checking": "fact checking",
    "classification": "classification",
    "clustering": "clustering",
    "similarity": "sentence similarity",
    "code retrieval": "code retrieval",
    "summarization": "summarization",
}
TASKS = (*QUERY_TASKS, "document")


def prompt_of(task: str | None, title: str | None = None) -> str:
    """What stands in front of a text, as the model was trained (gemma3.md section 9).

    Raises ValueError for an unknown task, and a title for anything but a document.
    """
    if title is not None and task != "document":
        raise ValueError(f"title is {title!r}, but task is {task!r}; only documents have titles")
    if task is None:
        return ""
    if task == "document":
        return f"title: {title or 'none'} | text: "
    if task not in QUERY_TASKS:
        raise ValueError(f"task is {task!r}; wanted one of {', '.join(TASKS)}, or None for the text alone")
    return f"task: {QUERY_TASKS[task]} | query: "


def check_dimension(dimension: int | None, config: DecoderConfig) -> int:
    """The number of components that are kept. Raises ValueError for a model that does not embed, and other sizes."""
    if not config.dense_widths:
        raise ValueError(
            f"{config.name} has no layers that make an embedding of its hidden states, as EmbeddingGemma has; a "
            "checkpoint of sentence-transformers holds them in 2_Dense and 3_Dense. Use hidden_states for others"
        )
    whole = config.dense_widths[-1]
    if dimension is None:
        return whole
    if type(dimension) is not int or not 1 <= dimension <= whole:
        raise ValueError(
            f"dim is {dimension!r}; wanted 1 to {whole} (EmbeddingGemma was trained for 128, 256, 512 and 768)"
        )
    return dimension


@jax.jit
def _embed(model: Decoder, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "B E"]:
    states, _ = model.hidden(tokens, Places.of(mask))
    return logical.replicated(model.pool(states, mask))


def embed(model: Decoder, rows: Sequence[Sequence[int]], dimension: int) -> Float[np.ndarray, "N dimension"]:
    """Unit vectors of texts given as ids, float32. Texts of like lengths are computed together, their order kept."""
    found = np.zeros((len(rows), dimension), np.float32)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in range(0, len(rows), ROWS):
        chosen = order[start : start + ROWS]
        longest = max(len(rows[i]) for i in chosen)
        length = max(SHORTEST, 1 << (longest - 1).bit_length())
        tokens = np.zeros((ROWS if len(rows) > 1 else 1, length), np.int32)
        mask = np.zeros(tokens.shape, bool)
        for row, i in enumerate(chosen):
            tokens[row, : len(rows[i])], mask[row, : len(rows[i])] = rows[i], True
        found[chosen] = np.asarray(_embed(model, jnp.asarray(tokens), jnp.asarray(mask)))[: len(chosen), :dimension]
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def rows(
    texts: Sequence[str], prefix: str, tokenizer: Tokenizer, context: int, truncate: bool = False
) -> list[list[int]]:
    """The ids of texts, `<bos>` and `<eos>` included; with `truncate` those that are too long lose their end.

    Raises ValueError for texts longer than the context otherwise, TypeError for what is no text.
    """
    found = []
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts holds a {type(text).__name__}; wanted texts")
        ids = tokenizer.encode(prefix + text)
        if len(ids) >= context and not truncate:
            raise ValueError(
                f"text {i} has {len(ids) + 1} tokens; the model reads at most {context}: split it, or give "
                "truncate=True to lose its end"
            )
        found.append([*ids[: context - 1], tokenizer.eos_id])
    return found
