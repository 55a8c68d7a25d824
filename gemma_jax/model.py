"""`Gemma`: a config, its weights and a tokenizer. The object users hold."""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from gemma_jax import export
from gemma_jax import prompts as prompting
from gemma_jax.configs.config import DecoderConfig
from gemma_jax.export import Precision
from gemma_jax.generate import embedding, forward, scoring
from gemma_jax.generate.classification import violations
from gemma_jax.generate.completion import Completion, Piece, complete
from gemma_jax.generate.dialogue import converse
from gemma_jax.generate.forward import on_mesh
from gemma_jax.generate.request import hear_all, open_session, see
from gemma_jax.generate.scoring import Score
from gemma_jax.generate.tasks import stream, transcripts, translations
from gemma_jax.media import audio as hearing
from gemma_jax.media import images as media
from gemma_jax.media import places
from gemma_jax.media.audio import AudioOptions
from gemma_jax.media.images import ImageOptions
from gemma_jax.media.video import VideoOptions
from gemma_jax.nn.decoder import Decoder, Inserted
from gemma_jax.nn.edited import edited
from gemma_jax.nn.edits import Edit
from gemma_jax.nn.masks import Places
from gemma_jax.parallel.partition import Partition
from gemma_jax.prompts import MediaOptions
from gemma_jax.text import shieldgemma
from gemma_jax.text.parts import Item
from gemma_jax.text.tokenizer import Tokenizer
from gemma_jax.tools.forms import form_of
from gemma_jax.tools.schema import tool_set

STOP_IDS = (1, 106)  # Gemma 3's <eos> and <end_of_turn>, for a model without tokenizer
CHAT_SAMPLING = {"temperature": 1.0, "top_k": 64, "top_p": 0.95}  # of the instruction-tuned releases

Text = str | Sequence[int]


