"""Ourselves with weights as the file has them, as the command line has us on a CPU."""

from benchmarks.peers import gemma_jax


class Peer(gemma_jax.Peer):
    dtype = "stored"
