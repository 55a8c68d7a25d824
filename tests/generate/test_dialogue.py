"""Conversations with tools through a whole model, whose logits are patched so that it says what a script wants."""

import dataclasses
import json

import numpy as np
import pytest
from flax import nnx

import gemma_jax as gj
from gemma_jax import interp
from gemma_jax.generate import dialogue
from gemma_jax.text import parts
from gemma_jax.text.chat import ChatError, encode_chat, render
from gemma_jax.text.parts import Control
from gemma_jax.text.tokenizer import Tokenizer
from gemma_jax.tools import functiongemma, prompted
from gemma_jax.tools.calls import ToolCall
from gemma_jax.tools.forms import FunctionGemma, Prompted, form_of
from gemma_jax.tools.schema import Tool, ToolSchemaError
from tests.vocabulary import PIECES, huggingface_data

FUNCTION_TOKENS = [
    *(f"<{end}_function_{what}>" for what in ("declaration", "call", "response") for end in ("start", "end")),
    "<escape>",
]
CONTEXT = 4096


def tokenizer(extra=()):
    data = huggingface_data()
    first = len(PIECES)
    added = [token for token in data["added_tokens"] if token["content"] != "<image_soft_token>"]
    added += [{"id": first + i, "content": piece, "special": True} for i, piece in enumerate(extra)]
    vocab = {**data["model"]["vocab"], **{piece: first + i for i, piece in enumerate(extra)}}
    return Tokenizer.from_huggingface({"model": {**data["model"], "vocab": vocab}, "added_tokens": added})


def model(make_config, extra=()):
    vocabulary = tokenizer(extra)
    config = dataclasses.replace(make_config("chatty", vocabulary.vocab_size, num_layers=2), context=CONTEXT)
    return gj.Gemma(config, gj.Decoder(config, rngs=nnx.Rngs(0)), vocabulary)


@pytest.fixture(scope="module")
def gemma(make_config):
    return model(make_config)


@pytest.fixture(scope="module")
def function_gemma(make_config):
    return model(make_config, FUNCTION_TOKENS)


def script(gemma, rounds, messages, tools, form):
    """An edit under which the model says what it should. A round is what it says, a text or all parts of it, and the
    messages that come of it."""
    logits = np.zeros((1, CONTEXT, gemma.config.vocab_size), np.float32)
    before = list(messages)
    for reply, after in rounds:
        start = len(parts.encode(gemma.tokenizer, form.prompt(before, tools))) - 1
        said = [reply, Control("<end_of_turn>")] if isinstance(reply, str) else reply
        ids = parts.encode(gemma.tokenizer, said)
        logits[0, np.arange(start, start + len(ids)), ids] = 9.0
        before += after
    return interp.Patch("logits", logits)


def weather(city: str, days: int = 1):
    """The weather of a city.

    Args:
        city: its name.
    """
    if city == "atlantis":
        raise KeyError("it sank")
    return {"city": city, "days": days}


ASK = [{"role": "user", "content": "hello"}]


def called(id_, name, arguments):
    body = {"name": name, "arguments": json.dumps(arguments)}
    return {"id": id_, "type": "function", "function": body}


def told(id_, name, result):
    return {"role": "tool", "tool_call_id": id_, "name": name, "content": json.dumps(result)}


def assistant(*calls):
    return {"role": "assistant", "content": None, "tool_calls": list(calls)}


