"""No model: how fast this machine's cores read memory, the bound of decoding one row."""

import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version

import numpy as np

COLUMNS = 4096


class Peer:
    def versions(self) -> dict[str, str]:
        return {"numpy": version("numpy")}

    def prepare(self, size: int, threads: int) -> int:
        """Makes `size` bytes of float32, far beyond the caches; returns the bytes made."""
        self._matrix = np.ones((size // 4 // COLUMNS, COLUMNS), np.float32)
        self._vector = np.ones(COLUMNS, np.float32)
        self._pool, self._threads = ThreadPoolExecutor(threads), threads
        return self._matrix.nbytes

    def stream(self) -> dict[str, float]:
        """Bytes a second of two ways to read all of it: a matrix-vector product, and threads that each read a part."""
        parts = np.array_split(self._matrix.reshape(-1), self._threads)
        start = time.perf_counter()
        self._matrix @ self._vector
        middle = time.perf_counter()
        list(self._pool.map(lambda part: float(np.dot(part, part)), parts))
        end = time.perf_counter()
        return {"gemv": self._matrix.nbytes / (middle - start), "threads": self._matrix.nbytes / (end - middle)}
