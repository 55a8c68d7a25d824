"""The vocabulary as data, read from a GGUF file or a tokenizer.json, and written as a SentencePiece model.

SentencePiece does the encoding; what differs between files is only how pieces, scores and types are stored. The repairs
that a GGUF needs are made here (gemma3.md section 6.1), and here it is decided which pieces are control-like.
"""

import collections
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # pyright: ignore[reportAttributeAccessIssue]

SPACE = "\u2581"  # SentencePiece writes a space as this character, so that a piece never holds a real space


class PieceType(IntEnum):
    """The values of SentencePiece's `ModelProto.SentencePiece.Type`, which GGUF's `token_type` shares."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


PAD, EOS, BOS, UNKNOWN, END_OF_TURN = "<pad>", "<eos>", "<bos>", "<unk>", "<end_of_turn>"
FUNCTION_RESPONSE = "<start_function_response>"  # FunctionGemma ends with it when it has called

_HTML_TAGS = (
    "table|caption|thead|tbody|tfoot|tr|th|td|h1|h2|h3|h4|h5|h6|blockquote|strong|em|b|i|u|s|sub|"
    "sup|code|a|html|body|img|span|bbox|ul|li|div|iframe|footer"
)
# User-defined pieces that are ordinary text: runs of one white space character, and the HTML tags of ids 168..237.
# Everything else user-defined counts as control, so that a piece nobody thought of is closed to user text, not open.
_TEXT_PIECE = re.compile(rf"\n+|\t+|{SPACE}+|</?(?:{_HTML_TAGS})>")

_LONGEST_PIECE = (1 << 14) - 1 - 16  # bytes; `serialise` writes lengths as varints of two bytes


class TokenizerError(ValueError):
    """A file that should hold a Gemma tokenizer does not."""


def is_control_like(piece: str, kind: int) -> bool:
    """True for a piece that only a template may produce: `<bos>`, `<start_of_turn>`, `<unused7>`, `[multimodal]`, ...

    6,248 user-defined pieces of Gemma 3's vocabulary are control-like, besides `<pad> <eos> <bos> <unk>`.
    """
    if kind == PieceType.USER_DEFINED:
        return _TEXT_PIECE.fullmatch(piece) is None
    return kind in (PieceType.CONTROL, PieceType.UNKNOWN)


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Pieces by id, as SentencePiece would store them."""

    pieces: Sequence[str]
    scores: np.ndarray  # [V] float32; of two possible merges the one whose result has the higher score is made first
    types: np.ndarray  # [V] uint8, PieceType

    def __post_init__(self) -> None:
        _check_sizes(self.pieces, self.scores, self.types)
        if unknown := set(np.unique(self.types).tolist()) - set(PieceType):
            raise TokenizerError(f"the vocabulary has piece types {sorted(unknown)}; SentencePiece knows 1 to 6")
        bytes_found = {self.pieces[i] for i in np.flatnonzero(self.types == PieceType.BYTE).tolist()}
        if bytes_found != {f"<0x{byte:02X}>" for byte in range(256)}:
            raise TokenizerError(
                f"the vocabulary has {len(bytes_found)} byte pieces, or others than <0x00> to <0xFF>; Gemma's "
                "has these, for byte fallback"
            )
        if "" in self.pieces:
            raise TokenizerError(f"the piece of id {self.pieces.index('')} is empty")
        # UTF-8 takes at most 4 bytes a character
        sizes = [len(piece.encode()) for piece in self.pieces if len(piece) > _LONGEST_PIECE // 4]
        if (longest := max(sizes, default=0)) > _LONGEST_PIECE:
            raise TokenizerError(f"a piece has {longest} bytes; the longest that is taken here has {_LONGEST_PIECE}")
        if len(set(self.pieces)) < len(self.pieces):
            twice = collections.Counter(self.pieces).most_common(1)[0][0]
            raise TokenizerError(f"the vocabulary has the piece {twice!r} twice; ids must be unique")
        for name in (PAD, EOS, BOS, UNKNOWN, END_OF_TURN):
            if name not in self.pieces:
                raise TokenizerError(f"the vocabulary has no piece {name!r}; this is not a Gemma tokenizer")

    def control(self) -> dict[str, int]:
        """The id of every control-like piece."""
        special = (PieceType.CONTROL, PieceType.UNKNOWN, PieceType.USER_DEFINED)
        ids = np.flatnonzero(np.isin(self.types, special)).tolist()
        return {self.pieces[i]: i for i in ids if is_control_like(self.pieces[i], self.types[i])}


def gguf_vocabulary(metadata: Mapping[str, object]) -> Vocabulary:
    """Reads the `tokenizer.ggml.*` keys of a GGUF file and undoes what its writer changed.

    - Runs of spaces are stored with real spaces; SentencePiece looks for runs of U+2581, and without them indented code
      falls apart into single spaces.
    - User-defined pieces are partly marked CONTROL, and those that are not NORMAL have score -1000. A NORMAL piece may
      have just this score by right (id 1494 of Gemma 3 does).
    - `<unk>` is marked CONTROL.
    Source: ecosystem.md section 4.1, measured against the official model file.
    """
    if (model := metadata.get("tokenizer.ggml.model")) != "llama":
        raise TokenizerError(f"tokenizer.ggml.model is {model!r}; a Gemma GGUF has 'llama', a SentencePiece vocabulary")
    names = ("tokens", "scores", "token_type")
    if missing := [name for name in names if f"tokenizer.ggml.{name}" not in metadata]:
        raise TokenizerError(f"the GGUF metadata has no {', '.join(f'tokenizer.ggml.{name}' for name in missing)}")
    tokens, scores, types = (metadata[f"tokenizer.ggml.{name}"] for name in names)
    pieces = [str(piece) for piece in _sequence(tokens, "tokenizer.ggml.tokens")]
    try:
        scores = np.array(_sequence(scores, "tokenizer.ggml.scores"), np.float32)
        types = np.array(_sequence(types, "tokenizer.ggml.token_type"), np.uint8)
    except (ValueError, OverflowError):
        raise TokenizerError(
            "tokenizer.ggml.scores or tokenizer.ggml.token_type holds other things than numbers"
        ) from None
    _check_sizes(pieces, scores, types)
    for i in np.flatnonzero(types == PieceType.CONTROL).tolist():
        types[i] = _special_type(pieces[i], PieceType.USER_DEFINED)
    for i in np.flatnonzero(types == PieceType.USER_DEFINED).tolist():
        if " " in pieces[i]:
            pieces[i] = pieces[i].replace(" ", SPACE)
    scores[types != PieceType.NORMAL] = 0.0
    return Vocabulary(pieces, scores, types)


def gguf_metadata(vocabulary: Vocabulary) -> dict[str, object]:
    """The `tokenizer.ggml.*` keys that llama.cpp wants: the inverse of `gguf_vocabulary`, with its writer's changes.

    Control-like pieces are marked CONTROL, so that llama.cpp too keeps them out of plain text.
    """
    types = vocabulary.types.astype(np.int32)
    control = vocabulary.control()
    types[list(control.values())] = PieceType.CONTROL
    types[control[UNKNOWN]] = PieceType.UNKNOWN
    user_defined = set(np.flatnonzero(vocabulary.types == PieceType.USER_DEFINED).tolist())
    tokens = [p.replace(SPACE, " ") if i in user_defined else p for i, p in enumerate(vocabulary.pieces)]
    is_plain = np.isin(vocabulary.types, (PieceType.NORMAL, PieceType.BYTE))
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.where(is_plain, vocabulary.scores, np.float32(-1000)).astype(np.float32),
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": control[BOS],
        "tokenizer.ggml.eos_token_id": control[EOS],
        "tokenizer.ggml.eot_token_id": control[END_OF_TURN],
        "tokenizer.ggml.unknown_token_id": control[UNKNOWN],
        "tokenizer.ggml.padding_token_id": control[PAD],
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
    }


