"""Training of an adapter beside weights that stay as they are (LoRA, arXiv:2106.09685).

    model = lora.attach(gemma.model, rank=16, alpha=32)
    state, step = train.start(model, optimizer), train.make_step(optimizer)
    for batch in batches:
        state, metrics = step(state, batch, model)
    lora.save(lora.with_factors(model, state.weights), "adapter", "huggingface")       # load(..., lora="adapter")

Weights may be bfloat16: factors are float32 always, and so is what an optimizer keeps of them.
"""

import functools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gemma_checkpoints import lora as adapters
from gemma_jax import export
from gemma_jax.nn import logical
from gemma_jax.nn.adapted import Adapted, Factor, Pair
from gemma_jax.nn.decoder import Decoder, Layer
from gemma_jax.nn.layers import wide
from gemma_jax.nn.paths import parameters
from gemma_jax.nn.scanned import ScannedDecoder, unstack

AnyDecoder = TypeVar("AnyDecoder", bound=Decoder | ScannedDecoder)
Factors = Mapping[str, Factor]  # by the path within the model

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")  # all kernels of attention and ffws


def attach(
    model: AnyDecoder, rank: int, *, alpha: float | None = None, targets: Sequence[str] = TARGETS, seed: int = 0
) -> AnyDecoder:
    """The model with factors beside the kernels of its layers; weights are shared with `model`, not copied.

    It computes what `model` does until it is trained: `a` is normal with variance 1 / inputs, `b` zero.

    Args:
        rank: r, of each addition.
        alpha: additions count alpha / rank. None: as rank, so that they count 1.
        targets: which kernels, of `TARGETS`.

    Raises ValueError for a rank below 1, for other targets, and for a model that has an adapter already.
    """
    adapted = placed(model, rank, alpha=alpha, targets=targets)
    places = tuple((path, x.get_metadata("dims"), x.get_raw_value()) for path, x in factors(adapted).items())
    return with_factors(adapted, _drawn(tuple((path, dims, x.shape, x.dtype) for path, dims, x in places), seed))


def placed(model: AnyDecoder, rank: int, *, alpha: float | None = None, targets: Sequence[str] = TARGETS) -> AnyDecoder:
    """As `attach`, with shapes and dtypes in the place of factors; of a model that may be nothing else itself."""
    if rank < 1:
        raise ValueError(f"rank is {rank}; wanted a number from 1 on")
    if not targets or set(targets) - set(TARGETS):
        raise ValueError(f"targets are {list(targets)}; wanted some of {', '.join(TARGETS)}")
    adapted = jax.tree.map(lambda x: x, model)
    for layer in [node for _, node in nnx.iter_graph(adapted) if isinstance(node, Layer)]:
        for room in (layer.attn, layer.mlp):
            for name, kernel in _kernels(room):
                parts = kernel.get_metadata("parts", None) or ((name.removeprefix("w_"), 0, None),)
                pairs = {part: _pair(kernel, rank, start, stop) for part, start, stop in parts if part in targets}
                if pairs:
                    setattr(room, name, Adapted(kernel, pairs, (rank if alpha is None else alpha) / rank))
    return adapted


def _kernels(room: nnx.Module) -> list[tuple[str, nnx.Param]]:
    found = [(name, value) for name, value in vars(room).items() if name.startswith("w_")]
    if any(isinstance(value, Adapted) for _, value in found):
        raise ValueError("the model has an adapter already; merge it (load with lora=), or attach to the model without")
    return found


def _pair(kernel: nnx.Param, rank: int, start: int, stop: int | None) -> Pair:
    """Places for the factors of a kernel, perhaps one of a stack, or of a part of it along its second dimension."""
    letters, value, count = kernel.get_metadata("dims").split(), kernel.get_raw_value(), kernel.get_metadata("inputs")
    stack, shape = value.shape[: -len(letters)], list(value.shape[-len(letters) :])
    if stop is not None:
        shape[1] = stop - start

    def factor(names: Sequence[str], sizes: Sequence[int], inputs: int) -> Factor:
        value_there: Any = jax.ShapeDtypeStruct((*stack, *sizes), wide(value))
        return Factor(value_there, dims=" ".join(names), inputs=inputs)

    return Pair(
        factor([*letters[:count], "r"], [*shape[:count], rank], count),
        factor(["r", *letters[count:]], [rank, *shape[count:]], 1),
    )


@functools.partial(jax.jit, static_argnums=0)
def _drawn(places: tuple[tuple[str, str, tuple[int, ...], Any], ...], seed: int) -> dict[str, Factor]:
    """Factors as they are in the beginning, where they lie on a mesh. Those of one shape are drawn at once."""
    alike: dict[tuple[str, tuple[int, ...], Any], list[str]] = {}
    for path, dims, shape, dtype in places:
        alike.setdefault((dims, shape, dtype), []).append(path)
    found = {}
    for i, ((dims, shape, dtype), paths) in enumerate(alike.items()):
        is_first = dims.endswith(" r")
        letters = len(dims.split())
        key = jax.random.fold_in(jax.random.key(seed), i)
        if is_first:
            values = jax.random.normal(key, (len(paths), *shape), dtype) * math.prod(shape[-letters:-1]) ** -0.5
        else:
            values = jnp.zeros((len(paths), *shape), dtype)
        inputs = letters - 1 if is_first else 1
        found |= {path: Factor(value, dims=dims, inputs=inputs) for path, value in zip(paths, values, strict=True)}
    return logical.at_rest(found)


def factors(model: Decoder | ScannedDecoder) -> dict[str, Factor]:
    """What of a model is trained. Empty without an adapter."""
    return {path: param for path, param in parameters(model).items() if isinstance(param, Factor)}


def with_factors(model: AnyDecoder, factors: Factors) -> AnyDecoder:
    """The model with these values of its factors."""
    adapted = jax.tree.map(lambda x: x, model)
    found = parameters(adapted)
    for path, factor in factors.items():
        found[path].set_raw_value(factor.get_raw_value())
    return adapted


def changes(model: Decoder | ScannedDecoder) -> dict[str, adapters.Change]:
    """The adapter of a model by the canonical paths of its weights, as files hold it.

    Raises ValueError if there is none.
    """
    whole = unstack(model) if isinstance(model, ScannedDecoder) else model
    found = {}
    for path, pair, scale in _pairs(whole):
        a, b = (np.asarray(jax.device_get(one[...]), np.float32) for one in (pair.a, pair.b))
        found[path] = adapters.Change(a, b, scale)
    if not found:
        raise ValueError("the model has no adapter; `attach` gives it one")
    return found


def _pairs(model: Decoder) -> Iterator[tuple[str, Pair, float]]:
    for i, layer in enumerate(model.layers):
        for room_name in ("attn", "mlp"):
            for value in vars(getattr(layer, room_name)).values():
                for name, pair in value.pairs.items() if isinstance(value, Adapted) else ():
                    yield f"layers_{i}/{room_name}/{name}/kernel", pair, value.scale


def save(model: Decoder | ScannedDecoder, destination: str | os.PathLike, format: str = "huggingface") -> None:
    """Writes the adapter of a model by itself: "huggingface" (PEFT), "gguf" (llama.cpp; a file) or "orbax".

    `gemma_jax.load(..., lora=destination)` merges it into the model's weights.
    Raises: FileExistsError if the destination is there; ValueError for another format, or without an adapter.
    """
    export.write_adapter(destination, format, changes(model), model.config.decoder)
