"""Function calling by instruction, as Gemma 3 does it: no special tokens, a reply's shape says that it is a call.

Two forms, literal from Google's documentation (gemma3.md section 8.1): calls as Python writes them, or as JSON. What a
model writes is parsed as data and never evaluated.
"""

import ast
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from gemma_jax.text import chat
from gemma_jax.text.parts import Control, Item
from gemma_jax.tools import turns
from gemma_jax.tools.calls import ToolCall, ToolCallError
from gemma_jax.tools.schema import Tool

FORMS = ("python", "json")
MAX_LENGTH, MAX_DEPTH = 100_000, 50  # of a reply that is read as a call: characters, brackets in each other
_HEAD = (
    "You have access to functions. If you decide to invoke any of the function(s),\nyou MUST put it in the format of\n"
)
_SHAPES = {
    "python": "[func_name1(params_name1=params_value1, params_name2=params_value2...), func_name2(params)]",
    "json": '{"name": function name, "parameters": dictionary of argument name and its value}',
}
_TAIL = "\n\nYou SHOULD NOT include any other text in the response if you call a function"
_FENCE = re.compile(r"```(?:json|tool_code|python)?[ \t]*\n(.*?)\n?[ \t]*```", re.DOTALL)
_NAME = r"[A-Za-z_][\w.-]*"
_PYTHON_HEAD = re.compile(rf"\[\s*{_NAME}\(|{_NAME}\(")
_JSON_HEAD = re.compile(r'(\[\s*)?\{\s*"(name|parameters|arguments|type|function)"\s*:')
_CALL_KEYS = {"name", "parameters", "arguments", "id", "type"}
_NAMES = {"true": True, "false": False, "null": None}  # of JSON, which models mix in


def conversation(messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool], form: str) -> list[Item]:
    """A conversation of OpenAI-style messages, up to where the model goes on; the tools stand in front of the first
    user's words, behind a system message. Without tools it is `text.chat.chat_parts`. Raises as `turns.read`.
    """
    system, said = turns.read(messages)
    front = [] if system is None else [chat.system_text(system)]
    front += [instructions(tools, form)] if tools else []
    prompt: list[Item] = [Control(chat.BOS)]
    for i, turn in enumerate(said):
        if turn.role == "tool":
            content: list[Item] = [output(turn.results)]
        else:
            content = [] if turn.content is None else chat.content_parts(turn.content, turn.at)
            content += [render(turn.calls, form)] if turn.calls else []
        before = [f"{text}\n\n" for text in front] if i == 0 else []
        prompt += chat.turn("model" if turn.role == "model" else "user", [*before, *content])
    return [*prompt, Control(chat.START), "model\n"]


def instructions(tools: Iterable[Tool], form: str) -> str:
    """What stands in front of the request: how to call, and the tools as a JSON list."""
    schemas = json.dumps([tool.schema for tool in tools], ensure_ascii=False, indent=2)
    return f"{_HEAD}{_SHAPES[form]}{_TAIL}\n{schemas}"


def render(calls: Sequence[ToolCall], form: str) -> str:
    """Calls as the model writes them."""
    if form == "json":
        objects = [{"name": call.name, "parameters": dict(call.arguments)} for call in calls]
        return json.dumps(objects[0] if len(objects) == 1 else objects, ensure_ascii=False)
    texts = [f"{call.name}({', '.join(f'{k}={v!r}' for k, v in call.arguments.items())})" for call in calls]
    return f"[{', '.join(texts)}]"


def output(results: Sequence[tuple[str, Any]]) -> str:
    """What tools gave, (name, result) each, as a user's turn. No result can close its fence."""
    told = [{"name": name, "result": result} for name, result in results]
    text = json.dumps(told[0] if len(told) == 1 else told, ensure_ascii=False).replace("`", "\\u0060")
    return f"```tool_output\n{text}\n```"


