"""FunctionGemma's own tokens for declarations, calls and responses (gemma3.md section 8.2).

All is made and read as parts: `<escape>`, which opens and closes every text, is a token and never the characters, so
braces and colons in a text are text, and nobody's text can end it.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gemma_jax.text.chat import BOS, END, START, ChatError
from gemma_jax.text.parts import Control, Part, merged
from gemma_jax.text.vocabulary import FUNCTION_RESPONSE
from gemma_jax.tools import turns
from gemma_jax.tools.calls import ToolCall, ToolCallError
from gemma_jax.tools.schema import Tool

DEVELOPER_TEXT = "You are a model that can do function calling with the following functions"
ESCAPE = Control("<escape>")
DECLARATION = Control("<start_function_declaration>"), Control("<end_function_declaration>")
CALL = Control("<start_function_call>"), Control("<end_function_call>")
RESPONSE = Control(FUNCTION_RESPONSE), Control("<end_function_response>")
MAX_DEPTH = 50  # of lists and objects in each other
_NUMBER = re.compile(r"-?\d+(\.\d+)?([eE][+-]?\d+)?", re.ASCII)
_BARE = {"true": True, "false": False, "null": None}


def conversation(messages: Sequence[Mapping[str, Any]], tools: Iterable[Tool]) -> list[Part]:
    """A conversation of OpenAI-style messages with the tools' declarations, up to where the model goes on.

    Results of tools (role `tool`) stand in the model's turn, behind its calls. Raises as `turns.read`, and ChatError
    for content that is no text.
    """
    tools = list(tools)
    system, said = turns.read(messages)
    texts = [] if system is None else [_text(system.get("content"), 0)]
    prompt: list[Part] = [Control(BOS)]
    if tools or texts:
        texts += [DEVELOPER_TEXT] if tools and not any(DEVELOPER_TEXT in text for text in texts) else []
        prompt += [Control(START), "developer\n", "\n".join(texts), *declarations(tools), Control(END), "\n"]
    is_open = False  # in a model's turn, after its calls
    for turn in said:
        if turn.role == "user":
            prompt += [Control(START), "user\n", _text(turn.content, turn.at), Control(END), "\n"]
        elif turn.role == "tool":
            prompt += responses(turn.results)
        else:
            prompt += [] if is_open else [Control(START), "model\n"]
            prompt += [] if turn.content is None else [_text(turn.content, turn.at)]
            prompt += calls(turn.calls) if turn.calls else [Control(END), "\n"]
            is_open = bool(turn.calls)
    return prompt if is_open else [*prompt, Control(START), "model\n"]


def _text(content: Any, at: int) -> str:
    if isinstance(content, str):
        return content.strip()
    if isinstance(content, Sequence) and all(
        isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in content
    ):
        return "".join(part["text"].strip() for part in content)
    raise ChatError(f"message {at} has content {content!r:.200}; this model reads text only")


def declarations(tools: Iterable[Tool]) -> list[Part]:
    """What the tools are, one after another."""
    found: list[Part] = []
    for tool in tools:
        described = [("description", tool.description)] if tool.description else []
        body = _fields([*described, ("parameters", _Raw(_object_schema(tool.parameters)))])
        found += [DECLARATION[0], f"declaration:{tool.name}", *body, DECLARATION[1]]
    return list(merged(found))


class _Raw:
    """Parts that are a value already."""

    def __init__(self, parts: list[Part]):
        self.parts = parts


def _object_schema(schema: Mapping[str, Any], first: Iterable[tuple[str, Any]] = ()) -> list[Part]:
    """Properties by name, then what is required in its own order, then the type; what is absent vanishes."""
    properties, required = schema.get("properties") or {}, schema.get("required") or []
    fields = list(first)
    if properties:
        fields.append(("properties", _Raw(_fields([(k, _Raw(_schema(v))) for k, v in sorted(properties.items())]))))
    if required:
        fields.append(("required", list(required)))
    return _fields([*fields, ("type", "OBJECT")])


def _schema(schema: Any) -> list[Part]:
    """One property. Of several types the first stands for all: the form has one."""
    schema = _one_of(schema) if isinstance(schema, Mapping) else {}
    kinds = schema.get("type") or _kind_of(schema.get("enum"))
    kind = next((k for k in kinds if k != "null"), "string") if isinstance(kinds, list) else kinds
    fields = [(name, schema[name]) for name in ("description", "enum") if schema.get(name)]
    if kind == "object":
        return _object_schema(schema, fields)
    if kind == "array" and isinstance(schema.get("items"), Mapping):
        fields.append(("items", _Raw(_schema(schema["items"]))))
    return _fields([*fields, ("type", str(kind).upper())])


def _one_of(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """A schema with the first of its alternatives that is not null in place of all."""
    choices = [c for name in ("anyOf", "oneOf") for c in schema.get(name) or () if isinstance(c, Mapping)]
    chosen = next((choice for choice in choices if choice.get("type") != "null"), None)
    return schema if chosen is None else {**_one_of(chosen), **schema}


def _kind_of(values: Any) -> str:
    kinds = {bool: "boolean", int: "integer", float: "number"}
    return kinds.get(type(values[0]), "string") if isinstance(values, list) and values else "string"


def calls(made: Sequence[ToolCall]) -> list[Part]:
    """Calls as the model writes them, keys sorted."""
    found: list[Part] = []
    for call in made:
        found += [CALL[0], f"call:{call.name}", *_value(dict(call.arguments)), CALL[1]]
    return found


def responses(results: Iterable[tuple[str, Any]]) -> list[Part]:
    """What tools gave, (name, result) each; a result that is no object stands under `value`."""
    found: list[Part] = []
    for name, result in results:
        body = result if isinstance(result, Mapping) else {"value": result}
        found += [RESPONSE[0], f"response:{name}", *_value(body), RESPONSE[1]]
    return found


def _fields(fields: Iterable[tuple[str, Any]]) -> list[Part]:
    found: list[Part] = ["{"]
    for i, (key, value) in enumerate(fields):
        found += ["," if i else "", f"{key}:", *_value(value)]
    return [*found, "}"]


def _value(value: Any) -> list[Part]:
    if isinstance(value, _Raw):
        return value.parts
    if isinstance(value, str):
        return [ESCAPE, value, ESCAPE]
    if isinstance(value, Mapping):
        return _fields(sorted(value.items()))
    if isinstance(value, list | tuple):
        return ["[", *(part for i, item in enumerate(value) for part in ("," if i else "", *_value(item))), "]"]
    return [json.dumps(value)]


def parse(reply: Sequence[Part]) -> list[ToolCall]:
    """The calls in a reply, none if it is an answer; see `text.parts.decode`.

    A call that is cut off where the reply ends, but for its last token, is read. Raises ToolCallError for a broken one.
    """
    found, parts = [], list(merged(reply))
    starts = [i for i, part in enumerate(parts) if part == CALL[0]]
    for i, start in enumerate(starts):
        stop = next((k for k in range(start + 1, len(parts)) if parts[k] in (*CALL, RESPONSE[0])), len(parts))
        name, arguments = _Scanner(parts[start + 1 : stop]).call()
        found.append(ToolCall(name, arguments, f"call_{i}"))
    return found


class _Scanner:
    """Reads one call, character by character; what stands between two escapes is one text."""

    def __init__(self, parts: Sequence[Part]):
        self.items: list[str | Control] = []
        for part in parts:
            if isinstance(part, str):
                self.items += part
            elif part == ESCAPE:
                self.items.append(ESCAPE)
            else:
                raise ToolCallError("shape", f"a call holds the token {getattr(part, 'piece', part)}")
        self.at = 0

    def call(self) -> tuple[str, dict[str, Any]]:
        head = self._until("{")
        if not head.startswith("call:"):
            raise ToolCallError("shape", f"a call begins with {head[:40]!r}; wanted call:name{{...}}")
        name = head.removeprefix("call:").strip()
        arguments = self._object(1)
        if self._rest().strip():
            raise ToolCallError("shape", f"behind the call of {name} stands {self._rest()[:40]!r}")
        return name, arguments

    def _until(self, ends: str) -> str:
        """The bare text up to one of `ends`, which is next then."""
        text = ""
        while self.at < len(self.items):
            item = self.items[self.at]
            if isinstance(item, Control) or item in ends:
                break
            text += item
            self.at += 1
        return text

    def _rest(self) -> str:
        return "".join(item if isinstance(item, str) else item.piece for item in self.items[self.at :])

    def _take(self) -> str | Control:
        if self.at >= len(self.items):
            raise ToolCallError("shape", "the call is cut off")
        self.at += 1
        return self.items[self.at - 1]

    def _peek(self) -> str | Control | None:
        while self.at < len(self.items) and isinstance(item := self.items[self.at], str) and item.isspace():
            self.at += 1
        return self.items[self.at] if self.at < len(self.items) else None

    def _object(self, depth: int) -> dict[str, Any]:
        self._expect("{")
        found: dict[str, Any] = {}
        while self._peek() != "}":
            if found:
                self._expect(",")
            key = self._text() if self._peek() == ESCAPE else self._until(":,{}[]").strip()
            self._expect(":")
            if not key or key in found:
                raise ToolCallError("arguments", f"the key {key!r} stands twice" if key else "a key is empty")
            found[key] = self._any(depth)
        self._expect("}")
        return found

    def _list(self, depth: int) -> list[Any]:
        self._expect("[")
        found: list[Any] = []
        while self._peek() != "]":
            if found:
                self._expect(",")
            found.append(self._any(depth))
        self._expect("]")
        return found

    def _any(self, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise ToolCallError("shape", f"the call is nested deeper than {MAX_DEPTH}")
        first = self._peek()
        if first == ESCAPE:
            return self._text()
        if first == "{":
            return self._object(depth + 1)
        return self._list(depth + 1) if first == "[" else _bare(self._until(",}]{[:").strip())

    def _text(self) -> str:
        self._take()
        text = ""
        while (item := self._take()) != ESCAPE:
            assert isinstance(item, str)
            text += item
        return text

    def _expect(self, character: str) -> None:
        self._peek()
        if (found := self._take()) != character:
            shown = found if isinstance(found, str) else found.piece
            raise ToolCallError("shape", f"a call has {shown!r} where {character!r} was wanted")


def _bare(text: str) -> Any:
    if text in _BARE:
        return _BARE[text]
    if match := _NUMBER.fullmatch(text):
        if len(text) > 400:
            raise ToolCallError("arguments", "a number has more than 400 digits")
        return float(text) if match[1] or match[2] else int(text)
    raise ToolCallError("arguments", f"{text[:40]!r} is no value; texts stand between two <escape>")
