"""Answers as a stream, and jobs that are a prompt and an answer: translation of texts, transcription of sound."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gemma_jax.generate.completion import Piece, answers, complete, pieces
from gemma_jax.generate.request import Speaker, open_session
from gemma_jax.media import audio as hearing
from gemma_jax.media import places
from gemma_jax.media.audio import AudioOptions
from gemma_jax.nn.edits import Edit
from gemma_jax.prompts import MediaOptions, Prompt, assemble
from gemma_jax.text import speech, translategemma
from gemma_jax.text.chat import chat_parts, encode_chat
from gemma_jax.text.tokenizer import Tokenizer


def stream(
    gemma: Speaker, prompts: Sequence[Prompt], seed: int | None, wishes: Mapping[str, Any], edits: Sequence[Edit]
) -> Iterator[Piece]:
    """The answer to one prompt, piece by piece. What is wrong with the request is raised at once."""
    session = open_session(gemma, prompts, seed, wishes, edits)
    return (piece for (piece,) in pieces(session, answers(session, gemma.tokenizer, gemma.stop_ids)))


def translations(
    gemma: Speaker, tokenizer: Tokenizer, texts: Sequence[str], source: str, target: str, sampling: Mapping[str, Any]
) -> list[str]:
    """See `Gemma.translate`."""
    languages = translategemma.language(source), translategemma.language(target)
    asked = [translategemma.of_text(text, *languages) for text in texts]
    prompts = [Prompt(encode_chat(tokenizer, [{"role": "user", "content": text}])) for text in asked]
    return _texts(gemma, tokenizer, prompts, sampling)


def transcripts(
    gemma: Speaker,
    tokenizer: Tokenizer,
    sounds: Sequence[Any],
    language: str | None,
    translate_to: str | None,
    options: AudioOptions,
    sampling: Mapping[str, Any],
) -> list[str]:
    """See `Gemma.transcribe`. A sound of several clips is asked for clip by clip, and the answers are joined."""
    spoken, target = (None if code is None else translategemma.language(code) for code in (language, translate_to))
    task = speech.of_clip(spoken, target)
    places.ears_of(gemma.config)
    prompts, counts = [], []
    for sound in sounds:
        clips = hearing.clips(sound, options)
        counts.append(len(clips))
        for clip in clips:
            heard = {"type": "audio", "audio": (clip, hearing.SAMPLE_RATE)}
            parts = chat_parts([{"role": "user", "content": [{"type": "text", "text": task}, heard]}])
            prompts.append(assemble(parts, tokenizer, gemma.config, MediaOptions(audio=options)))
    said = iter(_texts(gemma, tokenizer, prompts, sampling))
    return [" ".join(next(said).strip() for _ in range(count)) for count in counts]


def _texts(gemma: Speaker, tokenizer: Tokenizer, prompts: Sequence[Prompt], sampling: Mapping[str, Any]) -> list[str]:
    if not prompts:
        return []
    wishes = {"max_new_tokens": gemma.config.context, **sampling}
    seed = wishes.pop("seed", None)
    done = complete(open_session(gemma, prompts, seed, wishes), tokenizer, gemma.stop_ids)
    return [completion.text or "" for completion in done]