class Gemma:
    """A loaded model. Made by `gemma_jax.load`, or from your own decoder: `Gemma(config, Decoder(config, ...))`.

    A prompt is a text or a list of token ids; a text gets its BOS, ids are taken as they are. With a `partition` the
    model lies on a mesh of devices, `load(mesh=...)` makes it so, and all that is asked of it is computed there.
    """

    def __init__(
        self,
        config: DecoderConfig,
        model: Decoder,
        tokenizer: Tokenizer | None = None,
        partition: Partition | None = None,
    ):
        self.config, self.model, self.tokenizer, self.partition = config, model, tokenizer, partition

    def scope(self) -> contextlib.AbstractContextManager[None]:
        """For programs of your own on `model`: traced and called in here they run on its mesh, if it has one."""
        return contextlib.nullcontext() if self.partition is None else self.partition.scope()

    @on_mesh
    def generate(
        self,
        prompt: Text | Sequence[Text],
        *,
        images: Any = None,
        audio: Any = None,
        image_options: ImageOptions = ImageOptions(),
        audio_options: AudioOptions = AudioOptions(),
        seed: int | Sequence[int] | None = None,
        edits: Sequence[Edit] = (),
        **sampling: Any,
    ) -> Any:
        """Continues a prompt, or each of several.

        Args:
            prompt: a text, a list of ids, or a list of these (of any lengths).
            images: in the order of their places: PIL images, uint8 arrays, paths, bytes, data URLs, or one array of
                prepared pixels, as `logits` takes them. In a text `<start_of_image>` marks a place, in ids it is
                `config.vision.num_soft_tokens` times `config.vision.soft_token`.
            audio: sounds in the order of their places, for Gemma 3n: paths, bytes, data URLs, pairs (array, rate). In a
                text `<start_of_audio>` marks a place.
            image_options, audio_options: how they are prepared; pan and scan is chosen here.
            seed: makes sampling repeatable. A row's draws depend on its seed and prompt alone, not on its batch, so
                equal prompts with one seed give equal answers; give a list of seeds, one a prompt, for different ones.
            edits: changes of the forward pass, the same for all rows, in prompt and answer: steering, patches,
                ablations; see `gemma_jax.interp`.
            **sampling: fields of `SamplingParams`: max_new_tokens, temperature (0: greedy), top_k, top_p, min_p,
                repetition_penalty, stop (a text or several), logprobs, ignore_eos. And of speculative decoding: draft,
                a smaller `Gemma` of the same vocabulary, perhaps a slice of this one, and draft_tokens (4), how many it
                drafts at once. The answer is the same, sooner if the draft is good; see `generate.speculative`.

        Returns: a `Completion`, or a list of them for a list of prompts.
        Raises: ValueError for bad values, empty or too long prompts, ids outside the vocabulary.
        """
        is_single = prompting.is_single(prompt)
        prompts: Any = [prompt] if is_single else list(prompt)
        options = MediaOptions(image=image_options, audio=audio_options)
        read = prompting.assemble_all(prompts, images, self.tokenizer, self.config, options, audio)
        done = complete(open_session(self, read, seed, sampling, edits), self.tokenizer, self.stop_ids)
        return done[0] if is_single else done

    @on_mesh
    def stream(
        self,
        prompt: Text,
        *,
        images: Any = None,
        audio: Any = None,
        image_options: ImageOptions = ImageOptions(),
        audio_options: AudioOptions = AudioOptions(),
        seed: int | None = None,
        edits: Sequence[Edit] = (),
        **sampling: Any,
    ) -> Iterator[Piece]:
        """Continues one prompt; yields pieces of whole characters as they come, the last with a finish_reason."""
        if not prompting.is_single(prompt):
            raise ValueError("stream continues one prompt; use generate for a batch")
        options = MediaOptions(image=image_options, audio=audio_options)
        read = prompting.assemble_all([prompt], images, self.tokenizer, self.config, options, audio)
        return stream(self, read, seed, sampling, edits)

    @on_mesh
    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None = (),
        max_rounds: int = 8,
        tool_form: str | None = None,
        image_options: ImageOptions = ImageOptions(),
        audio_options: AudioOptions = AudioOptions(),
        video_options: VideoOptions = VideoOptions(),
        seed: int | None = None,
        edits: Sequence[Edit] = (),
        **sampling: Any,
    ) -> Completion:
        """Answers a conversation of OpenAI-style messages ({"role": ..., "content": ...}).

        Content is a text or a list of parts: {"type": "text", "text": ...}, {"type": "image", "image": ...} with what
        `generate` takes, "audio" likewise, "video" (a path, bytes, a list of images), OpenAI's image_url with a data
        URL, and input_audio. Samples as the instruction-tuned models were released (temperature 1, top_k 64, top_p
        0.95) unless told otherwise, up to the end of the turn or of the context. Text of users never becomes a control
        token.

        Args:
            tools: functions that the model may call: typed Python functions with a docstring, which are run here, or
                OpenAI's JSON, whose calls come back in `tool_calls`. Wrong calls, and what a function raises, are told
                to the model.
            max_rounds: how often calls are run and the model is asked again.
            tool_form: "python" or "json", how Gemma 3 writes calls, or "functiongemma". None: as the vocabulary says.

        Raises: ChatError for roles out of order and parts of another kind, ToolSchemaError for tools that cannot be
            offered, ImageError: all are ValueErrors.
        """
        tokenizer = self._need_tokenizer("chat")
        if isinstance(max_rounds, bool) or not isinstance(max_rounds, int) or max_rounds < 0:
            raise ValueError(f"max_rounds is {max_rounds!r}; wanted a whole number, 0 or more")
        options = MediaOptions(image=image_options, audio=audio_options, video=video_options)
        chosen = {"max_new_tokens": self.config.context, **CHAT_SAMPLING, **sampling}

        def answer(parts: Sequence[Item]) -> Completion:
            prompt = prompting.assemble(parts, tokenizer, self.config, options)
            return complete(open_session(self, [prompt], seed, chosen, edits), tokenizer, self.stop_ids)[0]

        def fits(parts: Sequence[Item]) -> bool:
            return len(prompting.assemble(parts, tokenizer, self.config, options).ids) <= self.config.context

        return converse(answer, messages, tool_set(tools), form_of(tokenizer, tool_form), tokenizer, max_rounds, fits)

    @on_mesh
    def stream_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        image_options: ImageOptions = ImageOptions(),
        audio_options: AudioOptions = AudioOptions(),
        video_options: VideoOptions = VideoOptions(),
        seed: int | None = None,
        edits: Sequence[Edit] = (),
        **sampling: Any,
    ) -> Iterator[Piece]:
        """`chat` as a stream of pieces, without tools."""
        tokenizer = self._need_tokenizer("chat")
        parts = form_of(tokenizer).prompt(messages, ())
        options = MediaOptions(image=image_options, audio=audio_options, video=video_options)
        prompt = prompting.assemble(parts, tokenizer, self.config, options)
        sampling = {"max_new_tokens": self.config.context, **CHAT_SAMPLING, **sampling}
        return stream(self, [prompt], seed, sampling, edits)

    @on_mesh
    def translate(self, texts: str | Sequence[str], *, source: str, target: str, **sampling: Any) -> Any:
        """Translations of texts, of one or of several in a batch. For TranslateGemma; text in images goes by `chat`.

        Args:
            source, target: codes such as "en", "de-AT" or "zh-Hant".
            **sampling: as for `generate`; the most likely tokens unless told otherwise.

        Returns a text, or a list of them. Raises ValueError for unknown languages.
        """
        several = [texts] if isinstance(texts, str) else texts
        found = translations(self, self._need_tokenizer("translate"), several, source, target, sampling)
        return found[0] if isinstance(texts, str) else found

    @on_mesh
    def transcribe(
        self,
        audio: Any,
        *,
        language: str | None = None,
        translate_to: str | None = None,
        audio_options: AudioOptions = AudioOptions(long="chunk"),
        **sampling: Any,
    ) -> list[str]:
        """What is said in each of some sounds. For instruction-tuned Gemma 3n.

        Args:
            audio: what `generate` takes. Of more than 30 seconds every 30 seconds are heard by themselves.
            language: that is spoken, a code such as "en"; None: the model finds out.
            translate_to: a code; the answer is then the text and its translation.
            **sampling: as for `generate`; the most likely tokens unless told otherwise.

        Raises: ValueError for unknown languages and models without audio tower or tokenizer; AudioError.
        """
        tokenizer, sounds = self._need_tokenizer("transcribe"), hearing.sources(audio)
        return transcripts(self, tokenizer, sounds, language, translate_to, audio_options, sampling)

    @on_mesh
    def logits(
        self,
        tokens: Int[Array, "B T"],
        images: Any = None,
        audio: Any = None,
        *,
        mask: Bool[Array, "B T"] | None = None,
        edits: Sequence[Edit] = (),
    ) -> Float[Array, "B T V"]:
        """Unnormalised log-probabilities of the next token after every token, float32.

        Args:
            tokens: ids; each image is `config.vision.num_soft_tokens` times `config.vision.soft_token` in a row.
            images: in the order in which they stand in the rows, row after row: what `generate` takes, or pixels float
                [N, height, width, 3] in the tower's size, between -1 and 1 (Gemma 3n: 0 and 1).
            audio: in the order of their places, after all images: what `generate` takes; of each the first 30 seconds.
            mask: False at padding, left or right; what stands at padding has no meaning.
            edits: changes of the forward pass; see `gemma_jax.interp`.

        B*T*V*4 bytes are needed. T may pass the context here and in `hidden_states`, for research into what a model
        does there. Raises ValueError for ids outside the vocabulary, and images that are not those of the tokens.
        """
        batch = self.batch(tokens, images, audio, mask)
        return forward.logits(edited(self.model, edits, len(batch[0])), *batch)

    @on_mesh
    def hidden_states(
        self,
        tokens: Int[Array, "B T"],
        images: Any = None,
        audio: Any = None,
        *,
        mask: Bool[Array, "B T"] | None = None,
        edits: Sequence[Edit] = (),
    ) -> Float[Array, "L+1 B T D"]:
        """The stream before the first layer and after each; the last after the final norm (Hugging Face's order)."""
        batch = self.batch(tokens, images, audio, mask)
        return forward.hidden_states(edited(self.model, edits, len(batch[0])), *batch)

    @on_mesh
    def see(self, images: Any, options: ImageOptions = ImageOptions()) -> Float[Array, "N M D"]:
        """The soft tokens of images, as the decoder gets them; see `generate`. Raises ValueError without a tower."""
        size, black = places.tower_of(self.config).image_size, places.black(self.config)
        return see(self.model, jnp.asarray(media.stack(media.sources(images), size, options, black)))

    @on_mesh
    def hear(self, audio: Any, options: AudioOptions = AudioOptions()) -> Float[Array, "N M D"]:
        """The soft tokens of sounds, or of all their clips, as the decoder gets them. Raises as `see`."""
        places.ears_of(self.config)
        return hear_all(self.model, [c for source in hearing.sources(audio) for c in hearing.clips(source, options)])

    @on_mesh
    def score(self, prompt: Text) -> Score:
        """Log-probability of each token of a text (or list of ids) given those before, mean nll and perplexity."""
        return scoring.score(self.model, self.ids(prompt))

    @on_mesh
    def embed(
        self,
        texts: str | Sequence[str],
        *,
        task: str | None = None,
        title: str | None = None,
        dim: int | None = None,
        truncate: bool = False,
    ) -> Float[np.ndarray, "N dim"]:
        """Unit vectors of texts, float32, whose products are cosine similarities. For EmbeddingGemma.

        Args:
            texts: one (then the result has no N) or several, of any lengths.
            task: what they are to be used for, which puts a prompt in front: "query" and "document" for search, and
                "question answering", "fact checking", "classification", "clustering", "similarity", "code retrieval",
                "summarization" (`generate.embedding.TASKS`). None: the texts alone.
            title: of documents.
            dim: keeps the first components: the model was trained for 768 (all), 512, 256 and 128.
            truncate: cut texts longer than the context; else they are a ValueError.

        Raises: ValueError for a model that does not embed, an unknown task, another dim.
        """
        dimension = embedding.check_dimension(dim, self.config)
        prefix = embedding.prompt_of(task, title)
        tokenizer = self._need_tokenizer("embed")
        several = [texts] if isinstance(texts, str) else list(texts)
        rows = embedding.rows(several, prefix, tokenizer, self.config.context, truncate)
        found = embedding.embed(self.model, rows, dimension)
        return found[0] if isinstance(texts, str) else found

    @on_mesh
    def classify_image(
        self,
        image: Any,
        policies: Sequence[str] | Mapping[str, str] | None = None,
        *,
        image_options: ImageOptions = ImageOptions(hf_compat=True),
    ) -> dict[str, float]:
        """The probability that an image violates each policy, by its name. For ShieldGemma 2.

        Args:
            image: what `generate` takes as an image.
            policies: names of some of the model's own ("dangerous", "sexual", "violence"), or your own texts as
                {name: text}. None: all its own.
            image_options: as the release's processor prepares images, unless told otherwise; without pan and scan.

        Raises: ValueError for unknown policies and models without tower or tokenizer; ImageError.
        """
        tokenizer = self._need_tokenizer("classify_image")
        if image_options.pan_and_scan:
            raise ValueError("ShieldGemma sees the whole image only; leave pan_and_scan out")
        texts = shieldgemma.chosen(policies)
        pixels = media.prepare(image, places.tower_of(self.config).image_size, image_options)
        return violations(self.model, tokenizer, pixels, self.see(pixels), texts, image_options)

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
        export.save(destination, format, self.config, self.model, self.tokenizer, precision)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer unless ignore_eos; see `Tokenizer.stop_ids`."""
        if self.tokenizer is not None:
            return self.tokenizer.stop_ids
        return tuple(i for i in STOP_IDS if i < self.config.vocab_size)

    def batch(
        self, tokens: Any, images: Any = None, audio: Any = None, mask: Any = None
    ) -> tuple[jax.Array, Places, Inserted | None]:
        """What a decoder takes for checked tokens, images, sound and mask; see `logits`."""
        return forward.batch(self, tokens, images, audio, mask)

    def ids(self, prompt: Text) -> list[int]:
        """The token ids of a prompt. Raises ValueError for an empty text, and for a text without a tokenizer."""
        return prompting.assemble_all([prompt], None, self.tokenizer, self.config, MediaOptions())[0].ids

    def _need_tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(f"{self.config.name} was loaded without a tokenizer, which {what} needs")
        return self.tokenizer
