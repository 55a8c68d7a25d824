"""Training: a step of all weights or of an adapter, on one device or a mesh."""

from gemma_jax.train import lora
from gemma_jax.train.losses import Batch, is_target, next_token_loss
from gemma_jax.train.step import Metrics, State, Step, finished, make_step, start

__all__ = [
    "Batch",
    "Metrics",
    "State",
    "Step",
    "finished",
    "is_target",
    "lora",
    "make_step",
    "next_token_loss",
    "start",
]
