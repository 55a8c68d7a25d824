"""`Gemma`: a config, its weights and a tokenizer. The object users hold."""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from gemma_checkpoints.names import Assembly
from gemma_jax import export
from gemma_jax.configs.config import DecoderConfig
from gemma_jax.export import Precision
from gemma_jax.generate import scoring
from gemma_jax.generate.completion import Completion, Piece, answers, complete, pieces
from gemma_jax.generate.engine import Images, Session, check_ids
from gemma_jax.generate.sampling import SamplingParams
from gemma_jax.generate.scoring import Score
from gemma_jax.media import vision
from gemma_jax.nn.decoder import Decoder, Inserted
from gemma_jax.nn.edited import Edited, edited
from gemma_jax.nn.edits import Edit
from gemma_jax.nn.masks import Places
from gemma_jax.nn.paths import weights
from gemma_jax.text.chat import encode_chat
from gemma_jax.text.tokenizer import Tokenizer

STOP_IDS = (1, 106)  # Gemma 3's <eos> and <end_of_turn>, for a model without tokenizer
CHAT_SAMPLING = {"temperature": 1.0, "top_k": 64, "top_p": 0.95}  # of the instruction-tuned releases

Prompt = str | Sequence[int]


@jax.jit
def _logits(model: Decoder | Edited, tokens: jax.Array, where: Places, inserted: Inserted | None) -> jax.Array:
    return model(tokens, where, inserted)


@jax.jit
def _hidden_states(model: Decoder | Edited, tokens: jax.Array, where: Places, inserted: Inserted | None) -> jax.Array:
    return model.hidden_states(tokens, where, inserted)


@jax.jit
def _see(model: Decoder, pixels: jax.Array) -> jax.Array:
    return model.see(pixels)


