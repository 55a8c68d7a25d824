"""Published models by name."""

import difflib

from gemma_jax.configs import gemma1, gemma2, gemma3, gemma3n
from gemma_jax.configs.config import ConfigError, DecoderConfig

_MODELS = {
    config.name: config
    for config in (
        gemma3.GEMMA3_270M,
        gemma3.GEMMA3_1B,
        gemma3.GEMMA3_4B,
        gemma3.GEMMA3_12B,
        gemma3.GEMMA3_27B,
        gemma3.EMBEDDING_GEMMA,
        *gemma3.DERIVED,
        gemma3n.GEMMA3N_E2B,
        gemma3n.GEMMA3N_E4B,
        gemma2.GEMMA2_2B,
        gemma2.GEMMA2_9B,
        gemma2.GEMMA2_27B,
        gemma1.GEMMA1_2B,
        gemma1.GEMMA1_7B,
    )
}


def names() -> tuple[str, ...]:
    """The names that `get` knows."""
    return tuple(_MODELS)


def get(name: str) -> DecoderConfig:
    """The config of a published model. "google/gemma-3-1b-it" and "-pt" name the same architecture as "gemma-3-1b".

    Raises ConfigError with the closest names for an unknown one.
    """
    short = name.lower().removeprefix("google/").removesuffix("-it").removesuffix("-pt")
    if short not in _MODELS:
        close = difflib.get_close_matches(short, _MODELS, n=3) or list(_MODELS)
        raise ConfigError(f"there is no model {name!r}; did you mean {', '.join(close)}?")
    return _MODELS[short]
