"""Messages of a conversation with tools, checked and taken apart; the forms of prompts are made from these."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemma_jax.text.chat import ChatError
from gemma_jax.tools.calls import ToolCall
from gemma_jax.tools.values import plain

_SYSTEM, _MODEL = ("system", "developer"), ("assistant", "model")


@dataclass(frozen=True)
class Turn:
    """What stands between two changes of the speaker. `at` is the number of its (first) message."""

    role: str  # "user", "model" or "tool"
    at: int
    content: Any = None  # of user and model, as the message has it; None if the model only calls
    calls: Sequence[ToolCall] = ()  # of the model
    results: Sequence[tuple[str, Any]] = ()  # of tools: (name, value of JSON)


def read(messages: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any] | None, list[Turn]]:
    """The system message, if there is one, and the turns behind it.

    A user's message, then the model's; behind calls come the tools' results, behind these the model again. The last
    message is a user's or a tool's, for the model is to go on.

    Raises: ChatError for another order and messages without role or content; ToolCallError for calls that are none.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise ChatError(f"messages is a {type(messages).__name__}; wanted a list of {{'role', 'content'}}")
    system = messages[0] if messages and _role(messages[0], 0) in _SYSTEM else None
    turns: list[Turn] = []
    names: dict[str, str] = {}  # of the last calls, by their ids
    wanted: tuple[str, ...] = ("user",)
    for at, message in enumerate(messages):
        if at == 0 and system is not None:
            continue
        role = "model" if _role(message, at) in _MODEL else message["role"]
        if role not in wanted:
            raise ChatError(
                f"message {at} has role {message['role']!r}; wanted {' or '.join(map(_shown, wanted))} here"
            )
        if role == "tool":
            results = tuple(_results(message, at, names))
            if turns[-1].role == "tool":
                before = turns.pop()
                results, at = (*before.results, *results), before.at
            turns.append(Turn(role, at, results=results))
            wanted = ("tool", "model")
            continue
        made = _calls(message) if role == "model" else []
        names = {call.id: call.name for call in made}
        if message.get("content") is None and not made:
            raise ChatError(f"message {at} has no content; wanted a text or a list of parts")
        turns.append(Turn(role, at, message.get("content"), made))
        wanted = ("model",) if role == "user" else ("tool",) if made else ("user",)
    if not turns or turns[-1].role == "model":
        raise ChatError(
            f"the messages end with {'an assistant' if turns else 'no user'}'s; wanted one of a user, or of a tool"
        )
    return system, turns


def _shown(role: str) -> str:
    return "assistant" if role == "model" else role


def _role(message: Any, at: int) -> str:
    role = message.get("role") if isinstance(message, Mapping) else None
    if role not in (*_SYSTEM, *_MODEL, "user", "tool"):
        raise ChatError(f"message {at} has role {role!r}; wanted user, assistant, tool or system")
    return role


def _calls(message: Mapping[str, Any]) -> list[ToolCall]:
    made = message.get("tool_calls") or ()
    if not isinstance(made, Sequence) or isinstance(made, str):
        raise ChatError(f"tool_calls is {made!r:.100}; wanted a list of {{'function': {{'name', 'arguments'}}}}")
    return [ToolCall.of_message(call, i) for i, call in enumerate(made)]


def _results(message: Mapping[str, Any], at: int, names: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    """OpenAI's form, a content beside the call's id or the tool's name, or FunctionGemma's {name, response}, or several
    of these.
    """
    content = message.get("content")
    several = content if isinstance(content, list) else [content]
    named = [one for one in several if isinstance(one, Mapping) and set(one) == {"name", "response"}]
    if named and len(named) == len(several):
        yield from ((str(one["name"]), _value(one["response"], at)) for one in named)
        return
    name = message.get("name") or names.get(str(message.get("tool_call_id")))
    if not isinstance(name, str):
        raise ChatError(
            f"message {at} is a tool's, but neither has it a name nor is its tool_call_id "
            f"{message.get('tool_call_id')!r} one of the calls before ({', '.join(names)})"
        )
    if "content" not in message:
        raise ChatError(f"message {at} is a tool's without content; wanted what {name} gave")
    if isinstance(content, str):
        with contextlib.suppress(ValueError, RecursionError):
            content = json.loads(content)
    yield name, _value(content, at)


def _value(content: Any, at: int) -> Any:
    try:
        return plain(content)
    except ValueError as error:
        raise ChatError(f"message {at} is a tool's with a content that is no JSON: {error}") from None
