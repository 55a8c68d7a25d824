"""A tokenizer for the tiny model's 128 ids: one character each, and a few ids that are parts of a character."""

import pytest

PARTS = {100: b"\xe2", 101: b"\x98", 102: b"\x83"}  # together a snowman


class Characters:
    """What generation asks of a tokenizer."""

    vocab_size = 128

    def bytes_of(self, token: int) -> bytes:
        return PARTS.get(token, bytes([33 + token % 90]))

    def encode(self, text: str, *, bos: bool = True, control: bool = False) -> list[int]:
        return ([2] if bos else []) + [(ord(c) - 33) % 90 for c in text]

    def decode(self, ids, *, skip_control: bool = False) -> str:
        return b"".join(map(self.bytes_of, ids)).decode(errors="replace")


@pytest.fixture(scope="session")
def characters() -> Characters:
    return Characters()
