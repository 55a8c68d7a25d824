"""gemma_jax: Gemma 3 and Gemma 3n in JAX and Flax NNX."""
