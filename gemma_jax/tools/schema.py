"""What a tool is: a name, a description and a JSON schema of its parameters; perhaps a Python function."""

import enum
import inspect
import re
import types
import typing
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from gemma_jax.tools.values import plain

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}")
_SIMPLE = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
_SECTION = re.compile(r"(args|arguments|parameters|returns?|raises|yields|examples?|notes?)\s*:?", re.IGNORECASE)
_ARGUMENT = re.compile(r"\s*\*{0,2}(\w+)\s*(?:\([^)]*\))?\s*:\s*(.*)")


class ToolSchemaError(ValueError):
    """A tool that cannot be offered: its name, its schema, or the signature of its function."""


@dataclass(frozen=True)
class Tool:
    """A function that the model may call. `parameters` is a JSON schema of type object."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    function: Callable[..., Any] | None = None
    hints: Mapping[str, Any] = field(default_factory=dict)  # the function's annotations

    def typed(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Checked arguments as the function's annotations have them: members of enumerations, whole numbers as int."""
        return {name: _typed(value, self.hints.get(name)) for name, value in arguments.items()}

    @property
    def schema(self) -> dict[str, Any]:
        """As Gemma 3 is shown it: name, description, parameters."""
        return {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}

    @staticmethod
    def of(source: Any) -> "Tool":
        """A tool from a typed Python function with a docstring, OpenAI's JSON, or a Tool.

        Raises ToolSchemaError for a bad name, parameters without annotations or with ones that JSON has not, and an
        invalid schema; ImportError without the extra `tools`.
        """
        if isinstance(source, Tool):
            tool = source
        elif isinstance(source, Mapping):
            tool = _of_json(source)
        elif callable(source):
            tool = _of_function(source)
        else:
            raise ToolSchemaError(
                f"a tool is a {type(source).__name__}; wanted a Python function, or "
                "{'type': 'function', 'function': {'name': ..., 'description': ..., 'parameters': {...}}}"
            )
        _check(tool)
        return tool


def tool_set(sources: Iterable[Any] | None) -> dict[str, Tool]:
    """Tools by name, in their order; see `Tool.of`. Raises ToolSchemaError too for a name that is there twice."""
    if sources is None:
        return {}
    if isinstance(sources, Mapping | str) or callable(sources) or not isinstance(sources, Iterable):
        raise ToolSchemaError(f"tools is a {type(sources).__name__}; wanted a list of tools")
    tools: dict[str, Tool] = {}
    for source in sources:
        tool = Tool.of(source)
        if tool.name in tools:
            raise ToolSchemaError(f"two tools are called {tool.name!r}; give each a name of its own")
        tools[tool.name] = tool
    return tools


def jsonschema() -> Any:
    """The library. Raises ImportError that says what to install."""
    try:
        import jsonschema
    except ImportError:
        raise ImportError("tools need jsonschema: pip install 'gemma-jax[tools]'") from None
    return jsonschema


def _check(tool: Tool) -> None:
    if not isinstance(tool.name, str) or not _NAME.fullmatch(tool.name):
        raise ToolSchemaError(
            f"a tool is called {tool.name!r}; wanted at most 64 letters, digits, _ . - that begin with a letter or _"
        )
    if not isinstance(tool.description, str):
        raise ToolSchemaError(f"the description of {tool.name} is {tool.description!r}; wanted a text")
    parameters = tool.parameters
    if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
        raise ToolSchemaError(f"the parameters of {tool.name} are {parameters!r}; wanted a JSON schema of type object")
    library = jsonschema()
    try:
        plain(parameters)
    except ValueError as error:
        raise ToolSchemaError(f"the parameters of {tool.name} are no JSON: {error}") from None
    try:
        if outside := [reference for reference in _references(parameters) if not reference.startswith("#")]:
            raise ToolSchemaError(f"{tool.name} refers to {outside[0]!r}; nothing is fetched, wanted #/$defs/... only")
        if missing := [one for one in _references(parameters) if not _leads(one, parameters)]:
            raise ToolSchemaError(f"{tool.name} refers to {missing[0]!r}, which its parameters do not hold")
        library.Draft202012Validator.check_schema(dict(parameters))
    except library.SchemaError as error:
        where = "/".join(map(str, error.absolute_path)) or "the top"
        raise ToolSchemaError(
            f"the parameters of {tool.name} are no valid JSON schema (draft 2020-12): {error.message} at {where}"
        ) from None
    except RecursionError:
        raise ToolSchemaError(f"the parameters of {tool.name} are nested too deeply") from None


