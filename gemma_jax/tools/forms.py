"""The forms in which models are offered tools and call them, behind one interface."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from gemma_jax.text import parts
from gemma_jax.text.parts import Item
from gemma_jax.text.tokenizer import Tokenizer
from gemma_jax.tools import functiongemma, prompted
from gemma_jax.tools.calls import ToolCall
from gemma_jax.tools.schema import Tool

NAMES = (*prompted.FORMS, "functiongemma")


class Form(Protocol):
    """How one family of models does it."""

    def prompt(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool]) -> Sequence[Item]:
        """The conversation up to where the model goes on; see `turns.read`."""
        ...

    def calls(self, text: str, tokens: Sequence[int], tokenizer: Tokenizer, names: Collection[str]) -> list[ToolCall]:
        """The calls of a reply, none if it is an answer; `names` are the tools'.

        Raises ToolCallError for one that cannot be read.
        """
        ...


@dataclass(frozen=True)
class Prompted:
    """Gemma 3's: instructions in the first user's turn, calls by the shape of the reply; "python" or "json"."""

    name: str

    def prompt(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool]) -> Sequence[Item]:
        """See `Form.prompt`."""
        return prompted.conversation(messages, tools, self.name)

    def calls(self, text: str, tokens: Sequence[int], tokenizer: Tokenizer, names: Collection[str]) -> list[ToolCall]:
        """See `Form.calls`."""
        return prompted.parse(text, self.name, names) or []


@dataclass(frozen=True)
class FunctionGemma:
    """FunctionGemma's own tokens."""

    def prompt(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool]) -> Sequence[Item]:
        """See `Form.prompt`."""
        return functiongemma.conversation(messages, tools)

    def calls(self, text: str, tokens: Sequence[int], tokenizer: Tokenizer, names: Collection[str]) -> list[ToolCall]:
        """See `Form.calls`."""
        return functiongemma.parse(parts.decode(tokenizer, tokens))


def form_of(tokenizer: Tokenizer, name: str | None = None) -> Form:
    """A form by its name; None: FunctionGemma's if the vocabulary has its tokens, else "python".

    Raises ValueError for another name, and FunctionGemma's form without its tokens.
    """
    has_tokens = functiongemma.CALL[0].piece in tokenizer.control_ids
    if name is None:
        name = "functiongemma" if has_tokens else "python"
    if name not in NAMES:
        raise ValueError(f"tool_form is {name!r}; wanted one of {', '.join(NAMES)}")
    if name != "functiongemma":
        return Prompted(name)
    if not has_tokens:
        raise ValueError(f"tool_form is {name!r}, but the vocabulary has no {functiongemma.CALL[0].piece}")
    return FunctionGemma()
