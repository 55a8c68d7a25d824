"""Gemma 3's chat template, in Python: a template from a file would be code of strangers (gemma3.md section 7)."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gemma_jax.text.tokenizer import Tokenizer

START, END, BOS = "<start_of_turn>", "<end_of_turn>", "<bos>"
ROLES = {"user": "user", "assistant": "model", "model": "model"}


class ChatError(ValueError):
    """Messages that are no conversation Gemma knows."""


def render(messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
    """The conversation as one text with literal control tokens. For reading; encode with `encode_chat`."""
    turns = "".join(f"{START}{role}\n{content}{END}\n" for role, content in _turns(messages))
    return BOS + turns + (f"{START}model\n" if add_generation_prompt else "")


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
) -> list[int]:
    """The ids of a conversation, `<bos>` included.

    Control tokens come from the template alone: what stands between two of them is encoded as plain text in one piece,
    as a tokenizer that splits at control tokens would, so newlines merge as in the reference.

    Raises: ChatError for unknown roles, roles out of order, content that is no text.
    """
    start, end = tokenizer.id_of(START), tokenizer.id_of(END)
    ids = [tokenizer.bos_id]
    for role, content in _turns(messages):
        ids += [start, *tokenizer.encode(f"{role}\n{content}", bos=False), end, *tokenizer.encode("\n", bos=False)]
    return [*ids, start, *tokenizer.encode("model\n", bos=False)] if add_generation_prompt else ids


def _turns(messages: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """(role, content) of every turn; a leading system message is put in front of the first one, untrimmed."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ChatError("messages is empty or not a list; wanted at least one {'role': 'user', 'content': ...}")
    prefix, first = "", 0
    if _role(messages[0], 0) == "system":
        prefix, first = _system(messages[0]) + "\n\n", 1
    if len(messages) == first:
        raise ChatError("there is only a system message; a user message must follow")
    for i, message in enumerate(messages[first:]):
        role = ROLES.get(_role(message, first + i), "system")
        wanted = ("user", "model")[i % 2]
        if role != wanted:
            raise ChatError(
                f"message {first + i} has role {message['role']!r}; turns alternate between user and assistant, begin "
                f"with user, and only the first message may be system, so {'assistant' if i % 2 else 'user'} was wanted"
            )
        yield role, (prefix if i == 0 else "") + _content(message, first + i)


def _role(message: Any, at: int) -> str:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
        raise ChatError(f"message {at} is {message!r}; wanted an object with role and content")
    if message["role"] not in (*ROLES, "system"):
        raise ChatError(f"message {at} has role {message['role']!r}; wanted user, assistant or system")
    return message["role"]


def _system(message: Mapping[str, Any]) -> str:
    content = message["content"]
    if isinstance(content, str):
        return content
    return next(iter(_texts(content, 0)), "")


def _content(message: Mapping[str, Any], at: int) -> str:
    content = message["content"]
    return content.strip() if isinstance(content, str) else "".join(text.strip() for text in _texts(content, at))


def _texts(content: Any, at: int) -> list[str]:
    if not isinstance(content, Sequence):
        raise ChatError(f"message {at} has content {content!r}; wanted a text or a list of parts")
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ChatError(
                f"message {at} has a part of type {kind!r}; this model reads parts {{'type': 'text', 'text': ...}} only"
            )
    return [part["text"] for part in content]
