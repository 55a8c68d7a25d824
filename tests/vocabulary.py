"""A small vocabulary in the three forms that files have, and a plain slow encoder to compare with."""

import itertools
import json
import string
from typing import Any

from sentencepiece.sentencepiece_model_pb2 import ModelProto  # pyright: ignore[reportAttributeAccessIssue]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
SPACE = "\u2581"
FIXED = ["<pad>", "<eos>", "<bos>", "<unk>"]
CONTROL_LIKE = [
    "<mask>",
    "[multimodal]",
    "<unused0>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<start_of_image>",
    "<end_of_image>",
]
TEXT_PIECES = ["\n", "\n\n", "\n\n\n", SPACE * 2, SPACE * 3, "\t", "\t\t", "<h1>", "</h1>"]
BYTES = [f"<0x{i:02X}>" for i in range(256)]
CHARACTERS = [SPACE, *string.ascii_letters, *string.digits, *"<>_/.,!?:[]'\"-", *"éü日本語"]
MERGES = [
    ("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), (SPACE, "w"), ("o", "r"), (SPACE + "w", "or"), ("l", "d"),
    (SPACE + "wor", "ld"), ("u", "s"), ("e", "r"), ("us", "er"), ("m", "o"), ("d", "e"), ("mo", "de"), ("mode", "l"),
    ("h", "i"), ("t", "h"), (SPACE, "th"), (SPACE + "th", "e"), ("日", "本"), ("_", "o"), ("_o", "f"), ("a", "b"),
    ("b", "a"), ("ab", "ab"), ("s", "t"), ("t", "u"),
]  # fmt: skip
MERGED = [left + right for left, right in MERGES]
PIECES = [*FIXED, *CONTROL_LIKE, *TEXT_PIECES, *BYTES, *CHARACTERS, *MERGED]
SPECIAL = {*FIXED, *CONTROL_LIKE, *TEXT_PIECES}


def kind_of(piece: str) -> int:
    if piece in FIXED:
        return UNKNOWN if piece == "<unk>" else CONTROL
    if piece in SPECIAL:
        return USER_DEFINED
    return BYTE if piece in BYTES else NORMAL


def score_of(piece: str) -> float:
    return -float(MERGED.index(piece)) if piece in MERGED else -1000.0 if kind_of(piece) == NORMAL else 0.0


def sentencepiece_model() -> bytes:
    proto = ModelProto()
    for piece in PIECES:
        proto.pieces.add(piece=piece, score=score_of(piece), type=kind_of(piece))
    trainer = proto.trainer_spec
    trainer.model_type, trainer.byte_fallback, trainer.vocab_size = trainer.BPE, True, len(PIECES)
    trainer.pad_id, trainer.eos_id, trainer.bos_id, trainer.unk_id = 0, 1, 2, 3
    proto.normalizer_spec.add_dummy_prefix = proto.normalizer_spec.remove_extra_whitespaces = False
    return proto.SerializeToString()


def huggingface_data() -> dict[str, Any]:
    vocab = {piece: i for i, piece in enumerate(PIECES)}
    added = [{"id": vocab[piece], "content": piece, "special": piece in FIXED} for piece in PIECES if piece in SPECIAL]
    added.append({"id": len(PIECES), "content": "<image_soft_token>", "special": True})
    merges = [list(pair) for pair in MERGES]
    return {"model": {"type": "BPE", "byte_fallback": True, "vocab": vocab, "merges": merges}, "added_tokens": added}


def transformers_tokenizer(data: dict[str, Any]) -> Any:
    """transformers' own tokenizer of a vocabulary such as `huggingface_data` gives."""
    import tokenizers
    import transformers

    added = [
        {**token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        for token in data["added_tokens"]
    ]
    whole = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "decoder": {"type": "Fuse"},
        "model": {**data["model"], "fuse_unk": True, "unk_token": "<unk>", "ignore_merges": False},
    }
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(whole)),
        extra_special_tokens={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
        pad_token="<pad>",
        padding_side="left",
    )


def gguf_metadata() -> dict[str, Any]:
    """With what a GGUF's writer damages: real spaces, control-like pieces as CONTROL, scores of -1000."""
    damaged = {**{piece: CONTROL for piece in (*FIXED, *CONTROL_LIKE)}}
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [piece.replace(SPACE, " ") if piece in TEXT_PIECES else piece for piece in PIECES],
        "tokenizer.ggml.scores": [-1000.0 if piece in SPECIAL else score_of(piece) for piece in PIECES],
        "tokenizer.ggml.token_type": [damaged.get(piece, kind_of(piece)) for piece in PIECES],
    }


def slow_encode(text: str, control: bool = False) -> list[int]:
    """BPE by its definition: whole special pieces, longest first; then the best merge, leftmost of equals, again and
    again; what has no piece falls back to bytes."""
    text = text.replace(" ", SPACE)
    specials = [*TEXT_PIECES, *(FIXED[:3] + CONTROL_LIKE if control else [])]  # no text ever gives <unk>
    symbols: list[tuple[str, bool]] = []
    while text:
        found = max((piece for piece in specials if text.startswith(piece)), key=len, default="")
        symbols.append((found or text[0], bool(found)))
        text = text[len(found or text[0]) :]
    while True:
        merges = [
            (-MERGED.index(a + b), -i)
            for i, ((a, whole_a), (b, whole_b)) in enumerate(itertools.pairwise(symbols))
            if not whole_a and not whole_b and a + b in MERGED
        ]
        if not merges:
            break
        i = -max(merges)[1]
        symbols[i : i + 2] = [(symbols[i][0] + symbols[i + 1][0], False)]
    ids: list[int] = []
    for symbol, _ in symbols:
        ids += [PIECES.index(symbol)] if symbol in PIECES else [PIECES.index(f"<0x{b:02X}>") for b in symbol.encode()]
    return ids
