"""Changes to a config by dotted path, from the command line or a mapping."""

from collections.abc import Mapping, Sequence
from typing import Any

from gemma_jax.configs.config import ConfigError, DecoderConfig

_WORDS = {"none": None, "null": None, "true": True, "false": False}


def apply(config: DecoderConfig, changes: Mapping[str, Any] | Sequence[str]) -> DecoderConfig:
    """A copy with all changes made, in order; two that are possible only together may stand in any order.

    Args:
        changes: {"attention.local.window": 256}, or texts such as "attention.local.window=256".

    Raises: ConfigError for a path that names no field, a value of the wrong type, and a config that is impossible.
    """
    pairs = changes.items() if isinstance(changes, Mapping) else map(_parsed, changes)
    return config.replace_all(pairs)


def _parsed(change: str) -> tuple[str, Any]:
    path, equals, text = change.partition("=")
    if not equals or not path:
        raise ConfigError(f"override {change!r} is not of the form dotted.path=value")
    return path.strip(), _value(text.strip())


def _value(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
