"""From what a user asks to a `Session`: sampling parameters, seeds, images, edits, a draft."""

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gemma_jax.configs.config import DecoderConfig, VisionConfig
from gemma_jax.generate.engine import Session, Soft
from gemma_jax.generate.sampling import SamplingParams, sampling_params
from gemma_jax.generate.speculative import Draft, SpeculativeSession
from gemma_jax.media import places
from gemma_jax.media.mel import mel
from gemma_jax.nn.decoder import Decoder
from gemma_jax.nn.edited import edited
from gemma_jax.nn.edits import Edit
from gemma_jax.prompts import Prompt
from gemma_jax.text.tokenizer import Tokenizer

DRAFT_TOKENS = 4
FRAMES = 500  # of 10 ms: clips are filled up to a multiple, with frames that count for nothing


class Speaker(Protocol):
    """A `Gemma`, as far as it is needed here."""

    config: DecoderConfig
    model: Decoder
    tokenizer: Tokenizer | None

    def scope(self) -> AbstractContextManager[None]: ...

    @property
    def stop_ids(self) -> tuple[int, ...]: ...


@jax.jit
def see(model: Decoder, pixels: jax.Array) -> jax.Array:
    """The soft tokens of images; see `Senses.see`."""
    return model.see(pixels)


@jax.jit
def _hear(model: Decoder, features: jax.Array, is_valid: jax.Array, counts: jax.Array) -> jax.Array:
    return model.hear(features, is_valid, counts)


def hear_all(model: Decoder, clips: Sequence[Float[np.ndarray, " samples"]]) -> Float[Array, "N M D"]:
    """The soft tokens of clips at 16 kHz, each as alone; a few programs serve all lengths."""
    heard = []
    for clip in clips:
        features, is_valid = mel([clip])
        missing = -features.shape[1] % FRAMES or FRAMES * (features.shape[1] == 0)
        count = np.asarray([features.shape[1]], np.int32)
        features, is_valid = np.pad(features, ((0, 0), (0, missing), (0, 0))), np.pad(is_valid, ((0, 0), (0, missing)))
        heard.append(_hear(model, features, is_valid, count))
    return jnp.concatenate(heard)


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
    ids, soft = [prompt.ids for prompt in prompts], None
    if any(prompt.pixels is not None or prompt.clips for prompt in prompts):
        index = soft_places(prompts, gemma.config)
        ids = [np.where(part >= 0, 0, row).tolist() for part, row in zip(index, ids, strict=True)]
        soft = sensed(gemma.model, prompts, index)
        if draft is not None:
            draft = dataclasses.replace(draft, soft=_sensed_by(draft.model, prompts, index, gemma.config))
    model = edited(gemma.model, edits, len(ids))
    if draft is None:
        return Session(model, ids, rows, gemma.stop_ids, soft=soft, scope=gemma.scope)
    return SpeculativeSession(model, draft, ids, rows, gemma.stop_ids, soft=soft, scope=gemma.scope)


def soft_places(prompts: Sequence[Prompt], config: DecoderConfig) -> list[np.ndarray]:
    """See `places.soft_indices`."""
    num_images = sum(0 if prompt.pixels is None else len(prompt.pixels) for prompt in prompts)
    num_clips = sum(len(prompt.clips) for prompt in prompts)
    return places.soft_indices([prompt.ids for prompt in prompts], config, num_images, num_clips)


def sensed(model: Decoder, prompts: Sequence[Prompt], index: Sequence[np.ndarray]) -> Soft:
    """What a model makes of the images and sound of prompts."""
    pixels = [prompt.pixels for prompt in prompts if prompt.pixels is not None]
    clips = [clip for prompt in prompts for clip in prompt.clips]
    parts = [see(model, np.concatenate(pixels))] if pixels else []
    parts += [hear_all(model, clips)] if clips else []
    vectors = jnp.concatenate([part.reshape(-1, part.shape[-1]) for part in parts])
    tower = model.config.vision
    return Soft(vectors, index, tower.num_soft_tokens if isinstance(tower, VisionConfig) else None)


def _sensed_by(draft: Decoder, prompts: Sequence[Prompt], index: Sequence[np.ndarray], whole: DecoderConfig) -> Soft:
    """What the draft makes of them; its places have to be the model's."""
    for name in ("vision", "audio"):
        ours, theirs = getattr(whole, name), getattr(draft.config, name)
        if ours is not None and theirs != ours:
            raise ValueError(f"the draft, {draft.config.name}, has another {name} tower than the model")
    return sensed(draft, prompts, index)


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
    """Raises ValueError for a draft of another vocabulary, or on another mesh."""
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
    here, there = (one.model.final_norm.scale.get_raw_value().sharding for one in (gemma, draft))
    is_divided = len(here.device_set) > 1 or len(there.device_set) > 1
    if is_divided and getattr(here, "mesh", None) != getattr(there, "mesh", None):
        raise ValueError(
            f"the draft, {draft.config.name}, lies on other devices than {gemma.config.name}, or on another mesh of "
            "them; load both with one mesh"
        )
    return Draft(draft.model, DRAFT_TOKENS if draft_tokens is None else draft_tokens)