def huggingface_vocabulary(data: Mapping) -> Vocabulary:
    """Reads the data of a tokenizer.json (format of the `tokenizers` library); merges in order become scores.

    Added tokens beyond the model's own vocabulary (`<image_soft_token>`, id 262144) are outside SentencePiece's model
    and are left out.
    """
    model = data.get("model") if isinstance(data, Mapping) else None
    if not isinstance(model, Mapping) or model.get("type") != "BPE" or not model.get("byte_fallback"):
        raise TokenizerError("tokenizer.json: the model is not a BPE with byte fallback; this is not a Gemma tokenizer")
    ids, merges, added = model.get("vocab"), model.get("merges"), data.get("added_tokens", [])
    if not isinstance(ids, Mapping) or not all(type(i) is int for i in ids.values()):
        raise TokenizerError("tokenizer.json: model.vocab is no object from pieces to ids")
    if not isinstance(merges, list) or not all(map(_is_merge, merges)):
        raise TokenizerError('tokenizer.json: model.merges is no list of "left right" or ["left", "right"]')
    if not isinstance(added, list) or not all(map(_is_added_token, added)):
        raise TokenizerError("tokenizer.json: added_tokens is no list of objects with id and content")
    pieces = sorted(ids, key=ids.__getitem__)
    if [ids[piece] for piece in pieces] != list(range(len(pieces))):
        raise TokenizerError(f"tokenizer.json: the ids of model.vocab are not 0 to {len(pieces) - 1}, each once")
    types = np.full(len(pieces), PieceType.NORMAL, np.uint8)
    for token in added:
        if token["id"] < len(pieces):
            types[token["id"]] = _special_type(token["content"], PieceType.USER_DEFINED)
    for byte in range(256):
        if (i := ids.get(f"<0x{byte:02X}>")) is not None:
            types[i] = PieceType.BYTE
    scores = _merge_scores(ids, merges)
    scores[types != PieceType.NORMAL] = 0.0
    return Vocabulary(pieces, scores, types)


