"""A call that a model wrote: checked against the tool's schema before anything runs, and what came of it."""

import contextlib
import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemma_jax.tools.schema import Tool, jsonschema
from gemma_jax.tools.values import plain

MAX_PROBLEMS = 5  # told at once


@dataclass(frozen=True)
class ToolCall:
    """A tool's name and its arguments, values of JSON: others are a ToolCallError."""

    name: str
    arguments: Mapping[str, Any]
    id: str = "call_0"

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "arguments", plain(dict(self.arguments)))
        except ValueError as error:
            raise ToolCallError("arguments", f"the arguments of {self.name!r:.100} are no JSON: {error}") from None

    def as_message(self) -> dict[str, Any]:
        """As it stands in an assistant's message in OpenAI's form."""
        text = json.dumps(dict(self.arguments), ensure_ascii=False)
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": text}}

    @staticmethod
    def of_message(data: Any, at: int = 0) -> "ToolCall":
        """From OpenAI's form; arguments are a JSON text or an object. Raises ToolCallError."""
        body = data.get("function") if isinstance(data, Mapping) else None
        if not isinstance(body, Mapping) or not isinstance(body.get("name"), str):
            raise ToolCallError(
                "shape", f"a tool call is {data!r:.200}; wanted {{'function': {{'name', 'arguments'}}}}"
            )
        arguments = body.get("arguments") or {}
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError) as error:
                raise ToolCallError("arguments", f"the arguments of {body['name']} are no JSON: {error}") from None
        if not isinstance(arguments, Mapping):
            raise ToolCallError("arguments", f"the arguments of {body['name']} are no object")
        return ToolCall(body["name"], arguments, str(data.get("id") or f"call_{at}"))


class ToolCallError(ValueError):
    """A call that was not run, or failed. `kind`: "shape", "name", "arguments", "failed" or "result"."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind

    def as_result(self) -> dict[str, Any]:
        """What the model is told, so that it can do better."""
        return {"error": {"kind": self.kind, "message": str(self)}}


def check(call: ToolCall, tools: Mapping[str, Tool]) -> Tool:
    """The tool that is called. Raises ToolCallError for an unknown name, and arguments that do not fit its schema."""
    tool = tools.get(call.name)
    if tool is None:
        close = difflib.get_close_matches(call.name, tools, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ToolCallError("name", f"there is no tool {call.name!r:.100}{hint} There are {', '.join(tools) or 'none'}")
    validator = jsonschema().Draft202012Validator(dict(tool.parameters))
    try:
        errors = sorted(validator.iter_errors(dict(call.arguments)), key=lambda error: list(map(str, error.path)))
    except (RecursionError, LookupError, ArithmeticError, ValueError) as error:  # references in circles; huge numbers
        raise ToolCallError("arguments", f"the schema of {call.name} cannot be applied: {error!s:.200}") from None
    if errors:
        told = [f"{'/'.join(map(str, e.absolute_path)) or 'arguments'}: {e.message:.300}" for e in errors]
        raise ToolCallError("arguments", f"wrong arguments for {call.name}: {'; '.join(told[:MAX_PROBLEMS])}")
    return tool


def run(call: ToolCall, tools: Mapping[str, Tool]) -> Any:
    """What the tool's function gives for checked arguments: a value of JSON.

    Raises ToolCallError for what `check` refuses, every Exception of the function's, and a result that JSON has not.
    KeyboardInterrupt and its like pass.
    """
    tool = check(call, tools)
    if tool.function is None:
        raise ToolCallError("failed", f"{call.name} has no function here; its caller has to run it")
    try:
        result = tool.function(**tool.typed(call.arguments))
    except Exception as error:  # the user's code: whatever happens in it, the model is told
        raise ToolCallError("failed", f"{call.name} failed: {type(error).__name__}: {_words(error)}") from error
    try:
        return plain(result)
    except ValueError as error:
        raise ToolCallError("result", f"the result of {call.name} cannot be told as JSON: {error}") from None


def results(calls: Sequence[ToolCall], tools: Mapping[str, Tool]) -> list[Any]:
    """What became of each call, errors as the model is told them."""
    told = []
    for call in calls:
        try:
            told.append(run(call, tools))
        except ToolCallError as error:
            told.append(error.as_result())
    return told


def _words(error: Exception) -> str:
    """What an exception says, if it can."""
    with contextlib.suppress(Exception):
        return f"{error!s:.500}".encode(errors="replace").decode()
    return "(its message cannot be read)"