def _references(node: Any) -> Iterator[str]:
    """All `$ref`s; the library would look for them in the net."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            if key in ("$ref", "$dynamicRef", "$schema", "$id") and isinstance(value, str):
                yield "#" if key == "$schema" and "json-schema.org" in value else value
            else:
                yield from _references(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _references(value)


def _leads(reference: str, schema: Any) -> bool:
    """Whether a reference, a JSON pointer behind #, leads to something."""
    for key in reference.removeprefix("#").split("/")[1:]:
        key = urllib.parse.unquote(key).replace("~1", "/").replace("~0", "~")
        if isinstance(schema, list) and key.isdecimal() and int(key) < len(schema):
            schema = schema[int(key)]
        elif isinstance(schema, Mapping) and key in schema:
            schema = schema[key]
        else:
            return False
    return reference in ("", "#") or reference.startswith("#/")


def _typed(value: Any, hint: Any) -> Any:
    """A value of JSON as an annotation has it, where JSON has less: enumerations, 2.0 for an int; else as it is."""
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return hint(value)
    if hint is int and isinstance(value, float):
        return int(value)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _typed(value, arguments[0])
    if origin in (typing.Union, types.UnionType) and value is not None:
        own = [part for part in arguments if part is not type(None)]
        return _typed(value, own[0]) if len(own) == 1 else value
    if origin is list and arguments and isinstance(value, list):
        return [_typed(item, arguments[0]) for item in value]
    if origin is dict and len(arguments) == 2 and isinstance(value, dict):
        return {key: _typed(item, arguments[1]) for key, item in value.items()}
    return value


def _of_json(data: Mapping[str, Any]) -> Tool:
    body = data.get("function", data)
    kind = data.get("type", "function")
    if kind != "function" or not isinstance(body, Mapping) or "name" not in body:
        raise ToolSchemaError(
            f"a tool is {dict(data)!r:.200}; wanted {{'type': 'function', 'function': {{'name': ..., 'parameters': "
            "{...}}}"
        )
    empty = {"type": "object", "properties": {}}
    parameters = body.get("parameters")
    return Tool(body["name"], body.get("description") or "", empty if parameters is None else parameters)


def _of_function(function: Callable[..., Any]) -> Tool:
    name = getattr(function, "__name__", "")
    try:
        signature = inspect.signature(function)
        hints = typing.get_type_hints(function if inspect.isroutine(function) else type(function).__call__)
    except (TypeError, ValueError, NameError, AttributeError, SyntaxError) as error:
        raise ToolSchemaError(f"the signature of {name or function!r} cannot be read: {error}") from None
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        raise ToolSchemaError(f"{name} is an async function; give one that is called and answers")
    description, of_parameters = _docstring(inspect.getdoc(function) or "")
    properties, required = {}, []
    for parameter in signature.parameters.values():
        where = f"parameter {parameter.name!r} of {name}"
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ToolSchemaError(f"{where} cannot be given by name; a tool's parameters all can")
        if parameter.name not in hints:
            raise ToolSchemaError(f"{where} has no annotation; write its type, such as {parameter.name}: str")
        try:
            properties[parameter.name] = schema = _schema(hints[parameter.name], where)
        except TypeError as error:  # an annotation that cannot be looked up, as Literal[[1]]
            raise ToolSchemaError(f"{where} is annotated {hints[parameter.name]!r}: {error}") from None
        if parameter.name in of_parameters:
            schema["description"] = of_parameters[parameter.name]
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    parameters: dict[str, Any] = {"type": "object", "properties": properties, "additionalProperties": False}
    return Tool(name, description, parameters | ({"required": required} if required else {}), function, hints)


