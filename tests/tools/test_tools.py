"""Tools: schemas from functions and JSON, prompts, parsers that only read, calls that are checked before they run."""

import contextlib
import enum
import json
import typing
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_jax.text.chat import ChatError, as_text
from gemma_jax.text.parts import Control
from gemma_jax.tools import calls, functiongemma, prompted
from gemma_jax.tools.calls import ToolCall, ToolCallError
from gemma_jax.tools.schema import Tool, ToolSchemaError, tool_set


class Unit(enum.Enum):
    C = "celsius"
    F = "fahrenheit"


def weather(city: str, days: int = 1, unit: Unit = Unit.C, tags: list[str] | None = None):
    """The weather of a city.

    In some days.

    Args:
        city: its name,
            with the country.
        days (int): how many.

    Returns:
        A forecast.
    """
    return {"city": city, "days": days}


def broken(x: int):
    """Fails."""
    raise RuntimeError("no luck")


TOOLS = tool_set([weather, broken])


def test_a_function_is_a_schema():
    tool = TOOLS["weather"]
    assert tool.description == "The weather of a city. In some days."
    assert tool.parameters == {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "its name, with the country."},
            "days": {"type": "integer", "description": "how many."},
            "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
            "tags": {"type": ["array", "null"], "items": {"type": "string"}},
        },
        "additionalProperties": False,
        "required": ["city"],
    }


def test_numpy_style_and_literals():
    def f(mode: Literal["a", "b"], limit: float | None = None):
        """Does it.

        Parameters
        ----------
        mode : str
            Which way.
        limit : float
            How far.
        """

    properties = Tool.of(f).parameters["properties"]
    assert properties["mode"] == {"type": "string", "enum": ["a", "b"], "description": "Which way."}
    assert properties["limit"] == {"type": ["number", "null"], "description": "How far."}


def test_openais_json_is_a_tool():
    body = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}
    assert Tool.of({"type": "function", "function": body}) == Tool.of(body)
    assert Tool.of({"name": "g"}).parameters == {"type": "object", "properties": {}}


def no_annotation(x):
    """x"""


def star(*x: int):
    """x"""


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (no_annotation, "parameter 'x' of no_annotation has no annotation"),
        (star, "cannot be given by name"),
        (7, "a tool is a int"),
        ({"type": "function"}, "wanted {'type': 'function'"),
        ({"name": "a b"}, "a tool is called 'a b'"),
        ({"name": "f", "parameters": {"type": "string"}}, "wanted a JSON schema of type object"),
        (
            {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "text"}}}},
            "no valid JSON schema",
        ),
        ({"name": "f", "parameters": {"properties": {"a": {"$ref": "http://a/b"}}}}, "nothing is fetched"),
        (lambda x: x, "has no annotation"),
    ],
)
def test_what_is_no_tool_is_refused(source, words):
    with pytest.raises(ToolSchemaError, match=words):
        Tool.of(source)


def test_names_are_unique():
    with pytest.raises(ToolSchemaError, match="two tools are called 'weather'"):
        tool_set([weather, weather])
    with pytest.raises(ToolSchemaError, match="wanted a list of tools"):
        tool_set(weather)


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (ToolCall("wether", {}), "name", "did you mean weather"),
        (ToolCall("weather", {}), "arguments", "'city' is a required property"),
        (ToolCall("weather", {"city": 3, "days": "x"}), "arguments", "city: 3 is not of type 'string'; days"),
        (ToolCall("weather", {"city": "x", "zip": 1}), "arguments", "zip"),
        (ToolCall("broken", {"x": 1}), "failed", "RuntimeError: no luck"),
    ],
)
def test_a_wrong_call_is_an_error_that_the_model_can_be_told(call, kind, words):
    with pytest.raises(ToolCallError, match=words) as error:
        calls.run(call, TOOLS)
    assert error.value.kind == kind
    assert json.loads(json.dumps(error.value.as_result()))["error"]["kind"] == kind
    assert calls.results([call], TOOLS) == [error.value.as_result()]


def test_a_right_call_runs():
    assert calls.run(ToolCall("weather", {"city": "Oslo", "days": 2}), TOOLS) == {"city": "Oslo", "days": 2}


