"""A training step, on one device or a mesh: of all weights, or of an adapter beside weights that stay (`train.lora`).

    state, step = train.start(gemma.model, optimizer), train.make_step(optimizer)
    for batch in batches:
        state, metrics = step(state, batch)
    model = train.finished(gemma.model, state)

On a mesh all of it runs inside of the model's scope.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from gemma_jax.nn import host, logical
from gemma_jax.nn.decoder import Decoder
from gemma_jax.nn.paths import parameters
from gemma_jax.nn.scanned import ScannedDecoder
from gemma_jax.nn.sliced import SharedSlice, standing
from gemma_jax.nn.stored import refuse_stored
from gemma_jax.train import lora
from gemma_jax.train.lora import AnyDecoder
from gemma_jax.train.losses import Batch, next_token_loss

Metrics = dict[str, jax.Array]
Step = Callable[..., "tuple[State, Metrics]"]
DTYPES = (None, "float32", "bfloat16", "float64")
TOWERS = ("vision", "mm", "audio", "audio_mm")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """What a step changes. A step takes it over (its arrays are donated): go on with the one that it returns."""

    weights: Any  # a decoder, stacked or not; or the factors of an adapter
    optimizer_state: optax.OptState


def start(model: Decoder | ScannedDecoder, optimizer: optax.GradientTransformation) -> State:
    """The state before the first step: of training all weights, or the factors alone of a model with an adapter.

    It holds a copy of what is trained, without the towers of images and sound, which text does not pass through: steps
    do not touch `model`; `finished` puts what was trained into it. Weights are updated in their own dtype; to compute
    in bfloat16 load float32, and give `make_step` the dtype.
    Raises: as `check_trainable`.
    """
    check_trainable(model)
    whole = standing(model) if isinstance(model, Decoder) else model
    trained: Any = jax.tree.map(jnp.copy, lora.factors(whole) or _without_towers(whole))
    return State(trained, optimizer.init(trained))


def finished(model: AnyDecoder, state: State) -> AnyDecoder:
    """The model with what a state has trained in the place of its own; the rest is shared with `model`.

    Raises ValueError for a state of another model.
    """
    is_adapter = isinstance(state.weights, Mapping)
    whole: Any = standing(model) if isinstance(model, Decoder) else model
    trained = state.weights if is_adapter else parameters(state.weights)
    wanted = lora.factors(whole) if is_adapter else parameters(_without_towers(whole))
    lora.check_same(trained, wanted)
    return lora.with_factors(whole, trained)


def _without_towers(model: Any) -> Any:
    """What a text passes through: without towers, and EmbeddingGemma's layers after its pooling."""
    text = jax.tree.map(lambda x: x, model)
    for name in TOWERS:
        if hasattr(text, name):
            delattr(text, name)
    text.config, text.dense = text.config.decoder, nnx.List([])
    return text


def check_trainable(model: Decoder | ScannedDecoder) -> None:
    """Raises TypeError for what is no decoder. ValueError for one with weights in blocks, or whose per-layer embeddings
    are mapped from a checkpoint or on the host: no gradients are computed of these.
    """
    if not isinstance(model, Decoder | ScannedDecoder):
        raise TypeError(f"a {type(model).__name__} cannot be trained; wanted a Decoder, such as gemma.model")
    if model.embedder.fetch is not None:
        raise ValueError("the per-layer embeddings are mapped from a checkpoint; load the model without mapping them")
    refuse_stored(model.whole if isinstance(model, SharedSlice) else model, "training")
    if any(map(host.is_on_host, jax.tree.leaves(model))):
        raise ValueError("the per-layer embeddings are on the host; to train them, load the model with ple='device'")


def make_step(optimizer: optax.GradientTransformation, *, dtype: str | None = None, is_remat: bool = True) -> Step:
    """A training step, compiled: `state, metrics = step(state, batch)`, or `step(state, batch, model)` with an adapter.

    Args:
        dtype: what is computed in, as "bfloat16"; the weights that are updated keep theirs. None: the weights' own.
        is_remat: of a layer's values its input alone is kept for gradients, the others are computed again.

    Metrics: `loss` in nats and `gradient_norm`, of the weights before the step.
    Raises ValueError for another dtype, and the step, before anything is computed or donated, for a batch of another
    shape, for an adapter without its model, and for a model that is not the adapter's. Ids are not looked at.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; wanted 'float32' or 'bfloat16', or None for the weights' own")
    compiled = program(optimizer, dtype=dtype, is_remat=is_remat)

    def step(state: State, batch: Batch, model: Any = None) -> tuple[State, Metrics]:
        batch.check()
        if isinstance(state.weights, Mapping) != (model is not None):
            raise ValueError("an adapter is trained by step(state, batch, model), all weights by step(state, batch)")
        if model is not None and dtype is not None:
            raise ValueError(f"dtype is {dtype!r}, but beside an adapter the model computes in its own; leave it out")
        return compiled(state, batch, model)

    return step


def program(optimizer: optax.GradientTransformation, *, dtype: str | None, is_remat: bool) -> Any:
    """The compiled part of `make_step`: of the state, a batch, and the adapted model whose factors the state holds."""

    @functools.partial(jax.jit, donate_argnums=0)
    def run(state: State, batch: Batch, model: Any) -> tuple[State, Metrics]:
        if model is not None:
            lora.check_same(state.weights, lora.factors(model))

        def loss(weights: Any) -> tuple[jax.Array, None]:
            kind = dtype if model is None else model.final_norm.scale.dtype
            narrow = weights if kind is None else jax.tree.map(lambda x: x.astype(kind), weights)
            whole = narrow if model is None else lora.with_factors(model, narrow)
            return next_token_loss(whole, batch, is_remat=is_remat), None

        state, value, _, norm = updated(optimizer, state, loss)
        return state, {"loss": value, "gradient_norm": norm}

    return run


def updated(
    optimizer: optax.GradientTransformation, state: State, loss: Callable[[Any], tuple[jax.Array, Any]]
) -> tuple[State, jax.Array, Any, jax.Array]:
    """The state after a step down `loss`, what that and its second result were before, and the gradient's norm."""
    (value, rest), gradients = jax.value_and_grad(loss, has_aux=True)(state.weights)
    updates, optimizer_state = optimizer.update(gradients, state.optimizer_state, state.weights)
    weights = logical.at_rest(optax.apply_updates(state.weights, updates))
    after = State(weights, logical.at_rest(optimizer_state, like=weights))
    return after, value, rest, optax.tree.norm(gradients)
