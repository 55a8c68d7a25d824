"""Ids to text as they come, never half a character."""

import codecs
from collections.abc import Iterable

from gemma_jax.text.tokenizer import Tokenizer


class StreamDecoder:
    """All it gives, put together, is `tokenizer.decode` of all ids; a character is held back until it is whole.

    A row of a model's table beyond the vocabulary stands for no token; it is shown as U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Iterable[int]) -> str:
        """The text that is certain now."""
        return self._decoder.decode(b"".join(map(self._bytes_of, ids)))

    def _bytes_of(self, token: int) -> bytes:
        is_padding = token >= self._tokenizer.vocab_size
        return "\ufffd".encode() if is_padding else self._tokenizer.bytes_of(token)

    def finish(self) -> str:
        """What was held back; U+FFFD for a character that never became whole."""
        return self._decoder.decode(b"", final=True)
