"""Gemma 3's tower and projector here, float32, from pixels to soft tokens."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from importlib.metadata import version

import numpy as np

import gemma_jax
from benchmarks.worker import peak_bytes, timed


class Peer:
    def versions(self) -> dict[str, str]:
        return {"jax": version("jax"), "jaxlib": version("jaxlib"), "flax": version("flax")}

    def load(self, model: str, threads: int) -> float:
        return timed(lambda: setattr(self, "gemma", gemma_jax.load(model, dtype="float32", progress=False)))[1][
            "seconds"
        ]

    def see(self, values: str, output: str) -> float:
        """Seconds of one pass over images [N, height, width, 3] of a .npy file; the soft tokens go to another."""
        images = np.load(values)
        found, took = timed(lambda: np.asarray(self.gemma.see(images)))
        np.save(output, found)
        return took["seconds"]

    def peak(self) -> int:
        return peak_bytes()
