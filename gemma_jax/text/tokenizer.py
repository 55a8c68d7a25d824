"""Text to ids and back. SentencePiece does the encoding; user text never becomes a control token."""

import dataclasses
import functools
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from google.protobuf.message import DecodeError
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # pyright: ignore[reportAttributeAccessIssue]

from gemma_jax.text.vocabulary import (
    BOS,
    END_OF_TURN,
    EOS,
    FUNCTION_RESPONSE,
    PAD,
    SPACE,
    UNKNOWN,
    PieceType,
    TokenizerError,
    Vocabulary,
    gguf_vocabulary,
    huggingface_vocabulary,
    serialise,
)


class Tokenizer:
    """Gemma's tokenizer: SentencePiece BPE with byte fallback, 262,144 pieces.

    There are two processors. Text of users is encoded by one in which all control-like pieces are unused, so that
    `<start_of_turn>` typed by a user is seven ordinary tokens; the other one, for templates, matches them.
    """

    def __init__(self, vocabulary: Vocabulary):
        self.vocabulary, self._pieces, self._types = vocabulary, vocabulary.pieces, vocabulary.types
        self.control_ids = vocabulary.control()
        self.pad_id, self.eos_id, self.bos_id, self.unk_id, self.end_of_turn_id = map(
            self.id_of, (PAD, EOS, BOS, UNKNOWN, END_OF_TURN)
        )

    @functools.cached_property
    def _plain(self) -> SentencePieceProcessor:
        """Made when first asked for, as the other: 50 MiB and a quarter of a second, and ids alone need neither."""
        unmatched = [i for i in self.control_ids.values() if self._types[i] == PieceType.USER_DEFINED]
        return SentencePieceProcessor(model_proto=serialise(self.vocabulary, unmatched))

    @functools.cached_property
    def _with_control(self) -> SentencePieceProcessor:
        """For templates given as text; chats do without it."""
        types = np.array(self._types)
        types[list(self.control_ids.values())] = PieceType.USER_DEFINED
        types[self._pieces.index(UNKNOWN)] = PieceType.UNKNOWN
        return SentencePieceProcessor(model_proto=serialise(dataclasses.replace(self.vocabulary, types=types)))

    @classmethod
    def from_sentencepiece(cls, model: str | os.PathLike | bytes) -> "Tokenizer":
        """From a tokenizer.model, as a path or its bytes. Raises TokenizerError unless it is a BPE model of Gemma's."""
        data = model if isinstance(model, bytes) else Path(model).read_bytes()
        proto = ModelProto()
        try:
            proto.ParseFromString(data)
        except DecodeError:
            raise TokenizerError("this is not a SentencePiece model") from None
        if proto.trainer_spec.model_type != proto.trainer_spec.BPE:
            raise TokenizerError("this SentencePiece model is not a BPE; Gemma's is")
        pieces = [piece.piece for piece in proto.pieces]
        scores = np.array([piece.score for piece in proto.pieces], np.float32)
        types = np.array([piece.type for piece in proto.pieces], np.uint8)
        return cls(Vocabulary(pieces, scores, types))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, object]) -> "Tokenizer":
        """From the `tokenizer.ggml.*` keys of a GGUF file; what its writer changed is repaired."""
        return cls(gguf_vocabulary(metadata))

    @classmethod
    def from_huggingface(cls, tokenizer: str | os.PathLike | Mapping) -> "Tokenizer":
        """From a tokenizer.json, as a path or its parsed data."""
        if isinstance(tokenizer, Mapping):
            return cls(huggingface_vocabulary(tokenizer))
        try:
            data = json.loads(Path(tokenizer).read_bytes())
        except (ValueError, RecursionError) as error:
            raise TokenizerError(f"{tokenizer} is not JSON: {error}") from None
        return cls(huggingface_vocabulary(data))

    @classmethod
    def from_folder(cls, folder: str | os.PathLike) -> "Tokenizer | None":
        """From a folder's tokenizer.model, else its tokenizer.json; None if it has neither."""
        folder = Path(folder)
        if (model := folder / "tokenizer.model").exists():
            return cls.from_sentencepiece(model)
        data = folder / "tokenizer.json"
        return cls.from_huggingface(data) if data.exists() else None

    @property
    def vocab_size(self) -> int:
        """Number of pieces; ids run from 0 to this minus 1."""
        return len(self._pieces)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """`<eos>`, `<end_of_turn>`, and what FunctionGemma writes behind its calls, where the vocabulary has it."""
        awaits = self.control_ids.get(FUNCTION_RESPONSE)
        return self.eos_id, self.end_of_turn_id, *(() if awaits is None else (awaits,))

    def encode(self, text: str, *, bos: bool = True, control: bool = False) -> list[int]:
        """The ids of a text.

        Args:
            bos: put `<bos>` in front, as every Gemma sequence must have it.
            control: let `<start_of_turn>` and its like in the text become control tokens. For text of your own only:
                with text of others it is prompt injection.

        Raises: ValueError for text that is not valid Unicode (lone surrogates).
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the text has a lone surrogate {text[error.start]!r} at place {error.start}, which no UTF-8 can hold"
            ) from None
        ids: list[int] = (self._with_control if control else self._plain).encode(text)
        return [self.bos_id, *ids] if bos else ids

    def decode(self, ids: Iterable[int], *, skip_control: bool = False) -> str:
        """The text of ids; bytes that are no UTF-8 become U+FFFD. `skip_control` leaves control tokens out."""
        hidden = set(self.control_ids.values()) if skip_control else ()
        return b"".join(self.bytes_of(i) for i in ids if i not in hidden).decode(errors="replace")

    def bytes_of(self, token: int) -> bytes:
        """The bytes that a token stands for: UTF-8, or part of a character for byte pieces."""
        piece = self.piece(token)
        if self._types[token] == PieceType.BYTE:
            return bytes([int(piece[3:-1], 16)])
        return piece.replace(SPACE, " ").encode()

    def piece(self, token: int) -> str:
        """The piece of an id as SentencePiece writes it. Raises ValueError for an id outside the vocabulary."""
        if not 0 <= token < len(self._pieces):
            raise ValueError(f"there is no token {token}; ids run from 0 to {len(self._pieces) - 1}")
        return self._pieces[token]

    def id_of(self, piece: str) -> int:
        """The id of a piece, control or not. Raises ValueError if there is none."""
        if (found := self.control_ids.get(piece)) is not None:
            return found
        found = self._plain.piece_to_id(piece)
        if found == self.unk_id:
            raise ValueError(f"the vocabulary has no piece {piece!r}")
        return found