def serialise(vocabulary: Vocabulary, unmatched: Iterable[int] = ()) -> bytes:
    """A SentencePiece model file of this vocabulary, with the pieces `unmatched` made UNUSED: text never yields them.

    Written with numpy in protobuf's wire format, 0.1 s instead of 1 s for Gemma's 262,144 pieces. Per piece: tag and
    length of the message, tag and length of the text, text, tag and float of the score, tag and varint of the type.
    Source: sentencepiece_model.proto; protobuf.dev/programming-guides/encoding.
    """
    text = np.frombuffer("".join(vocabulary.pieces).encode(), np.uint8)
    character = np.append(np.flatnonzero((text & 0xC0) != 0x80), len(text))  # byte offset of each character
    ends = character[np.cumsum(np.fromiter(map(len, vocabulary.pieces), np.int64, len(vocabulary.pieces)))]
    lengths = np.diff(ends, prepend=0)
    types = vocabulary.types.copy()
    types[list(unmatched)] = PieceType.UNUSED
    head, tail = 6, 7  # bytes before and after each text
    stops = ends + (head + tail) * np.arange(1, len(lengths) + 1)
    starts = stops - lengths - head - tail
    out = np.empty(stops[-1], np.uint8)
    is_text = np.ones(len(out), bool)
    message = lengths + tail + 3
    columns: list[tuple[np.ndarray, tuple]] = [(starts, (0x0A, *_varint(message), 0x0A, *_varint(lengths)))]
    score_bytes = vocabulary.scores.astype("<f4").view(np.uint8).reshape(-1, 4).T
    columns.append((stops - tail, (0x15, *score_bytes, 0x18, types)))
    for first, values in columns:
        for offset, value in enumerate(values):
            out[first + offset] = value
            is_text[first + offset] = False
    out[is_text] = text
    return out.tobytes() + _specification(vocabulary).SerializeToString()


def _varint(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both bytes of each value below 2**14 as a varint; protobuf takes a value below 128 in two bytes as well."""
    return (values & 0x7F) | 0x80, values >> 7


def _specification(vocabulary: Vocabulary) -> ModelProto:
    """Everything but the pieces: BPE, byte fallback, only a space is rewritten (to U+2581), nothing is trimmed."""
    proto = ModelProto()
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    trainer.model_type = trainer.BPE
    trainer.vocab_size = len(vocabulary.pieces)
    trainer.byte_fallback = trainer.split_digits = trainer.allow_whitespace_only_pieces = True
    # the pieces are named too: SentencePiece looks the ids up by name, and its own name for eos, </s>, is an HTML tag
    trainer.pad_piece, trainer.eos_piece, trainer.bos_piece, trainer.unk_piece = PAD, EOS, BOS, UNKNOWN
    index = vocabulary.pieces.index
    trainer.pad_id, trainer.eos_id, trainer.bos_id, trainer.unk_id = index(PAD), index(EOS), index(BOS), index(UNKNOWN)
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True
    return proto


def _check_sizes(pieces: Sequence[str], scores: np.ndarray, types: np.ndarray) -> None:
    if not len(pieces) == len(scores) == len(types):
        raise TokenizerError(f"the vocabulary has {len(pieces)} pieces, {len(scores)} scores and {len(types)} types")


def _special_type(piece: str, otherwise: PieceType) -> PieceType:
    if piece == UNKNOWN:
        return PieceType.UNKNOWN
    return PieceType.CONTROL if piece in (PAD, EOS, BOS) else otherwise


def _is_merge(merge: object) -> bool:
    if isinstance(merge, str):
        return True
    return isinstance(merge, list) and len(merge) == 2 and all(isinstance(part, str) for part in merge)


def _is_added_token(token: object) -> bool:
    if not isinstance(token, Mapping):
        return False
    return type(token.get("id")) is int and token["id"] >= 0 and isinstance(token.get("content"), str)


def _merge_scores(ids: Mapping[str, int], merges: Iterable) -> np.ndarray:
    """[V] float32: minus the place of the first merge that makes the piece; pieces no merge makes come last."""
    scores = np.full(len(ids), -(2.0**24), np.float32)
    for place, merge in enumerate(merges):
        # older files write a merge as "left right", newer ones as ["left", "right"]
        piece = merge.replace(" ", "", 1) if isinstance(merge, str) else merge[0] + merge[1]
        if (i := ids.get(piece)) is None:
            raise TokenizerError(f"tokenizer.json: merge {place} makes {piece!r}, which is not in model.vocab")
        if scores[i] == -(2.0**24):
            scores[i] = -place
    return scores


def _sequence(value: object, name: str) -> Sequence | np.ndarray:
    if isinstance(value, Sequence | np.ndarray) and not isinstance(value, str | bytes):
        return value
    raise TokenizerError(f"{name} is {type(value).__name__}; an array is wanted")
