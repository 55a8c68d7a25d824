"""From what a user asks to a `Session`: sampling parameters, seeds, images, edits, a draft."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from gemma_jax.configs.config import DecoderConfig
from gemma_jax.generate.engine import Images, Session
from gemma_jax.generate.sampling import SamplingParams, sampling_params
from gemma_jax.generate.speculative import Draft, SpeculativeSession
from gemma_jax.media import vision
from gemma_jax.nn.decoder import Decoder
from gemma_jax.nn.edited import edited
from gemma_jax.nn.edits import Edit
from gemma_jax.prompts import Prompt
from gemma_jax.text.tokenizer import Tokenizer

DRAFT_TOKENS = 4


class Speaker(Protocol):
    """A `Gemma`, as far as it is needed here."""

    config: DecoderConfig
    model: Decoder
    tokenizer: Tokenizer | None

    @property
    def stop_ids(self) -> tuple[int, ...]: ...


@jax.jit
def see(model: Decoder, pixels: jax.Array) -> jax.Array:
    """The soft tokens of images; see `Stem.see`."""
    return model.see(pixels)


def open_session(
    gemma: Speaker,
    prompts: Sequence[Prompt],
    seed: int | Sequence[int] | None,
    wishes: Mapping[str, Any],
    edits: Sequence[Edit] = (),
) -> Session:
    """The session of some prompts. `wishes` are fields of `SamplingParams`, and `draft` and `draft_tokens`.

    Raises ValueError and TypeError as `Gemma.generate` says.
    """
    sampling = dict(wishes)
    drafting = {name: sampling.pop(name) for name in ("draft", "draft_tokens") if name in sampling}
    rows = _rows(sampling, seed, len(prompts), gemma.tokenizer)
    draft = _draft(gemma, **drafting)
    pixels = [prompt.pixels for prompt in prompts if prompt.pixels is not None]
    ids, images = [prompt.ids for prompt in prompts], None
    if pixels:
        shown = np.concatenate(pixels)
        index = vision.soft_indices(ids, len(shown), gemma.config)
        ids = [np.where(part >= 0, 0, row).tolist() for part, row in zip(index, ids, strict=True)]
        images = Images(see(gemma.model, shown), index)
        if draft is not None:
            draft = dataclasses.replace(draft, images=Images(_seen_by(draft.model, shown, index), index))
    model = edited(gemma.model, edits, len(ids))
    if draft is None:
        return Session(model, ids, rows, gemma.stop_ids, images=images)
    return SpeculativeSession(model, draft, ids, rows, gemma.stop_ids, images=images)


def _seen_by(draft: Decoder, pixels: np.ndarray, index: Sequence[np.ndarray]) -> jax.Array:
    """The draft's own soft tokens, which have to stand where the model's do."""
    size = vision.tower_of(draft.config).image_size
    if pixels.shape[1] != size:
        raise ValueError(f"the draft, {draft.config.name}, sees images of {size} pixels, the model {pixels.shape[1]}")
    vectors = see(draft, pixels)
    if vectors.shape[1] * len(pixels) != max(int(row.max(initial=-1)) for row in index) + 1:
        raise ValueError(
            f"the draft, {draft.config.name}, has {vectors.shape[1]} tokens an image, and the model others"
        )
    return vectors


def _rows(
    sampling: dict[str, Any], seed: int | Sequence[int] | None, count: int, tokenizer: Tokenizer | None
) -> list[SamplingParams]:
    """The parameters of each row: all the same, but for the seeds."""
    stop = sampling.get("stop")
    stops = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    params = sampling_params(**{**sampling, "stop": stops})
    if params.stop and tokenizer is None:
        raise ValueError("stop texts need a tokenizer, and this model was loaded without one")
    seeds = list(seed) if isinstance(seed, Sequence) else [seed] * count
    if len(seeds) != count:
        raise ValueError(f"{len(seeds)} seeds were given for {count} prompts; give one each, or a single one")
    return [dataclasses.replace(params, seed=one) for one in seeds]


def _draft(gemma: Speaker, draft: Speaker | None = None, draft_tokens: int | None = None) -> Draft | None:
    """Raises ValueError for a draft of another vocabulary."""
    if draft is None:
        if draft_tokens is not None:
            raise ValueError(f"draft_tokens is {draft_tokens}, but there is no draft; give one")
        return None
    if not isinstance(getattr(draft, "model", None), Decoder):
        raise ValueError(f"draft is a {type(draft).__name__}; wanted a Gemma, as `load` and `matformer.slice` give")
    ours, theirs = gemma.tokenizer, draft.tokenizer
    if ours is None or theirs is None:
        is_same = gemma.config.vocab_size == draft.config.vocab_size
    else:
        is_same = ours is theirs or ours.vocabulary.pieces == theirs.vocabulary.pieces
    if not is_same:
        raise ValueError(
            f"the draft, {draft.config.name}, has another vocabulary than {gemma.config.name}; a draft has to speak of "
            "the same tokens"
        )
    return Draft(draft.model, DRAFT_TOKENS if draft_tokens is None else draft_tokens)
