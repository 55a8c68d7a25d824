"""Architectures as data: see `config.py` for what can vary, `gemma3.py` for what was published."""

from gemma_jax.configs.registry import get, names

__all__ = ["get", "names"]
