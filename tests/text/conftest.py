from collections.abc import Callable
from typing import Any

import pytest

from gemma_jax.text.tokenizer import Tokenizer
from tests.vocabulary import CONTROL_LIKE, FIXED, gguf_metadata, huggingface_data, sentencepiece_model, slow_encode


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, Tokenizer]:
    """One tokenizer from each form."""
    return {
        "sentencepiece": Tokenizer.from_sentencepiece(sentencepiece_model()),
        "huggingface": Tokenizer.from_huggingface(huggingface_data()),
        "gguf": Tokenizer.from_gguf(gguf_metadata()),
    }


@pytest.fixture(scope="session")
def tokenizer(tokenizers: dict[str, Tokenizer]) -> Tokenizer:
    return tokenizers["gguf"]


@pytest.fixture(scope="session")
def reference_encode() -> Callable[..., list[int]]:
    return slow_encode


@pytest.fixture(scope="session")
def control_pieces() -> list[str]:
    return FIXED + CONTROL_LIKE


@pytest.fixture
def damaged_metadata() -> dict[str, Any]:
    return gguf_metadata()


@pytest.fixture
def tokenizer_json() -> dict[str, Any]:
    return huggingface_data()


@pytest.fixture
def model_bytes() -> bytes:
    return sentencepiece_model()
