"""A conversation in which the model calls tools: it is asked, its calls are run, it is asked again."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gemma_jax.generate.completion import Completion
from gemma_jax.text.parts import Part, Picture
from gemma_jax.text.tokenizer import Tokenizer
from gemma_jax.tools import calls as running
from gemma_jax.tools.calls import ToolCall, ToolCallError
from gemma_jax.tools.forms import Form
from gemma_jax.tools.schema import Tool

Messages = Sequence[Mapping[str, Any]]


def converse(
    answer: Callable[[Sequence[Part | Picture]], Completion],
    messages: Messages,
    tools: Mapping[str, Tool],
    form: Form,
    tokenizer: Tokenizer,
    max_rounds: int,
) -> Completion:
    """The last answer to `messages`, after at most `max_rounds` rounds of calls.

    What goes wrong with a call is told to the model, which costs a round. Calls come back unrun, with finish_reason
    "tool_calls", when no round is left and when one of them is right and has no function here.
    """
    added: list[dict[str, Any]] = []
    for left in range(max_rounds, -1, -1):
        completion = answer(form.prompt([*messages, *added] if added else messages, list(tools.values())))
        try:
            found = form.calls(completion.text or "", completion.tokens, tokenizer) if tools else []
        except ToolCallError as error:
            added.append({"role": "assistant", "content": completion.text})
            if not left:
                return dataclasses.replace(completion, messages=added, tool_error=error)
            told = json.dumps(error.as_result(), ensure_ascii=False)
            added.append({"role": "user", "content": f"{told}\nWrite the call again, or answer without one."})
            continue
        if not found:
            return dataclasses.replace(completion, messages=[*added, {"role": "assistant", "content": completion.text}])
        found = _numbered(found, messages, added)
        added.append({"role": "assistant", "content": None, "tool_calls": [call.as_message() for call in found]})
        errors = [_error(call, tools) for call in found]
        waits = any(error is None and tools[c.name].function is None for error, c in zip(errors, found, strict=True))
        if waits or not left:
            wrong = next((error for error in errors if error is not None), None)
            return dataclasses.replace(
                completion, finish_reason="tool_calls", messages=added, tool_calls=found, tool_error=wrong
            )
        added += [
            {"role": "tool", "tool_call_id": call.id, "name": call.name, "content": json.dumps(result)}
            for call, result in zip(found, running.results(found, tools), strict=True)
        ]
    raise AssertionError  # the last round returns


def _error(call: ToolCall, tools: Mapping[str, Tool]) -> ToolCallError | None:
    try:
        running.check(call, tools)
    except ToolCallError as error:
        return error
    return None


def _numbered(found: Sequence[ToolCall], *sofar: Messages) -> list[ToolCall]:
    """Calls with ids that are not yet in the conversation."""
    first = sum(len(message.get("tool_calls") or ()) for messages in sofar for message in messages)
    return [dataclasses.replace(call, id=f"call_{first + i}") for i, call in enumerate(found)]
