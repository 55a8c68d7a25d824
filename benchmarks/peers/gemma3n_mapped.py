"""Ourselves with Gemma 3n's per-layer embeddings left in the checkpoint."""

import jax

import gemma_jax as gj
from benchmarks.peers import gemma_jax


class Peer(gemma_jax.Peer):
    def load(self, model: str, threads: int) -> None:
        self.gemma = gj.load(model, dtype="float32", ple="mapped", progress=False)
        jax.block_until_ready(self.gemma.model)
