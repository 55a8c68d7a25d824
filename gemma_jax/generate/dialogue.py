"""A conversation in which the model calls tools: it is asked, its calls are run, it is asked again."""

import dataclasses
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gemma_jax.generate.completion import Completion
from gemma_jax.text.parts import Item
from gemma_jax.text.tokenizer import Tokenizer
from gemma_jax.tools import calls as running
from gemma_jax.tools.calls import ToolCall, ToolCallError
from gemma_jax.tools.forms import Form
from gemma_jax.tools.schema import Tool

TOO_LONG = ToolCallError("result", "what came of the calls is too long for the context; ask for less")
Messages = Sequence[Mapping[str, Any]]


def converse(
    answer: Callable[[Sequence[Item]], Completion],
    messages: Messages,
    tools: Mapping[str, Tool],
    form: Form,
    tokenizer: Tokenizer,
    max_rounds: int,
    fits: Callable[[Sequence[Item]], bool],
) -> Completion:
    """The last answer to `messages`, after at most `max_rounds` rounds of calls.

    What goes wrong with a call is told to the model, which costs a round. Calls come back unrun, with finish_reason
    "tool_calls", when no round is left and when one of them is right and has no function here. Results with which the
    prompt no longer `fits` are withheld, and the model is told so.
    """
    offered = list(tools.values())
    added: list[dict[str, Any]] = []
    for left in range(max_rounds, -1, -1):
        completion = answer(form.prompt([*messages, *added] if added else messages, offered))
        try:
            found = form.calls(completion.text or "", completion.tokens, tokenizer, tools) if tools else []
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
        results = running.results(found, tools)
        told = _told(found, results)
        if not fits(form.prompt([*messages, *added, *told], offered)):
            told = _told(found, [TOO_LONG.as_result()] * len(found))
        added += told
    raise AssertionError  # the last round returns


def _told(found: Sequence[ToolCall], results: Sequence[Any]) -> list[dict[str, Any]]:
    return [
        {"role": "tool", "tool_call_id": call.id, "name": call.name, "content": json.dumps(result)}
        for call, result in zip(found, results, strict=True)
    ]


def _error(call: ToolCall, tools: Mapping[str, Tool]) -> ToolCallError | None:
    try:
        running.check(call, tools)
    except ToolCallError as error:
        return error
    return None


def _numbered(found: Sequence[ToolCall], *sofar: Messages) -> list[ToolCall]:
    """Calls with ids that are not yet in the conversation."""
    made = [message.get("tool_calls") for messages in sofar for message in messages]
    used = {call.get("id") for calls in made if isinstance(calls, list) for call in calls if isinstance(call, Mapping)}
    free = (name for name in map("call_{}".format, itertools.count()) if name not in used)
    return [dataclasses.replace(call, id=next(free)) for call in found]
