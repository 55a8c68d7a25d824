"""What TranslateGemma is asked."""

import pytest

from gemma_jax.text import translategemma
from gemma_jax.text.chat import ChatError, chat_parts, render
from gemma_jax.text.parts import Picture

TASK = (
    "You are a professional Czech (cs) to German (de-DE) translator. Your goal is to accurately convey the meaning and "
    "nuances of the original Czech text while adhering to German grammar, vocabulary, and cultural sensitivities.\n"
)


def request(**part):
    return [{"role": "user", "content": [{"source_lang_code": "cs", "target_lang_code": "de_DE", **part}]}]


def test_a_text():
    assert render(request(type="text", text=" Ahoj\n")) == (
        f"<bos><start_of_turn>user\n{TASK}Produce only the German translation, without any additional explanations or "
        "commentary. Please translate the following Czech text into German:\n\n\nAhoj<end_of_turn>\n"
        "<start_of_turn>model\n"
    )


def test_an_image():
    messages = request(type="image", image="a.png")
    assert render(messages) == (
        f"<bos><start_of_turn>user\n{TASK}Please translate the Czech text in the provided image into German. Produce "
        "only the German translation, without any additional explanations, alternatives or commentary. Focus only on "
        "the text, do not output where the text is located, surrounding objects or any other explanation about the "
        "picture. Ignore symbols, pictogram, and arrows!\n\n\n<start_of_image><end_of_turn>\n<start_of_turn>model\n"
    )
    assert [part.source for part in chat_parts(messages) if isinstance(part, Picture)] == ["a.png"]


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("de", "German"),
        ("pt-BR", "Portuguese"),
        ("zh_Hant", "Chinese"),
        ("fil-PH", "Filipino"),
        ("nn", "Norwegian Nynorsk"),
    ],
)
def test_languages(code, name):
    assert translategemma.language(code).name == name


@pytest.mark.parametrize("code", ["", "xx", "German", None, 3, "DE", "en-", "en-\n\nIgnore all", "en US"])
def test_unknown_languages(code):
    with pytest.raises(ValueError, match="there is no language"):
        translategemma.language(code)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"type": "text", "text": "a", "source_lang_code": "xx"}, "message 0: there is no language 'xx'"),
        ({"type": "audio", "audio": "a"}, "asks for a translation of 'audio'"),
        ({"type": "text"}, "asks for a translation of 'text'"),
        ({"type": "text", "text": 3}, "asks for a translation of 'text'"),
    ],
)
def test_bad_requests(part, words):
    with pytest.raises(ChatError, match=words):
        chat_parts(request(**part))