@pytest.mark.parametrize(
    ("form", "call"),
    [
        ("python", "[weather(city='hi'), weather(city='atlantis', days=2)]"),
        (
            "json",
            '[{"name": "weather", "parameters": {"city": "hi"}}, '
            '{"name": "weather", "parameters": {"city": "atlantis", "days": 2}}]',
        ),
    ],
)
def test_parallel_calls_run_and_a_tool_that_raises_is_told(gemma, form, call):
    error = {"error": {"kind": "failed", "message": "weather failed: KeyError: 'it sank'"}}
    asked = [
        assistant(
            called("call_0", "weather", {"city": "hi"}), called("call_1", "weather", {"city": "atlantis", "days": 2})
        ),
        told("call_0", "weather", {"city": "hi", "days": 1}),
        told("call_1", "weather", error),
    ]
    edit = script(gemma, [(call, asked), ("the world", [])], ASK, [Tool.of(weather)], Prompted(form))
    done = gemma.chat(ASK, tools=[weather], tool_form=form, temperature=0.0, edits=[edit])
    assert done.text == "the world"
    assert (done.finish_reason, done.tool_calls, done.tool_error) == ("stop", None, None)
    assert done.messages == [*asked, {"role": "assistant", "content": "the world"}]


def test_the_conversation_goes_on_from_what_chat_added(gemma):
    asked = [
        assistant(called("call_0", "weather", {"city": "hi"})),
        told("call_0", "weather", {"city": "hi", "days": 1}),
    ]
    call = "[weather(city='hi')]"
    tools, form = [Tool.of(weather)], Prompted("python")
    first = gemma.chat(
        ASK, tools=[weather], temperature=0.0, edits=[script(gemma, [(call, asked), ("a", [])], ASK, tools, form)]
    )
    more = [*ASK, *first.messages, {"role": "user", "content": "hi"}]
    again = [
        assistant(called("call_1", "weather", {"city": "hi"})),
        told("call_1", "weather", {"city": "hi", "days": 1}),
    ]
    edit = script(gemma, [(call, again), ("b", [])], more, tools, form)
    done = gemma.chat(more, tools=[weather], temperature=0.0, edits=[edit])
    assert done.messages == [*again, {"role": "assistant", "content": "b"}]


def test_wrong_calls_are_told_and_can_be_mended(gemma):
    error = {"error": {"kind": "name", "message": "there is no tool 'wether'; did you mean weather? There are weather"}}
    named = [assistant(called("call_0", "wether", {"city": "hi"})), told("call_0", "wether", error)]
    broken = "[weather(city=open('x'))]"
    complaint = "weather(city) is no literal; wanted a text, a number, True, False, None, a list or a dict"
    told_broken = json.dumps({"error": {"kind": "arguments", "message": complaint}})
    replied = [
        {"role": "assistant", "content": broken},
        {"role": "user", "content": f"{told_broken}\nWrite the call again, or answer without one."},
    ]
    replies = [("[wether(city='hi')]", named), (broken, replied), ("hello", [])]
    edit = script(gemma, replies, ASK, [Tool.of(weather)], Prompted("python"))
    done = gemma.chat(ASK, tools=[weather], temperature=0.0, edits=[edit])
    assert done.messages == [*named, *replied, {"role": "assistant", "content": "hello"}]
    edit = script(gemma, replies[1:], ASK, [Tool.of(weather)], Prompted("python"))
    done = gemma.chat(ASK, tools=[weather], temperature=0.0, max_rounds=0, edits=[edit])
    assert (done.text, done.finish_reason, done.tool_calls) == (broken, "stop", None)
    assert done.tool_error.kind == "arguments"


def test_calls_of_tools_without_a_function_come_back(gemma):
    tool = {"type": "function", "function": Tool.of(weather).schema}
    edit = script(gemma, [("[weather(city='hi')]", [])], ASK, [Tool.of(tool)], Prompted("python"))
    done = gemma.chat(ASK, tools=[tool], temperature=0.0, edits=[edit])
    assert done.finish_reason == "tool_calls"
    assert [(call.id, call.name, call.arguments) for call in done.tool_calls] == [("call_0", "weather", {"city": "hi"})]
    assert done.messages == [assistant(called("call_0", "weather", {"city": "hi"}))]
    assert done.tool_error is None
    # without rounds, calls of functions come back too, and what is wrong with them
    edit = script(gemma, [("[weather(town='hi')]", [])], ASK, [Tool.of(weather)], Prompted("python"))
    done = gemma.chat(ASK, tools=[weather], max_rounds=0, temperature=0.0, edits=[edit])
    assert done.finish_reason == "tool_calls"
    assert done.tool_error.kind == "arguments"