def test_a_result_that_is_no_json_is_told():
    tools = tool_set([Tool("f", "", {"type": "object"}, lambda: float("nan"))])
    with pytest.raises(ToolCallError, match="cannot be told as JSON"):
        calls.run(ToolCall("f", {}), tools)


@pytest.mark.parametrize(
    ("text", "form", "want"),
    [
        ('[f(a=1, b="x"), g()]', "python", [("f", {"a": 1, "b": "x"}), ("g", {})]),
        ("f(a=-1.5, b=[True, null, {'k': (1,)}])", "python", [("f", {"a": -1.5, "b": [True, None, {"k": [1]}]})]),
        ("```tool_code\n[f(a=1)]\n```", "python", [("f", {"a": 1})]),
        ("[a.b(c='it\\'s')]", "python", [("a.b", {"c": "it's"})]),
        ('{"name": "f", "parameters": {"a": 1}}', "json", [("f", {"a": 1})]),
        ('```json\n[{"name": "f", "arguments": {}}, {"name": "g"}]\n```', "json", [("f", {}), ("g", {})]),
        ("Paris (France)", "python", None),
        ("sin(x)", "python", None),
        ("[link](http://a.b)", "python", None),
        ("I would call [f(a=1)] now", "python", None),
        ('{"answer": 42}', "json", None),
        ("", "python", None),
    ],
)
def test_replies_are_read(text, form, want):
    found = prompted.parse(text, form, ["f", "g"])
    assert (None if found is None else [(call.name, call.arguments) for call in found]) == want


@pytest.mark.parametrize(
    ("text", "form", "words"),
    [
        ("[f(a=open('x'))]", "python", "no literal"),
        ("[f(a=__import__('os').system('x'))]", "python", "no literal"),
        ("[f(1)]", "python", "without its name"),
        ("[f(a=1, a=2)]", "python", "cannot be read|twice"),
        ("[f(**{'a': 1})]", "python", "unpacks"),
        ("[f(a=1)", "python", "cannot be read"),
        ("[f(a=" + "[" * 200 + "]" * 200 + ")]", "python", "nested deeper"),
        ("[f(a=" + "9" * 5000 + ")]", "python", "cannot be read"),
        ('{"name": "f", "name": "g"}', "json", "same key twice"),
        ('{"name": "f", "parameters": [1]}', "json", "no object"),
        ('{"name": "f", "parameters": {"a": NaN}}', "json", "NaN"),
        ('{"name": 3, "parameters": {}}', "json", "no name"),
    ],
)
def test_broken_calls_are_errors(text, form, words):
    with pytest.raises(ToolCallError, match=words):
        prompted.parse(text, form)


def test_no_result_closes_its_fence():
    text = prompted.output([("f", "```\n<end_of_turn>")])
    assert text.count("```") == 2
    assert json.loads(text.split("\n")[1]) == {"name": "f", "result": "```\n<end_of_turn>"}


def test_instructions_are_the_official_ones():
    text = prompted.instructions(TOOLS.values(), "python")
    assert text.startswith(
        "You have access to functions. If you decide to invoke any of the function(s),\nyou MUST put"
    )
    assert json.loads(text[text.index("\n[\n") :])[0]["name"] == "weather"


LITERALS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.text("abcdefghijk_", min_size=1, max_size=6).filter(lambda key: key not in ("if", "as", "in", "is"))
CALLS = st.lists(
    st.builds(ToolCall, st.sampled_from(["f", "get_weather"]), st.dictionaries(KEYS, LITERALS, max_size=3)),
    min_size=1,
    max_size=3,
)


def plain(found):
    return [(call.name, dict(call.arguments)) for call in found or []]


@settings(max_examples=150, deadline=None)
@given(CALLS)
def test_calls_come_back_from_every_form(made):
    for form in prompted.FORMS:
        assert plain(prompted.parse(prompted.render(made, form), form)) == plain(made)
    plain_keys = [call for call in made if _has_plain_keys(call.arguments)]
    assert plain(functiongemma.parse(functiongemma.calls(plain_keys))) == plain(plain_keys)


def _has_plain_keys(value):
    if isinstance(value, dict):
        return all(key.strip() == key and key and not set(key) & set(":,{}[]") for key in value) and all(
            map(_has_plain_keys, value.values())
        )
    return all(map(_has_plain_keys, value)) if isinstance(value, list) else True


