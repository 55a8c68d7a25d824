import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_jax.text.tokenizer import Tokenizer
from gemma_jax.text.vocabulary import TokenizerError
from tests.vocabulary import huggingface_data

FORMS = ["sentencepiece", "huggingface", "gguf"]
CONTROL = [
    "<bos>", "<eos>", "<pad>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>", "<unused0>", "[multimodal]",
]  # fmt: skip
WORDS = [
    "hello world", "the user", "model", "ababab", "  indented", "\n\n\n\n", "\t\tx", "日本語", "naïve ☃", "<h1>",
]  # fmt: skip
texts = st.lists(st.sampled_from([*WORDS, *CONTROL]) | st.text(max_size=6), max_size=8).map("".join)


@pytest.mark.parametrize("form", FORMS)
@given(text=texts, control=st.booleans())
@settings(max_examples=60, deadline=None)
def test_ids_are_those_of_the_definition_from_every_form(tokenizers, reference_encode, form, text, control):
    assert tokenizers[form].encode(text, bos=False, control=control) == reference_encode(text, control)


@given(text=texts)
@settings(max_examples=100, deadline=None)
def test_text_of_users_never_becomes_a_control_token_and_comes_back_whole(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_id
    assert not set(ids[1:]) & set(tokenizer.control_ids.values())
    assert tokenizer.decode(ids[1:]) == text


def test_control_pieces_are_tokens_only_when_asked_for(tokenizer, control_pieces):
    for piece in set(control_pieces) - {"<unk>"}:  # which no text ever gives
        assert tokenizer.encode(piece, bos=False, control=True) == [tokenizer.id_of(piece)]
        assert len(tokenizer.encode(piece, bos=False)) > 1


@pytest.mark.parametrize("form", FORMS)
def test_control_pieces_are_the_same_set_from_every_form(tokenizers, control_pieces, form):
    assert set(tokenizers[form].control_ids) == set(control_pieces)


@pytest.mark.parametrize("form", FORMS)
def test_runs_of_spaces_are_one_token_from_every_form(tokenizers, form):
    """A GGUF stores them with real spaces; unrepaired they fall apart."""
    tokenizer = tokenizers[form]
    pieces = [tokenizer.piece(i) for i in tokenizer.encode("a   b  c", bos=False)]
    assert pieces == ["a", "\u2581" * 3, "b", "\u2581" * 2, "c"]


def test_decode_hides_control_tokens_on_request_and_mends_broken_characters(tokenizer):
    ids = [*tokenizer.encode("hi"), tokenizer.end_of_turn_id]
    assert tokenizer.decode(ids) == "<bos>hi<end_of_turn>"
    assert tokenizer.decode(ids, skip_control=True) == "hi"
    snowman = tokenizer.encode("☃", bos=False)
    assert tokenizer.decode(snowman) == "☃"
    assert tokenizer.decode(snowman[:-1]) == "\ufffd"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: [1], "not a BPE"),
        (lambda data: None, "not a BPE"),
        (lambda data: {**data, "model": {k: v for k, v in data["model"].items() if k != "vocab"}}, "model.vocab is no"),
        (lambda data: {**data, "model": {**data["model"], "vocab": ["a"]}}, "model.vocab is no"),
        (lambda data: {**data, "model": {**data["model"], "vocab": {"a": "0"}}}, "model.vocab is no"),
        (
            lambda data: {**data, "model": {k: v for k, v in data["model"].items() if k != "merges"}},
            "model.merges is no",
        ),
        (lambda data: {**data, "model": {**data["model"], "merges": [3]}}, "model.merges is no"),
        (lambda data: {**data, "model": {**data["model"], "merges": [["a"]]}}, "model.merges is no"),
        (lambda data: {**data, "added_tokens": None}, "added_tokens is no"),
        (lambda data: {**data, "added_tokens": [{"content": "<x>"}]}, "added_tokens is no"),
        (lambda data: {**data, "added_tokens": [{"id": -(10**9), "content": "<x>"}]}, "added_tokens is no"),
        (lambda data: {**data, "added_tokens": [{"id": 1.5, "content": "<x>"}]}, "added_tokens is no"),
    ],
)
def test_a_tokenizer_json_of_another_shape_is_refused(tmp_path, change, words):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(change(huggingface_data())))
    with pytest.raises(TokenizerError, match=words):
        Tokenizer.from_huggingface(path)


@pytest.mark.parametrize("data", [b"\xff\xfe{", b"[" * 100_000, b"{"])
def test_a_tokenizer_json_that_is_no_json_is_refused_by_name(tmp_path, data):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(data)
    with pytest.raises(TokenizerError, match=r"tokenizer.json is not JSON"):
        Tokenizer.from_huggingface(path)


def test_pieces_and_ids_outside_the_vocabulary_are_refused(tokenizer):
    for token in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f"no token {token};"):
            tokenizer.decode([token])
    with pytest.raises(ValueError, match="'nonsense'"):
        tokenizer.id_of("nonsense")
    assert tokenizer.piece(tokenizer.id_of("hello")) == "hello"
    assert tokenizer.id_of("<unk>") == tokenizer.unk_id


def test_a_lone_surrogate_is_refused_with_its_place(tokenizer):
    with pytest.raises(ValueError, match="at place 3"):
        tokenizer.encode("abc\ud800")


def test_a_folder_gives_its_model_or_its_json_or_nothing(tmp_path, model_bytes, tokenizer_json):
    assert Tokenizer.from_folder(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_json))
    ids = Tokenizer.from_folder(tmp_path).encode("hello world")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match="not JSON"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(model_bytes)
    assert Tokenizer.from_folder(tmp_path).encode("hello world") == ids


def test_what_is_no_gemma_tokenizer_is_refused_by_name(damaged_metadata, tokenizer_json):
    with pytest.raises(TokenizerError, match="not a SentencePiece model"):
        Tokenizer.from_sentencepiece(b"\xff\xff\xff")
    with pytest.raises(TokenizerError, match="'gpt2'"):
        Tokenizer.from_gguf({**damaged_metadata, "tokenizer.ggml.model": "gpt2"})
    without = {key: value for key, value in damaged_metadata.items() if not key.endswith("scores")}
    with pytest.raises(TokenizerError, match=r"tokenizer\.ggml\.scores"):
        Tokenizer.from_gguf(without)
    short = {**damaged_metadata, "tokenizer.ggml.scores": [0.0]}
    with pytest.raises(TokenizerError, match="1 scores"):
        Tokenizer.from_gguf(short)
    renamed = [t.replace("<end_of_turn>", "<|im_end|>") for t in damaged_metadata["tokenizer.ggml.tokens"]]
    with pytest.raises(TokenizerError, match="'<end_of_turn>'"):
        Tokenizer.from_gguf({**damaged_metadata, "tokenizer.ggml.tokens": renamed})
    tokenizer_json["model"]["merges"].append(["a", "zz"])
    with pytest.raises(TokenizerError, match="'azz'"):
        Tokenizer.from_huggingface(tokenizer_json)
    with pytest.raises(TokenizerError, match="byte fallback"):
        Tokenizer.from_huggingface({"model": {"type": "WordPiece"}})


def test_older_files_write_a_merge_as_one_text(tokenizer_json, tokenizer):
    tokenizer_json["model"]["merges"] = [" ".join(pair) for pair in tokenizer_json["model"]["merges"]]
    text = "hello world, the user"
    assert Tokenizer.from_huggingface(tokenizer_json).encode(text) == tokenizer.encode(text)
