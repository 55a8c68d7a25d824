"""Gemma 3n's per-layer embeddings left in the checkpoint: rows are read while the model runs (gemma3n.md, 2.1)."""

import threading
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np

import gemma_checkpoints
from gemma_checkpoints import Reader
from gemma_checkpoints.names import Weights
from gemma_checkpoints.subset import Subset

PATH = "embedder/ple"


class MappedRows:
    """Reads the rows of tokens from an open checkpoint. `open_weights` finds the model's weights in it.

    Called by programs, from threads of XLA's; the checkpoint stays open as long as this lives.
    """

    def __init__(self, path: Path, open_weights: Callable[[Reader], Weights | Subset], dtype: str):
        self._reader = gemma_checkpoints.open(path)
        self._weights, self._dtype = open_weights(self._reader), jnp.dtype(dtype)
        self._lock = threading.Lock()
        num_rows, num_layers, width = self._weights.entries[PATH].shape
        self.shape = num_rows, num_layers, width

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        """The rows of tokens [...], [..., L, P]; each is read once a call."""
        wanted, places = np.unique(np.asarray(tokens), return_inverse=True)
        found = np.empty((len(wanted), *self.shape[1:]), self._dtype)
        whole = tuple(slice(0, size) for size in self.shape[1:])
        with self._lock:
            for i, token in enumerate(wanted.tolist()):
                self._weights.read(PATH, found[i : i + 1], (slice(token, token + 1), *whole))
        return found[places.reshape(-1)].reshape(*np.shape(tokens), *self.shape[1:])

    def __del__(self) -> None:
        if (reader := getattr(self, "_reader", None)) is not None:
            reader.close()
