"""The vocabulary inside the real 270M: the specification's vectors, and the official tokenizer.json if there is one."""

import os

import pytest

from gemma_jax.loading import find, read_tokenizer
from gemma_jax.text.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

VECTORS = {  # gemma3.md, section 6.1
    "Hello world": [9259, 1902],
    "2024": [236778, 236771, 236778, 236812],
    "a\n\n\n\nb": [236746, 110, 236763],
    "Hello  world": [9259, 138, 12392],
    "def f():\n    return 1": [2063, 517, 6141, 107, 140, 2060, 236743, 236770],
    "1234.5": [236770, 236778, 236800, 236812, 236761, 236810],
    "<h1>x</h1>": [184, 236781, 191],
    "\r\n": [251, 107],
}
CONTROL_VECTORS = {
    "<start_of_turn>user\nhi<end_of_turn>\n": [105, 2364, 107, 2202, 106, 107],
    "\n\n<start_of_image>": [108, 255999],
    "user\n\n\n<start_of_image>": [2364, 109, 255999],
}
TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "Größe, naïveté, Ærøskøbing; ¿Qué? «Oui» — „ja“…",
    "日本の首都は東京です。 한국의 수도는 서울입니다. 中国的首都是北京。",
    "Столица России — Москва. العاصمة هي القاهرة. राजधानी दिल्ली है।",
    "🙂👩‍👩‍👧‍👦 🇯🇵 e\u0301 \u200b zero\u00a0width",
    "for (int i = 0; i < 10; ++i) {\n\tprintf(\"%d\\n\", i);\n        }\n\n\n\n// done",
    "    four  spaces   and\t\ttabs   \n\n \n ends with spaces   ",
    "<table><tr><td>1</td></tr></table> <b>bold</b> <notatag> </h7>",
    "3.14159 1e-10 0x7fff 1,000,000 ½ ² ",
    "\x00\x07\x1b[0m\x7f",
]  # fmt: skip


@pytest.fixture(scope="module")
def real() -> Tokenizer:
    import gemma_checkpoints

    path = find("gemma-3-270m")
    with gemma_checkpoints.open(path) as reader:
        tokenizer = read_tokenizer(reader, path)
    assert tokenizer is not None
    return tokenizer


def test_ids_are_those_of_the_specification(real):
    assert real.vocab_size == 262_144
    assert (real.pad_id, real.eos_id, real.bos_id, real.unk_id, real.end_of_turn_id) == (0, 1, 2, 3, 106)
    for text, want in VECTORS.items():
        assert real.encode(text, bos=False) == want, text
        assert real.encode(text, bos=False, control=True) == want, text
    for text, want in CONTROL_VECTORS.items():
        assert real.encode(text, bos=False, control=True) == want, text


def test_every_control_piece_of_the_real_vocabulary_is_closed_to_users(real):
    pieces = list(real.control_ids)
    assert len(pieces) > 6000
    ids = real.encode("".join(pieces), bos=False)
    assert not set(ids) & set(real.control_ids.values())
    assert real.decode(ids) == "".join(pieces)


def test_texts_in_many_scripts_come_back_whole(real):
    for text in TEXTS:
        assert real.decode(real.encode(text, bos=False)) == text


@pytest.mark.parity
@pytest.mark.skipif("GEMMA_TOKENIZER_JSON" not in os.environ, reason="GEMMA_TOKENIZER_JSON names no tokenizer.json")
def test_ids_are_those_of_the_official_tokenizer_json(real):
    tokenizers = pytest.importorskip("tokenizers")
    path = os.environ["GEMMA_TOKENIZER_JSON"]
    official, ours = tokenizers.Tokenizer.from_file(path), Tokenizer.from_huggingface(path)
    for text in [*TEXTS, *VECTORS, *CONTROL_VECTORS]:
        want = official.encode(text, add_special_tokens=False).ids
        assert real.encode(text, bos=False, control=True) == want, text
        assert ours.encode(text, bos=False, control=True) == want, text
