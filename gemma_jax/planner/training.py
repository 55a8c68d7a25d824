"""The training step that is planned: AdamW on float32 weights, which compute in another dtype."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from gemma_jax.matformer.nested import Batch, next_token_loss


def optimizer() -> optax.GradientTransformation:
    """AdamW; its two moments are float32, as the weights are."""
    return optax.adamw(1e-4)


def step(
    optimizer: optax.GradientTransformation, dtype: str, model: Any, state: Any, tokens: jax.Array
) -> tuple[Any, Any, jax.Array]:
    """The weights and the optimizer's state after a step on rows of text int32 [B, T], and the loss before it."""

    def loss(model: Any) -> jax.Array:
        narrow = jax.tree.map(lambda weight: weight.astype(jnp.dtype(dtype)), model)
        return next_token_loss(narrow, Batch(tokens))

    value, gradients = jax.value_and_grad(loss)(model)
    updates, state = optimizer.update(gradients, state, model)
    return optax.apply_updates(model, updates), state, value
