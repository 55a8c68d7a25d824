"""Compiled programs that outlive the process."""

import logging

import jax

from gemma_jax.folders import cache_folder


def enable_compilation_cache() -> bool:
    """Keeps every compiled program in the cache folder, so that the second start need not compile. False: cannot."""
    folder = cache_folder() / "programs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        logging.getLogger(__name__).warning("programs are compiled anew each time: %s", error)
        return False
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    return True
