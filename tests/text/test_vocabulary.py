import numpy as np
import pytest
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from gemma_jax.text.vocabulary import (
    PieceType,
    TokenizerError,
    gguf_metadata,
    gguf_vocabulary,
    is_control_like,
    serialise,
)


@pytest.mark.parametrize(
    ("piece", "kind", "want"),
    [
        ("<bos>", PieceType.CONTROL, True),
        ("<unk>", PieceType.UNKNOWN, True),
        ("<start_of_image>", PieceType.USER_DEFINED, True),
        ("[multimodal]", PieceType.USER_DEFINED, True),
        ("<some_new_thing>", PieceType.USER_DEFINED, True),
        ("\n\n", PieceType.USER_DEFINED, False),
        ("\t", PieceType.USER_DEFINED, False),
        ("\u2581\u2581", PieceType.USER_DEFINED, False),
        ("<h1>", PieceType.USER_DEFINED, False),
        ("</blockquote>", PieceType.USER_DEFINED, False),
        ("<s>", PieceType.USER_DEFINED, False),
        ("<bos>", PieceType.NORMAL, False),
        ("<0x00>", PieceType.BYTE, False),
    ],
)
def test_white_space_and_html_are_text_and_all_else_user_defined_is_control(piece, kind, want):
    assert is_control_like(piece, kind) == want


def test_the_model_written_is_read_back_by_protobuf(damaged_metadata):
    """Varints, multi-byte text and unused pieces, against the generated parser."""
    vocabulary = gguf_vocabulary(damaged_metadata)
    unmatched = [vocabulary.pieces.index("<start_of_turn>")]
    proto = ModelProto.FromString(serialise(vocabulary, unmatched))
    assert [piece.piece for piece in proto.pieces] == list(vocabulary.pieces)
    np.testing.assert_array_equal([piece.score for piece in proto.pieces], vocabulary.scores)
    types = np.array(vocabulary.types)
    types[unmatched] = PieceType.UNUSED
    np.testing.assert_array_equal([piece.type for piece in proto.pieces], types)
    assert proto.trainer_spec.eos_piece == "<eos>"
    assert proto.trainer_spec.vocab_size == len(vocabulary.pieces)


def test_the_metadata_written_for_gguf_is_read_back_as_the_same_vocabulary(damaged_metadata):
    vocabulary = gguf_vocabulary(damaged_metadata)
    again = gguf_vocabulary(gguf_metadata(vocabulary))
    assert list(again.pieces) == list(vocabulary.pieces)
    np.testing.assert_array_equal(again.scores, vocabulary.scores)
    np.testing.assert_array_equal(again.types, vocabulary.types)


def test_byte_pieces_of_another_form_are_refused(damaged_metadata):
    tokens = ["<0xZZ>" if piece == "<0x41>" else piece for piece in damaged_metadata["tokenizer.ggml.tokens"]]
    with pytest.raises(TokenizerError, match="others than <0x00> to <0xFF>"):
        gguf_vocabulary({**damaged_metadata, "tokenizer.ggml.tokens": tokens})
    with pytest.raises(TokenizerError, match="other things than numbers"):
        gguf_vocabulary({**damaged_metadata, "tokenizer.ggml.scores": ["a"] * len(tokens)})


def test_pieces_twice_empty_or_too_long_are_refused(damaged_metadata):
    tokens = list(damaged_metadata["tokenizer.ggml.tokens"])
    for piece, problem in ((tokens[-2], "twice"), ("é" * 10_000, "20000 bytes"), ("", "is empty")):
        with pytest.raises(TokenizerError, match=problem):
            gguf_vocabulary({**damaged_metadata, "tokenizer.ggml.tokens": [*tokens[:-1], piece]})
