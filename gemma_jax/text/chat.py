"""Gemma 3's chat template, in Python: a template from a file would be code of strangers (gemma3.md section 7)."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from gemma_jax.text import parts, translategemma
from gemma_jax.text.parts import Control, Film, Item, Medium, Picture, Sound
from gemma_jax.text.tokenizer import Tokenizer

START, END, BOS, IMAGE = "<start_of_turn>", "<end_of_turn>", "<bos>", "<start_of_image>"
AUDIO = "<start_of_audio>"
_CALLED = {Picture: "an image", Sound: "sound", Film: "a video"}
_SHOWN = {Picture: IMAGE, Sound: AUDIO, Film: "<video>"}
ROLES = {"user": "user", "assistant": "model", "model": "model"}


class ChatError(ValueError):
    """Messages that are no conversation Gemma knows."""


def render(messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
    """The conversation as one text with literal control tokens. For reading; encode with `encode_chat`."""
    return as_text(chat_parts(messages, add_generation_prompt))


def as_text(prompt: Iterable[Item]) -> str:
    """A prompt for reading."""
    shown = (_SHOWN.get(type(part)) or getattr(part, "piece", part) for part in prompt)
    return "".join(map(str, shown))


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
) -> list[int]:
    """The ids of a conversation of text alone, `<bos>` included.

    Control tokens come from the template alone: text of users never becomes one.

    Raises: ChatError for unknown roles, roles out of order, content that is neither text nor parts, images, sound.
    """
    prompt = chat_parts(messages, add_generation_prompt)
    for part in prompt:
        if isinstance(part, Medium):
            raise ChatError(f"a message has {_CALLED[type(part)]}; `Gemma.chat` takes it, ids alone cannot hold it")
    return parts.encode(tokenizer, prompt)  # pyright: ignore[reportArgumentType]


def chat_parts(messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> list[Item]:
    """The conversation in parts, images and sound where they stand. Raises ChatError as `encode_chat`."""
    prompt: list[Item] = [Control(BOS)]
    for role, content in _turns(messages):
        prompt += turn(role, content)
    return [*prompt, Control(START), "model\n"] if add_generation_prompt else prompt


def turn(role: str, content: Iterable[Item]) -> list[Item]:
    """One turn; `role` is "user" or "model"."""
    return [Control(START), f"{role}\n", *content, Control(END), "\n"]


def _turns(messages: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[Item]]]:
    """(role, content) of every turn; a leading system message is put in front of the first one, untrimmed."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ChatError("messages is empty or not a list; wanted at least one {'role': 'user', 'content': ...}")
    prefix, first = [], 0
    if _role(messages[0], 0) == "system":
        prefix, first = [system_text(messages[0]) + "\n\n"], 1
    if len(messages) == first:
        raise ChatError("there is only a system message; a user message must follow")
    for i, message in enumerate(messages[first:]):
        role = ROLES.get(_role(message, first + i), "system")
        wanted = ("user", "model")[i % 2]
        if role != wanted:
            raise ChatError(
                f"message {first + i} has role {message['role']!r}; turns alternate between user and assistant, begin "
                f"with user, and only the first message may be system, so {'assistant' if i % 2 else 'user'} was wanted"
            )
        yield role, [*(prefix if i == 0 else ()), *content_parts(message["content"], first + i)]


def content_parts(content: Any, at: int) -> list[Item]:
    """A message's content: each text trimmed, nothing between them, images and sound in their places.

    `{"type": "image", "image": ...}` holds what `media.images.read` takes; OpenAI's `image_url` a data URL;
    `{"type": "audio", "audio": ...}` what `media.audio.read` takes, OpenAI's `input_audio` base64 and its format;
    `{"type": "video", "video": ...}` what `media.video.read` takes. A text or image with `source_lang_code` and
    `target_lang_code` is a request to TranslateGemma. Raises ChatError for other parts and unknown languages; `at` is
    the message's number.
    """
    if isinstance(content, str):
        return [content.strip()]
    found: list[Item] = []
    for part in _content_list(content, at):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(part, Mapping) and translategemma.KEYS & set(part):
            found += _translation(part, at)
        elif kind == "text" and isinstance(part.get("text"), str):
            found.append(part["text"].strip())
        elif kind == "image" and part.get("image") is not None:
            found.append(Picture(part["image"]))
        elif kind == "image_url":
            found.append(Picture(_data_url(part.get("image_url"), at)))
        elif kind == "audio" and part.get("audio") is not None:
            found.append(Sound(part["audio"]))
        elif kind == "input_audio":
            found.append(Sound(_input_audio(part.get("input_audio"), at)))
        elif kind == "video" and part.get("video") is not None:
            found.append(Film(part["video"]))
        else:
            raise ChatError(
                f"message {at} has a part of type {kind!r}; wanted {{'type': 'text', 'text': ...}}, {{'type': 'image', "
                "'image': ...}, 'audio' and 'video' likewise, {'type': 'image_url', 'image_url': {'url': "
                "'data:image/...'}} or {'type': 'input_audio', 'input_audio': {'data': ..., 'format': 'wav'}}"
            )
    return found


def _translation(part: Mapping[str, Any], at: int) -> list[Item]:
    try:
        languages = [translategemma.language(part.get(key)) for key in ("source_lang_code", "target_lang_code")]
    except ValueError as error:
        raise ChatError(f"message {at}: {error}") from None
    kind = part.get("type")
    if kind == "text" and isinstance(part.get("text"), str):
        return [translategemma.of_text(part["text"], *languages)]
    if kind == "image" and part.get("image") is not None:
        return [translategemma.of_image(*languages), Picture(part["image"])]
    raise ChatError(f"message {at} asks for a translation of {kind!r}; wanted a text, under 'text', or an image")


def _data_url(value: Any, at: int) -> str:
    """Of a request that may come from others, so no path."""
    url = value.get("url") if isinstance(value, Mapping) else value
    if not isinstance(url, str) or not url.startswith("data:"):
        raise ChatError(
            f"message {at} has the image_url {str(url)[:60]!r}; wanted a data URL, data:image/...;base64,... (a file "
            "is given as {'type': 'image', 'image': path})"
        )
    return url


def _input_audio(value: Any, at: int) -> Mapping[str, Any]:
    """Of a request that may come from others, so no path."""
    if not isinstance(value, Mapping) or not isinstance(value.get("data"), str):
        raise ChatError(f"message {at} has an input_audio without data; wanted {{'data': base64, 'format': 'wav'}}")
    return value


def _content_list(content: Any, at: int) -> Sequence[Any]:
    if not isinstance(content, Sequence) or isinstance(content, bytes | bytearray):
        raise ChatError(f"message {at} has content {content!r}; wanted a text or a list of parts")
    return content


def _role(message: Any, at: int) -> str:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
        raise ChatError(f"message {at} is {message!r}; wanted an object with role and content")
    if message["role"] not in (*ROLES, "system"):
        raise ChatError(f"message {at} has role {message['role']!r}; wanted user, assistant or system")
    return message["role"]


def system_text(message: Mapping[str, Any]) -> str:
    """What a system message says, untrimmed. Raises ChatError for anything but text."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    found = _content_list(content, 0)
    for part in found:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ChatError(f"the system message has the part {part!r}; wanted {{'type': 'text', 'text': ...}} only")
    return "".join(part["text"] for part in found)  # the reference takes the first and loses the others