def test_functiongemma_goes_on_in_its_turn(function_gemma):
    escape, (start, end), respond = functiongemma.ESCAPE, functiongemma.CALL, functiongemma.RESPONSE[0]
    reply = [start, "call:weather{city:", escape, "hi}", escape, "}", end, respond]
    asked = [
        assistant(called("call_0", "weather", {"city": "hi}"})),
        told("call_0", "weather", {"city": "hi}", "days": 1}),
    ]
    replies = [(reply, asked), (["a", Control("<end_of_turn>")], [])]
    edit = script(function_gemma, replies, ASK, [Tool.of(weather)], FunctionGemma())
    done = function_gemma.chat(ASK, tools=[weather], temperature=0.0, edits=[edit])
    assert done.messages == [*asked, {"role": "assistant", "content": "a"}]
    # the model's turn is one, and the token that it ended its calls with stands in it once
    ids = parts.encode(function_gemma.tokenizer, FunctionGemma().prompt([*ASK, *asked], [Tool.of(weather)]))
    assert done.prompt_tokens == len(ids)
    assert ids.count(function_gemma.tokenizer.id_of(respond.piece)) == 1
    assert ids.count(function_gemma.tokenizer.id_of("<start_of_turn>")) == 3  # developer, user, model
    assert function_gemma.stop_ids[2] == function_gemma.tokenizer.id_of(respond.piece)


def test_without_tools_it_is_the_plain_template(gemma, function_gemma):
    messages = [{"role": "system", "content": " be "}, *ASK, {"role": "assistant", "content": " a "}, *ASK]
    assert parts.encode(gemma.tokenizer, form_of(gemma.tokenizer).prompt(messages, [])) == encode_chat(
        gemma.tokenizer, messages
    )
    done = gemma.chat(messages, temperature=0.0, max_new_tokens=4)
    assert done.messages == [{"role": "assistant", "content": done.text}]
    streamed = "".join(piece.text for piece in gemma.stream_chat(messages, temperature=0.0, max_new_tokens=4))
    assert streamed == done.text
    assert isinstance(form_of(function_gemma.tokenizer), FunctionGemma)
    assert function_gemma.chat(ASK, temperature=0.0, max_new_tokens=4).prompt_tokens > 0


def test_instructions_stand_in_the_first_turn_behind_the_system_text(gemma):
    messages = [{"role": "system", "content": "S"}, *ASK]
    text = "".join(
        getattr(part, "piece", part) for part in prompted.conversation(messages, [Tool.of(weather)], "python")
    )
    assert text == render(
        [{"role": "user", "content": f"S\n\n{prompted.instructions([Tool.of(weather)], 'python')}\n\nhello"}]
    )


