"""Gemma 3n's conformer here, float32, from a spectrogram to vectors."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from importlib.metadata import version

import jax
import numpy as np

import gemma_jax
from benchmarks.worker import peak_bytes, timed


class Peer:
    def versions(self) -> dict[str, str]:
        return {"jax": version("jax"), "jaxlib": version("jaxlib"), "flax": version("flax")}

    def load(self, model: str, threads: int) -> float:
        def load() -> None:
            self.tower = gemma_jax.load(model, dtype="float32", progress=False).model.audio
            self.encode = jax.jit(lambda tower, features, is_valid: tower(features, is_valid)[0])

        return timed(load)[1]["seconds"]

    def hear(self, values: str, output: str) -> float:
        """Seconds of one pass over features [N, T, bins] of a .npy file; the vectors go to another."""
        features = np.load(values)
        is_valid = np.ones(features.shape[:2], bool)
        found, took = timed(lambda: np.asarray(self.encode(self.tower, features, is_valid)))
        np.save(output, found)
        return took["seconds"]

    def peak(self) -> int:
        return peak_bytes()
