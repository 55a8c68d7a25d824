"""Text in, text out: a session's tokens as completions, whole or as a stream of pieces."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gemma_jax.generate.engine import Session, Step
from gemma_jax.generate.sampling import SamplingParams
from gemma_jax.generate.speculative import SpeculativeSession
from gemma_jax.generate.stopping import StopText
from gemma_jax.text.stream import StreamDecoder
from gemma_jax.text.tokenizer import Tokenizer
from gemma_jax.tools.calls import ToolCall, ToolCallError


@dataclass(frozen=True)
class Completion:
    """One answer. `tokens` are all that were drawn, a stop id and the tokens of a stop text included; `text` is
    without them, and None for a model without tokenizer. Log-probabilities are natural logarithms.
    """

    text: str | None
    tokens: list[int]
    finish_reason: str  # "stop": a stop id or text; "length": max_new_tokens or the context; "tool_calls": see below
    prompt_tokens: int
    logprobs: list[float] | None = None  # of each token
    top_logprobs: list[dict[int, float]] | None = None  # the most likely ids for each token, if more than 0 were asked
    num_draft_tokens: int | None = None  # with a draft: how many it proposed, and how many of them the model drew too
    num_accepted_tokens: int | None = None
    messages: list[dict[str, Any]] | None = None  # of `chat`: what it adds to the conversation, this answer at the end
    tool_calls: list[ToolCall] | None = None  # that wait to be run by the caller
    tool_error: ToolCallError | None = None  # what is wrong with a call in this answer, if none was left to tell it


@dataclass(frozen=True)
class Piece:
    """Part of a streamed answer: whole characters, never the beginning of a stop text. The last one has a reason."""

    text: str
    tokens: list[int]
    finish_reason: str | None = None


@dataclass
class Answer:
    """One row's answer while it grows."""

    params: SamplingParams
    stop_ids: Sequence[int]
    prompt_tokens: int
    decoder: StreamDecoder | None
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[dict[int, float]] = field(default_factory=list)
    finish_reason: str | None = None

    def __post_init__(self) -> None:
        self._stop = StopText(self.params.stop)

    def push(self, step: Step, limit: int) -> Piece:
        """Adds a chunk token by token, up to the one that ends the answer, and gives what can be shown."""
        shown, before = "", len(self.tokens)
        for i, token in enumerate(step.tokens):
            if self.finish_reason is not None:
                break
            self.tokens.append(token)
            self.logprobs += step.logprobs[i : i + 1]
            self.top_logprobs += step.top_logprobs[i : i + 1]
            shown += self._token_text(token)
            if self._stop.is_stopped or (not self.params.ignore_eos and token in self.stop_ids):
                self.finish_reason = "stop"
            elif len(self.tokens) >= limit:
                self.finish_reason = "length"
        if self.finish_reason is not None and self.decoder is not None and not self._stop.is_stopped:
            shown += self._stop.push(self.decoder.finish())
            shown += self._stop.finish()
        self.text += shown
        return Piece(shown, self.tokens[before:], self.finish_reason)

    def _token_text(self, token: int) -> str:
        is_end = token in self.stop_ids and not self.params.ignore_eos
        return "" if self.decoder is None or is_end else self._stop.push(self.decoder.push([token]))

    def completion(self) -> Completion:
        """The answer as it stands."""
        wants = self.params.logprobs
        return Completion(
            text=None if self.decoder is None else self.text,
            tokens=self.tokens,
            finish_reason=self.finish_reason or "length",
            prompt_tokens=self.prompt_tokens,
            logprobs=None if wants is None else self.logprobs,
            top_logprobs=[dict(list(top.items())[:wants]) for top in self.top_logprobs] if wants else None,
        )


def answers(session: Session, tokenizer: Tokenizer | None, stop_ids: Sequence[int]) -> list[Answer]:
    """One empty answer for each row of a session; `pieces` fills them."""
    return [
        Answer(params, stop_ids, len(prompt), None if tokenizer is None else StreamDecoder(tokenizer))
        for params, prompt in zip(session.params, session.prompts, strict=True)
    ]


def pieces(session: Session, rows: Sequence[Answer]) -> Iterator[list[Piece]]:
    """Drives a session to its end, growing the answers; yields what each chunk brought, a piece for each row."""
    limits = session.limits.steps.tolist()
    for steps in session:
        yield [answer.push(step, limit) for answer, step, limit in zip(rows, steps, limits, strict=True)]
        for row, answer in enumerate(rows):
            if answer.finish_reason is not None:
                session.finish(row)


def complete(session: Session, tokenizer: Tokenizer | None, stop_ids: Sequence[int]) -> list[Completion]:
    """All answers of a session."""
    rows = answers(session, tokenizer, stop_ids)
    for _ in pieces(session, rows):
        pass
    done = [answer.completion() for answer in rows]
    if not isinstance(session, SpeculativeSession):
        return done
    counts = [
        dict(zip(("num_draft_tokens", "num_accepted_tokens"), session.drafts(i), strict=True)) for i in range(len(done))
    ]
    return [replace(completion, **count) for completion, count in zip(done, counts, strict=True)]