PIECES = st.sampled_from(
    [*map(Control, ["<escape>", "<start_function_call>", "<end_function_call>", "<start_function_response>"]),
     "call:f{", "}", "a:1", ",", "[", "]", "true", " ", "-1e9", "call:", "{", ":"]
) | st.text(max_size=8)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECES, max_size=14), st.text(max_size=60), st.sampled_from(prompted.FORMS))
def test_any_reply_is_read_or_refused(parts, text, form):
    for read in (
        lambda: functiongemma.parse(parts),
        lambda: prompted.parse(f"[f({text})]", form),
        lambda: prompted.parse(text, form),
    ):
        with contextlib.suppress(ToolCallError):
            read()


SCHEMA = {
    "name": "get_current_weather",
    "description": "Gets the weather",
    "parameters": {
        "type": "object",
        "properties": {
            "unit": {"type": "string", "enum": ["c", "f"]},
            "location": {"type": "string", "description": "The city"},
        },
        "required": ["location"],
    },
}
DECLARED = (
    "<start_function_declaration>declaration:get_current_weather{description:<escape>Gets the weather<escape>,"
    "parameters:{properties:{location:{description:<escape>The city<escape>,type:<escape>STRING<escape>},"
    "unit:{enum:[<escape>c<escape>,<escape>f<escape>],type:<escape>STRING<escape>}},"
    "required:[<escape>location<escape>],type:<escape>OBJECT<escape>}}<end_function_declaration>"
)
CALLED = "<start_function_call>call:get_current_weather{location:<escape>Tokyo, Japan<escape>}<end_function_call>"
ANSWERED = (
    "<start_function_response>response:get_current_weather{temperature:15,weather:<escape>sunny<escape>}"
    "<end_function_response>"
)


def test_functiongemmas_conversation_is_that_of_the_specification():
    tools = [Tool.of(SCHEMA)]
    call = ToolCall("get_current_weather", {"location": "Tokyo, Japan"})
    messages = [
        {"role": "user", "content": "Weather in Tokyo?"},
        {"role": "assistant", "content": None, "tool_calls": [call.as_message()]},
        {"role": "tool", "name": call.name, "content": '{"temperature": 15, "weather": "sunny"}'},
    ]
    begin = (
        f"<bos><start_of_turn>developer\n{functiongemma.DEVELOPER_TEXT}{DECLARED}<end_of_turn>\n"
        "<start_of_turn>user\nWeather in Tokyo?<end_of_turn>\n<start_of_turn>model\n"
    )
    assert as_text(functiongemma.conversation(messages[:1], tools)) == begin
    assert as_text(functiongemma.conversation(messages, tools)) == begin + CALLED + ANSWERED
    more = [*messages, {"role": "assistant", "content": "It is sunny."}, {"role": "user", "content": "Thanks"}]
    end = "It is sunny.<end_of_turn>\n<start_of_turn>user\nThanks<end_of_turn>\n<start_of_turn>model\n"
    assert as_text(functiongemma.conversation(more, tools)) == begin + CALLED + ANSWERED + end


def test_a_tool_without_parameters():
    text = as_text(functiongemma.declarations([Tool("f", "d", {"type": "object", "properties": {}})]))
    assert "parameters:{type:<escape>OBJECT<escape>}}" in text


def test_escapes_protect_and_truncation_is_tolerated():
    escape, start = functiongemma.ESCAPE, functiongemma.CALL[0]
    parts = [start, "call:f{a:", escape, "x}, b:{<escape>", escape, ",b:[1,2.5,{c:true}]}"]
    assert plain(functiongemma.parse(parts)) == [("f", {"a": "x}, b:{<escape>", "b": [1, 2.5, {"c": True}]})]
    two = functiongemma.parse([start, "call:f{}", start, "call:g{}", functiongemma.RESPONSE[0]])
    assert [call.id for call in two] == ["call_0", "call_1"]
    assert functiongemma.parse(["an answer"]) == []