def parse(text: str, form: str, names: Collection[str] = ()) -> list[ToolCall] | None:
    """The calls that a reply consists of, or None if it is an answer.

    An answer may look like one: a call that stands alone, or JSON without parameters, is one only if its name is one of
    `names`. Raises ToolCallError for a reply that has the shape of calls and cannot be read.
    """
    body = text.strip()
    if fence := _FENCE.fullmatch(body):
        body = fence[1].strip()
    head = (_PYTHON_HEAD if form == "python" else _JSON_HEAD).match(body)
    if head is None or not body.endswith((")", "]") if form == "python" else ("}", "]")):
        return None
    is_certain = body.startswith("[") if form == "python" else True
    try:
        if len(body) > MAX_LENGTH or _depth(body) > MAX_DEPTH:
            limits = f"longer than {MAX_LENGTH} characters or nested deeper than {MAX_DEPTH}"
            raise ToolCallError("shape", f"the call is {limits}")
        found = _python_calls(body) if form == "python" else _json_calls(body, names)
        calls = None if found is None else [ToolCall(*one, f"call_{i}") for i, one in enumerate(found)]
    except RecursionError:
        calls = None
        if is_certain:
            raise ToolCallError("shape", "the call is nested too deeply") from None
    except ToolCallError:
        calls = None
        if is_certain:
            raise
    if calls and not is_certain and not all(call.name in names for call in calls):
        return None
    return calls


def _depth(text: str) -> int:
    """Of brackets, those in texts counted too; more than is allowed is all that matters."""
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest


def _python_calls(body: str) -> list[tuple[str, dict[str, Any]]]:
    try:
        tree = ast.parse(body, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ToolCallError("shape", f"the calls cannot be read: {error}") from None
    nodes = tree.elts if isinstance(tree, ast.List) else list(tree.elts) if isinstance(tree, ast.Tuple) else [tree]
    return [_python_call(node) for node in nodes]


def _python_call(node: ast.expr) -> tuple[str, dict[str, Any]]:
    if not isinstance(node, ast.Call):
        raise ToolCallError("shape", "the list holds something that is no call; wanted [name(argument=value, ...)]")
    name = _dotted(node.func)
    if node.args:
        raise ToolCallError("arguments", f"{name} got an argument without its name; write name=value")
    arguments: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg is None or keyword.arg in arguments:
            what = "unpacks a dictionary" if keyword.arg is None else f"has {keyword.arg!r} twice"
            raise ToolCallError("arguments", f"the call of {name} {what}; write each argument once, as name=value")
        arguments[keyword.arg] = _literal(keyword.value, f"{name}({keyword.arg})")
    return name, arguments


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    raise ToolCallError("name", "what is called has no plain name; wanted name(argument=value, ...)")


def _literal(node: ast.expr, where: str) -> Any:
    """The value of a literal of JSON's kinds."""
    if isinstance(node, ast.Constant) and (node.value is None or isinstance(node.value, str | bool | int | float)):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _literal(node.operand, where)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(item, where) for item in node.elts]
    if isinstance(node, ast.Dict):
        keys = [None if key is None else _literal(key, where) for key in node.keys]
        if all(isinstance(key, str) for key in keys) and len(set(map(str, keys))) == len(keys):
            return dict(zip(keys, (_literal(value, where) for value in node.values), strict=True))
    if isinstance(node, ast.Name) and node.id in _NAMES:
        return _NAMES[node.id]
    raise ToolCallError(
        "arguments", f"{where} is no literal; wanted a text, a number, True, False, None, a list or a dict"
    )


def _json_calls(body: str, names: Collection[str]) -> list[tuple[str, dict[str, Any]]] | None:
    """None for objects that hold other things than calls do."""
    try:
        data = json.loads(body, object_pairs_hook=_unique, parse_constant=_no_constant)
    except ToolCallError:
        raise
    except (ValueError, RecursionError) as error:
        raise ToolCallError("shape", f"the call is no JSON: {error}") from None
    items = data if isinstance(data, list) else [data]
    if any(_is_other(item, names) for item in items):
        return None
    return [_json_call(item) for item in items]


def _is_other(item: Any, names: Collection[str]) -> bool:
    """Whether an object is no call: `name` may be a person's."""
    if not isinstance(item, dict) or isinstance(item.get("function"), dict):
        return False
    has_arguments = "parameters" in item or "arguments" in item
    return not (set(item) <= _CALL_KEYS and (has_arguments or item.get("name") in names))


def _json_call(item: Any) -> tuple[str, dict[str, Any]]:
    body = item.get("function", item) if isinstance(item, dict) else item
    if not isinstance(body, dict) or not isinstance(body.get("name"), str):
        raise ToolCallError("shape", 'a call has no name; wanted {"name": ..., "parameters": {...}}')
    arguments = body.get("parameters", body.get("arguments", {}))
    if not isinstance(arguments, dict):
        raise ToolCallError("arguments", f"the parameters of {body['name']} are no object; wanted {{name: value}}")
    return body["name"], arguments


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ToolCallError("shape", "the call has the same key twice")
    return found


def _no_constant(name: str) -> Any:
    raise ToolCallError("arguments", f"the call holds {name}, which is no number of JSON")