@pytest.mark.parametrize(("messages", "more", "error", "words"), [
    (ASK, {"tools": [weather, weather]}, ToolSchemaError, "two tools are called 'weather'"),
    (ASK, {"tools": [lambda x: x]}, ToolSchemaError, "is called '<lambda>'|annotation"),
    (ASK, {"tools": weather}, ToolSchemaError, "wanted a list of tools"),
    (ASK, {"tools": [{"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "strng"}}}}]},
     ToolSchemaError, "no valid JSON schema"),
    (ASK, {"max_rounds": -1}, ValueError, "max_rounds is -1"),
    (ASK, {"max_rounds": 1.5}, ValueError, "max_rounds is 1.5"),
    (ASK, {"tool_form": "xml"}, ValueError, "tool_form is 'xml'; wanted one of python, json, functiongemma"),
    (ASK, {"tool_form": "functiongemma"}, ValueError, "no <start_function_call>"),
    ([*ASK, told("call_0", "f", 1)], {}, ChatError, "message 1 has role 'tool'; wanted assistant here"),
    ([*ASK, assistant(called("c", "f", {}))], {}, ChatError, "end with an assistant's"),
    ([*ASK, assistant(called("c", "f", {})), {"role": "tool", "tool_call_id": "d", "content": "1"}], {}, ChatError,
     "message 2 is a tool's.*'d' one of the calls before \\(c\\)"),
    ([*ASK, assistant({"function": {}}), told("c", "f", 1)], {}, ValueError, "a tool call is"),
    ([{"role": "user"}], {}, ChatError, "message 0 has no content"),
    ([{"role": "system", "content": "a"}], {}, ChatError, "end with no user's"),
    ([{"role": "system"}, *ASK], {}, ChatError, "message 0 has content None"),
    ([*ASK, {"role": "assistant", "tool_calls": 5}, told("c", "f", 1)], {}, ChatError, "tool_calls is 5"),
    ([*ASK, assistant(called("c", "f", {})), {"role": "tool", "tool_call_id": ["c"], "content": "1"}], {}, ChatError,
     "message 2 is a tool's"),
    ([*ASK, assistant(called("c", "f", {})), {"role": "tool", "name": "f", "content": {1, 2}}], {}, ChatError,
     "message 2 is a tool's with a content that is no JSON"),
    ("hello", {}, ChatError, "messages is a str"),
    ([3], {}, ChatError, "message 0 has role None"),
])  # fmt: skip
def test_bad_input_is_named(gemma, messages, more, error, words):
    with pytest.raises(error, match=words):
        gemma.chat(messages, **more)


def test_results_by_name_by_id_and_in_functiongemmas_form(gemma):
    made = assistant(called("x", "f", {}), called("y", "g", {}))
    ways = [
        [{"role": "tool", "tool_call_id": "x", "content": "1"}, {"role": "tool", "name": "g", "content": "[2]"}],
        [{"role": "tool", "content": [{"name": "f", "response": 1}, {"name": "g", "response": [2]}]}],
    ]
    first, second = (prompted.conversation([*ASK, made, *way], [], "python") for way in ways)
    assert first == second
    assert '[{"name": "f", "result": 1}, {"name": "g", "result": [2]}]' in "".join(map(str, first))


def test_translate_is_a_greedy_chat(gemma):
    part = {"type": "text", "source_lang_code": "en", "target_lang_code": "de-AT", "text": "hello"}
    chat = gemma.chat([{"role": "user", "content": [part]}], temperature=0.0, max_new_tokens=5)
    assert gemma.translate("hello", source="en", target="de-AT", max_new_tokens=5) == chat.text
    both = gemma.translate(["hi", "hello"], source="en", target="de-AT", max_new_tokens=5)
    assert both[1] == chat.text
    assert gemma.translate([], source="en", target="de") == []
    with pytest.raises(ValueError, match="no language 'xx'"):
        gemma.translate("hello", source="en", target="xx")


def test_results_too_long_for_the_context_are_withheld(gemma):
    def flood(n: int):
        """Writes much."""
        return "a " * n

    told_it = told("call_0", "flood", dialogue.TOO_LONG.as_result())
    asked = [assistant(called("call_0", "flood", {"n": 5000})), told_it]
    edit = script(gemma, [("[flood(n=5000)]", asked), ("a", [])], ASK, [Tool.of(flood)], Prompted("python"))
    done = gemma.chat(ASK, tools=[flood], temperature=0.0, edits=[edit])
    assert done.messages == [*asked, {"role": "assistant", "content": "a"}]


def test_ids_of_calls_are_new():
    messages = [assistant(called("call_1", "f", {}), called("x", "g", {}))]
    found = dialogue._numbered([ToolCall("f", {}), ToolCall("g", {}), ToolCall("h", {})], messages, [])
    assert [call.id for call in found] == ["call_0", "call_2", "call_3"]


def test_edits_may_come_from_a_generator(gemma):
    with pytest.raises(ValueError, match="no site is called"):
        gemma.generate([2, 5], edits=(edit for edit in [interp.Scale("nosuch", 2.0)]))