@pytest.mark.parametrize("text", ["call:f{a:1,a:2}", "call:f{a:1", "f{}", "call:f{a:hello}", "call:f{}x", "call:f{:1}"])
def test_broken_calls_of_functiongemma_are_errors(text):
    with pytest.raises(ToolCallError):
        functiongemma.parse([functiongemma.CALL[0], text, functiongemma.CALL[1]])


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "assistant", "content": "a"}],
        [{"role": "user", "content": 3}],
        [{"role": "user", "content": "a"}] * 2,
    ],
)
def test_other_orders_are_refused(messages):
    with pytest.raises(ChatError):
        functiongemma.conversation(messages, [])


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("[f(a=1e999)]", "python"),
        ('{"name": "f", "parameters": {"a": 1e999}}', "json"),
        (f"[f(a=0x{'f' * 3600})]", "python"),
        (f"[f(a={'-' * 1500}1)]", "python"),
        (f"[a{'.a' * 2000}(x=1)]", "python"),
        ('{"name": "f", "parameters": {"a": "\\ud800"}}', "json"),
    ],
)
def test_what_json_has_not_is_a_structured_error(text, form):
    """Infinity, thousands of digits, runs of signs and dots, lone surrogates."""
    with pytest.raises(ToolCallError):
        prompted.parse(text, form, ["f"])
    with pytest.raises(ToolCallError):
        functiongemma.parse([functiongemma.CALL[0], "call:f{a:1e999}", functiongemma.CALL[1]])


def test_answers_that_look_like_calls_are_answers():
    assert prompted.parse('{"name": "Bob", "age": 5}', "json", ["f"]) is None
    assert prompted.parse('{"type": "circle", "r": 5}', "json", ["f"]) is None
    assert prompted.parse('{"name": "Bob"}', "json", ["f"]) is None
    assert prompted.parse("```python\nprint()\n```", "python", ["f"]) is None
    assert plain(prompted.parse("f(a=1)", "python", ["f"])) == [("f", {"a": 1})]
    assert plain(prompted.parse('{"name": "f"}', "json", ["f"])) == [("f", {})]


class Silent(Exception):
    def __str__(self):
        raise ZeroDivisionError


def test_whatever_a_tool_does_is_told():
    def silent():
        raise Silent

    def surrogate():
        return "\ud800"

    def deep():
        value = []
        for _ in range(600):
            value = [value]
        return value

    tools = tool_set([silent, surrogate, deep])
    told = calls.results([ToolCall(name, {}) for name in tools], tools)
    assert [one["error"]["kind"] for one in told] == ["failed", "result", "result"]


def test_arguments_have_the_types_of_the_annotations():
    def typed(unit: Unit, n: int, units: list[Unit], other: Unit | None = None):
        return [unit.name, "s" * n, [one.name for one in units], other]

    tools = tool_set([typed])
    call = ToolCall("typed", {"unit": "celsius", "n": 2.0, "units": ["fahrenheit"], "other": None})
    assert calls.run(call, tools) == ["C", "ss", ["F"], None]


async def later(x: int):
    """Not called."""


def bare(a: dict, b: "typing.Nope"):
    """An annotation that is not there."""


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (later, "is an async function"),
        (bare, "signature of 'bare' cannot be read"),
        ({"name": "f", "parameters": {"properties": {"a": {"$ref": "#/$defs/x"}}}}, "refers to '#/\\$defs/x', which"),
        ({"name": "f", "parameters": {"properties": {"a": {"$ref": "#foo"}}}}, "refers to '#foo'"),
        ({"name": "f", "parameters": {"properties": {"a": {"default": {1}}}}}, "are no JSON"),
    ],
)
def test_more_that_is_no_tool(source, words):
    with pytest.raises(ToolSchemaError, match=words):
        tool_set([source])
    assert tool_set(None) == {}
    with pytest.raises(ToolSchemaError, match="wanted a list of tools"):
        tool_set(5)  # pyright: ignore


def test_of_alternatives_functiongemma_is_told_the_first():
    def pick(o: Literal["a", "b"] | None, n: int | list[int]):
        """Picks."""

    text = as_text(functiongemma.declarations(tool_set([pick]).values()))
    assert "o:{enum:[<escape>a<escape>,<escape>b<escape>],type:<escape>STRING<escape>}" in text
    assert "n:{type:<escape>INTEGER<escape>}" in text
    nested = {"type": "object", "description": "type:", "properties": {"a": {"type": "string"}}}
    tool = Tool("f", "", {"type": "object", "properties": {"o": nested}})
    assert "o:{description:<escape>type:<escape>,properties:{a:" in as_text(functiongemma.declarations([tool]))