class Gemma:
    """A loaded model. Made by `gemma_jax.load`, or from your own decoder: `Gemma(config, Decoder(config, ...))`.

    A prompt is a text or a list of token ids; a text gets its BOS, ids are taken as they are.
    """

    def __init__(self, config: DecoderConfig, model: Decoder, tokenizer: Tokenizer | None = None):
        self.config, self.model, self.tokenizer = config, model, tokenizer

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        images: Float[Array, "N height width 3"] | None = None,
        seed: int | Sequence[int] | None = None,
        edits: Sequence[Edit] = (),
        **sampling: Any,
    ) -> Any:
        """Continues a prompt, or each of several.

        Args:
            prompt: a text, a list of ids, or a list of these (of any lengths).
            images: as for `logits`; their places are in prompts of ids.
            seed: makes sampling repeatable. A row's draws depend on its seed and prompt alone, not on its batch, so
                equal prompts with one seed give equal answers; give a list of seeds, one a prompt, for different ones.
            edits: changes of the forward pass, the same for all rows, in prompt and answer: steering, patches,
                ablations; see `gemma_jax.interp`.
            **sampling: fields of `SamplingParams`: max_new_tokens, temperature (0: greedy), top_k, top_p, min_p,
                repetition_penalty, stop (a text or several), logprobs, ignore_eos.

        Returns: a `Completion`, or a list of them for a list of prompts.
        Raises: ValueError for bad values, empty or too long prompts, ids outside the vocabulary.
        """
        is_single = _is_single(prompt)
        prompts: Any = [prompt] if is_single else list(prompt)
        session = self._session(prompts, seed, sampling, images, edits)
        done = complete(session, self.tokenizer, self.stop_ids)
        return done[0] if is_single else done

    def stream(
        self,
        prompt: Prompt,
        *,
        images: Float[Array, "N height width 3"] | None = None,
        seed: int | None = None,
        edits: Sequence[Edit] = (),
        **sampling: Any,
    ) -> Iterator[Piece]:
        """Continues one prompt; yields pieces of whole characters as they come, the last with a finish_reason."""
        if not _is_single(prompt):
            raise ValueError("stream continues one prompt; use generate for a batch")
        session = self._session([prompt], seed, sampling, images, edits)
        return (piece for (piece,) in pieces(session, answers(session, self.tokenizer, self.stop_ids)))

    def chat(self, messages: Sequence[Mapping[str, Any]], **sampling: Any) -> Completion:
        """Answers a conversation of OpenAI-style messages ({"role": ..., "content": ...}).

        Samples as the instruction-tuned models were released (temperature 1, top_k 64, top_p 0.95) unless told
        otherwise, up to the end of the turn or of the context. Control tokens come from the template alone: text of
        users never becomes one. Raises ChatError (a ValueError) for roles out of order.
        """
        return self.generate(*self._chat_prompt(messages, sampling), **self._chat_sampling(sampling))

    def stream_chat(self, messages: Sequence[Mapping[str, Any]], **sampling: Any) -> Iterator[Piece]:
        """`chat` as a stream of pieces."""
        return self.stream(*self._chat_prompt(messages, sampling), **self._chat_sampling(sampling))

    def logits(
        self,
        tokens: Int[Array, "B T"],
        images: Float[Array, "N height width 3"] | None = None,
        *,
        mask: Bool[Array, "B T"] | None = None,
        edits: Sequence[Edit] = (),
    ) -> Float[Array, "B T V"]:
        """Unnormalised log-probabilities of the next token after every token, float32.

        Args:
            tokens: ids; each image is `config.vision.num_soft_tokens` times `config.vision.soft_token` in a row.
            images: in the order in which they stand in the rows, row after row; between -1 and 1, in the tower's size.
            mask: False at padding, left or right; what stands at padding has no meaning.
            edits: changes of the forward pass; see `gemma_jax.interp`.

        B*T*V*4 bytes are needed. T may pass the context here and in `hidden_states`, for research into what a model
        does there. Raises ValueError for ids outside the vocabulary, and images that are not those of the tokens.
        """
        batch = self.batch(tokens, images, mask)
        return _logits(edited(self.model, edits, len(batch[0])), *batch)

    def hidden_states(
        self,
        tokens: Int[Array, "B T"],
        images: Float[Array, "N height width 3"] | None = None,
        *,
        mask: Bool[Array, "B T"] | None = None,
        edits: Sequence[Edit] = (),
    ) -> Float[Array, "L+1 B T D"]:
        """The stream before the first layer and after each; the last after the final norm (Hugging Face's order)."""
        batch = self.batch(tokens, images, mask)
        return _hidden_states(edited(self.model, edits, len(batch[0])), *batch)

    def see(self, images: Float[Array, "N height width 3"]) -> Float[Array, "N M D"]:
        """The soft tokens of images, as the decoder gets them. Raises ValueError for another size or no tower."""
        return _see(self.model, jnp.asarray(vision.check_pixels(images, self.config)))

    def score(self, prompt: Prompt) -> Score:
        """Log-probability of each token of a text (or list of ids) given those before, mean nll and perplexity."""
        return scoring.score(self.model, self.ids(prompt))

    def save(
        self,
        destination: str | os.PathLike,
        *,
        format: str = "orbax",
        dtype: str | None = None,
        quantize: str | None = None,
    ) -> None:
        """Writes weights, config and tokenizer as a new checkpoint, which is absent or whole, whatever happens.

        Args:
            destination: a new folder; for "gguf" a new file.
            format: "orbax" (ours: it holds every config, and arrays that are sharded over several processes, each of
                which then has to call this), "huggingface", "deepmind" (the library gemma loads it) or "gguf".
            dtype: "float32" or "bfloat16". None: the model's own.
            quantize: "q8_0" or "q4_0" for "gguf"; see `export.Precision`.

        Raises: FileExistsError if the destination is there; ConfigError for a model that the format cannot describe;
            ValueError for other names.
        """
        precision = Precision(dtype or self.model.final_norm.scale.dtype.name, quantize)
        config = self.config.runnable
        assembly = Assembly(export.table(format, config))
        with export.writer(destination, config, assembly.table, precision, self.tokenizer) as writer:
            for path, place in weights(self.model).items():
                value = place.param.get_raw_value()
                if format != "orbax" and not value.is_fully_addressable:
                    raise ValueError(
                        f"the weights lie on several processes; only 'orbax' is written so, not {format!r}"
                    )
                whole = np.asarray(value) if value.is_fully_addressable else value
                for name, values in assembly.add(path, place.view(whole)):
                    writer.put(name, values)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer unless ignore_eos: `<eos>`, and `<end_of_turn>` of instruction-tuned models."""
        if self.tokenizer is not None:
            return self.tokenizer.eos_id, self.tokenizer.end_of_turn_id
        return tuple(i for i in STOP_IDS if i < self.config.vocab_size)

    def batch(self, tokens: Any, images: Any = None, mask: Any = None) -> tuple[jax.Array, Places, Inserted | None]:
        """What a decoder takes for checked tokens, images and mask; see `logits`."""
        array = np.asarray(tokens)
        if array.ndim != 2 or not array.size:
            raise ValueError(f"tokens has shape {array.shape}; wanted [B, T] with at least one token")
        index = np.asarray(vision.soft_indices(array, 0 if images is None else len(images), self.config))
        ids = np.where(index >= 0, 0, array)
        check_ids(ids, self.config.vocab_size, "tokens")  # pyright: ignore
        if mask is None:
            where = Places.plain(*array.shape)
        elif np.shape(mask) != array.shape:
            raise ValueError(f"mask has shape {np.shape(mask)}, but tokens has {array.shape}; wanted the same")
        else:
            where = Places.of(jnp.asarray(mask, bool))
        if images is None:
            return jnp.asarray(ids, jnp.int32), where, None
        vectors = self.see(images)
        blocks = jnp.asarray(np.where(index >= 0, index // vectors.shape[1] + 1, 0))
        where = dataclasses.replace(where, blocks=blocks)
        inserted = Inserted(vectors.reshape(-1, vectors.shape[-1]), jnp.asarray(index))
        return jnp.asarray(ids, jnp.int32), where, inserted

    def ids(self, prompt: Prompt) -> list[int]:
        """The token ids of a prompt. Raises ValueError for an empty text, and for a text without a tokenizer."""
        if not isinstance(prompt, str):
            return list(prompt)
        if self.tokenizer is None:
            raise ValueError(f"{self.config.name} was loaded without a tokenizer; give a list of token ids")
        if not prompt:
            raise ValueError("the prompt is empty; give some text, or token ids such as [2] for BOS alone")
        return self.tokenizer.encode(prompt, bos=True)

    def _session(
        self, prompts: Sequence[Prompt], seed: Any, sampling: Mapping[str, Any], images: Any, edits: Sequence[Edit]
    ) -> Session:
        stop = sampling.get("stop")
        stops = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
        params = sampling_params(**{**sampling, "stop": stops})
        if params.stop and self.tokenizer is None:
            raise ValueError("stop texts need a tokenizer, and this model was loaded without one")
        seeds = list(seed) if isinstance(seed, Sequence) else [seed] * len(prompts)
        if len(seeds) != len(prompts):
            raise ValueError(
                f"{len(seeds)} seeds were given for {len(prompts)} prompts; give one each, or a single one"
            )
        rows = [dataclasses.replace(params, seed=one) for one in seeds]
        ids, inserted = [self.ids(prompt) for prompt in prompts], None
        if images is not None:
            index = vision.soft_indices(ids, len(images), self.config)
            ids = [np.where(part >= 0, 0, row).tolist() for part, row in zip(index, ids, strict=True)]
            inserted = Images(self.see(images), index)
        return Session(edited(self.model, edits, len(ids)), ids, rows, self.stop_ids, images=inserted)

    def _chat_prompt(self, messages: Sequence[Mapping[str, Any]], sampling: dict[str, Any]) -> tuple[list[int]]:
        if self.tokenizer is None:
            raise ValueError(f"{self.config.name} was loaded without a tokenizer, which chat needs")
        return (encode_chat(self.tokenizer, messages),)

    def _chat_sampling(self, sampling: Mapping[str, Any]) -> dict[str, Any]:
        return {"max_new_tokens": self.config.context, **CHAT_SAMPLING, **sampling}


def sampling_params(**sampling: Any) -> SamplingParams:
    """SamplingParams from keywords; an unknown one is a TypeError that lists those there are."""
    names = [field.name for field in dataclasses.fields(SamplingParams)]
    unknown = sorted(set(sampling) - set(names))
    if unknown:
        raise TypeError(f"unknown sampling parameter {', '.join(unknown)}; there are {', '.join(names)}")
    return SamplingParams(**sampling)


def _is_single(prompt: Any) -> bool:
    if isinstance(prompt, str):
        return True
    if not isinstance(prompt, Sequence | np.ndarray) or isinstance(prompt, bytes | bytearray):
        raise TypeError(f"prompt is a {type(prompt).__name__}; wanted a text, a list of token ids, or a list of these")
    return len(prompt) > 0 and isinstance(prompt[0], int | np.integer)
