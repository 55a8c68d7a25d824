"""Where files of ours live between runs."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """The folder for what can be made anew: compiled programs, assembled weights. It need not exist yet.

    $GEMMA_JAX_CACHE, else gemma_jax in $XDG_CACHE_HOME, else ~/.cache/gemma_jax.
    """
    if chosen := os.environ.get("GEMMA_JAX_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gemma_jax"
