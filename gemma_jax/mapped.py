"""Gemma 3n's per-layer embeddings left in the checkpoint: rows are read while the model runs (gemma3n.md, 2.1)."""

import itertools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np

import gemma_checkpoints
from gemma_checkpoints import Reader
from gemma_checkpoints.names import Weights
from gemma_checkpoints.subset import Subset

PATH = "embedder/ple"
NUM_RECENT = 1024  # rows kept of the tokens seen last; 30 MiB of E2B's in float32


class MappedRows:
    """Reads the rows of tokens from an open checkpoint. `open_weights` finds the model's weights in it.

    Called by programs, from threads of XLA's; the checkpoint stays open as long as this lives, which compiled programs
    keep alive too (`jax.clear_caches`).
    Measured on two cores: a row of safetensors takes 0.04 ms. Of an Orbax checkpoint a stored piece of 32 MiB is read
    and compared with its digest for it, 26 ms; so rows of a piece are read together, and those seen last are kept.
    """

    def __init__(self, path: Path, open_weights: Callable[[Reader], Weights | Subset], dtype: str):
        self._reader = gemma_checkpoints.open(path)
        weakref.finalize(self, self._reader.close)
        self._weights, self._dtype = open_weights(self._reader), jnp.dtype(dtype)
        self._lock = threading.Lock()
        self._recent: OrderedDict[int, np.ndarray] = OrderedDict()  # by token, the newest last
        num_rows, num_layers, width = self._weights.entries[PATH].shape
        self.shape = num_rows, num_layers, width
        self._num_together = self._rows_of_a_piece()

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        """The rows of tokens [...], [..., L, P]; each is read once a call, if it is not among the recent ones."""
        wanted, places = np.unique(np.asarray(tokens), return_inverse=True)
        found = np.empty((len(wanted), *self.shape[1:]), self._dtype)
        with self._lock:
            self._read([token for token in wanted.tolist() if token not in self._recent])
            for i, token in enumerate(wanted.tolist()):
                found[i] = self._recent[token]
                self._recent.move_to_end(token)
            while len(self._recent) > NUM_RECENT:
                self._recent.popitem(last=False)
        return found[places.reshape(-1)].reshape(*np.shape(tokens), *self.shape[1:])

    def _read(self, tokens: list[int]) -> None:
        """Adds the rows of tokens, which are in order, to the recent ones."""
        whole = tuple(slice(0, size) for size in self.shape[1:])
        for _, group in itertools.groupby(tokens, lambda token: token // self._num_together):
            several = list(group)
            first, stop = several[0], several[-1] + 1
            rows = np.empty((stop - first, *self.shape[1:]), self._dtype)
            self._weights.read(PATH, rows, (slice(first, stop), *whole))
            self._recent |= {token: rows[token - first].copy() for token in several}

    def _rows_of_a_piece(self) -> int:
        """How many rows a checkpoint stores together, or a part of these: from the number of pieces in its manifest."""
        name, manifest = self._weights.source_name(PATH), getattr(self._reader, "manifest", None)
        pieces = manifest.pieces.get(name, ()) if manifest is not None else ()
        return -(-self.shape[0] // len(pieces)) if pieces else 1