def _schema(hint: Any, where: str) -> dict[str, Any]:
    """The JSON schema of an annotation."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in _SIMPLE:
        return {"type": _SIMPLE[hint]}
    if origin is typing.Annotated:
        return _schema(arguments[0], where)
    if origin is typing.Literal:
        return _choices(arguments, where)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return _choices(tuple(member.value for member in hint), where)
    if origin in (typing.Union, types.UnionType):
        kinds = [_schema(part, where) for part in arguments if part is not type(None)]
        if (
            len(kinds) == 1
            and type(None) in arguments
            and "enum" not in kinds[0]
            and isinstance(kinds[0].get("type"), str)
        ):
            return {**kinds[0], "type": [kinds[0]["type"], "null"]}
        return {"anyOf": [*kinds, *([{"type": "null"}] if type(None) in arguments else [])]}
    if hint is list or origin is list:
        return {"type": "array"} | ({"items": _schema(arguments[0], where)} if arguments else {})
    if hint is dict or (origin is dict and (not arguments or arguments[0] is str)):
        return {"type": "object"} | ({"additionalProperties": _schema(arguments[1], where)} if arguments else {})
    if hint is Any:
        return {}
    raise ToolSchemaError(
        f"{where} is annotated {hint!r}, which JSON has not; wanted str, int, float, bool, list[...], dict[str, ...], "
        "Literal[...], an Enum, or one of these or None"
    )


def _choices(values: tuple[Any, ...], where: str) -> dict[str, Any]:
    kinds = {type(value) for value in values}
    if len(kinds) != 1 or not kinds <= set(_SIMPLE):
        raise ToolSchemaError(f"{where} may be {values!r}; wanted choices of one type: str, int, float or bool")
    return {"type": _SIMPLE[kinds.pop()], "enum": list(values)}


def _docstring(text: str) -> tuple[str, dict[str, str]]:
    """The text before the first section, and what an Args section says of each parameter."""
    lines = text.splitlines()
    heads = [i for i, line in enumerate(lines) if _SECTION.fullmatch(line.strip())]
    summary = " ".join(" ".join(lines[: heads[0] if heads else None]).split())
    found: dict[str, str] = {}
    for i, start in enumerate(heads):
        if lines[start].strip().lower().rstrip(" :") not in ("args", "arguments", "parameters"):
            continue
        body = [line for line in lines[start + 1 : heads[i + 1] if i + 1 < len(heads) else None] if line.strip()]
        found |= _numpy_style(body[1:]) if body and set(body[0].strip()) == {"-"} else _google_style(body)
    return summary, found


def _google_style(body: list[str]) -> dict[str, str]:
    """`name (type): text`, continued on lines that stand further in."""
    found: dict[str, str] = {}
    name, indent = None, min((len(line) - len(line.lstrip()) for line in body), default=0)
    for line in body:
        match = _ARGUMENT.fullmatch(line) if len(line) - len(line.lstrip()) == indent else None
        if match:
            name = match[1]
            found[name] = match[2].strip()
        elif name is not None:
            found[name] = f"{found[name]} {line.strip()}".strip()
    return found


def _numpy_style(body: list[str]) -> dict[str, str]:
    """`name : type`, its text on the lines below, further in."""
    found: dict[str, str] = {}
    name = None
    for line in body:
        if line == line.lstrip():
            name = line.split(":")[0].strip()
            found[name] = ""
        elif name is not None:
            found[name] = f"{found[name]} {line.strip()}".strip()
    return found
