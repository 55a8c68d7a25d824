"""Gemma 3 in JAX and Flax. `import gemma_jax as gj`, then `gj.load("gemma-3-270m")`.

Names are imported when first used, so that `import gemma_jax` costs nothing and `--help` answers at once.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemma_jax import interp, matformer, train
    from gemma_jax.configs.config import ConfigError, DecoderConfig
    from gemma_jax.conversion import convert, convert_lora, verify
    from gemma_jax.generate.completion import Completion, Piece
    from gemma_jax.generate.sampling import SamplingParams
    from gemma_jax.loading import load
    from gemma_jax.model import Gemma
    from gemma_jax.nn.decoder import Decoder
    from gemma_jax.text.chat import ChatError
    from gemma_jax.text.tokenizer import Tokenizer

_PUBLIC = {
    "ChatError": "text.chat",
    "Completion": "generate.completion",
    "ConfigError": "configs.config",
    "Decoder": "nn.decoder",
    "DecoderConfig": "configs.config",
    "Gemma": "model",
    "Piece": "generate.completion",
    "SamplingParams": "generate.sampling",
    "Tokenizer": "text.tokenizer",
    "convert": "conversion",
    "convert_lora": "conversion",
    "load": "loading",
    "verify": "conversion",
}

__all__ = [
    "ChatError", "Completion", "ConfigError", "Decoder", "DecoderConfig", "Gemma", "Piece", "SamplingParams",
    "Tokenizer", "convert", "convert_lora", "interp", "load", "matformer", "train", "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in ("interp", "matformer", "train"):
        return importlib.import_module(f"gemma_jax.{name}")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'gemma_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"gemma_jax.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
