"""Training of an adapter beside weights that stay as they are (LoRA, arXiv:2106.09685).

    model = lora.attach(gemma.model, rank=16, alpha=32)
    state, step = train.start(model, optimizer), train.make_step(optimizer)
    for batch in batches:
        state, metrics = step(state, batch, model)
    lora.save(train.finished(model, state), "adapter", "huggingface")        # load(..., lora="adapter")

Weights may be bfloat16: factors are float32 always, and so is what an optimizer keeps of them.
"""

import functools
import itertools
import math
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

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
from gemma_jax.nn.scanned import ScannedDecoder, segments, unstack
from gemma_jax.nn.sliced import standing

AnyDecoder = TypeVar("AnyDecoder", bound=Decoder | ScannedDecoder)

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")  # all kernels of attention and ffws


def attach(
    model: AnyDecoder, rank: int, *, alpha: float | None = None, targets: Sequence[str] = TARGETS, seed: int = 0
) -> AnyDecoder:
    """The model with factors beside the kernels of its layers; weights are shared with `model`, not copied.

    It computes what `model` does until it is trained: `a` is normal with variance 1 / inputs, `b` zero. A seed draws
    the same for a model whatever its layout, stacked or not, on any mesh. Of a slice that shares its whole's weights
    the kernels are copied.

    Args:
        rank: r, of each addition.
        alpha: additions count alpha / rank. None: as rank, so that they count 1.
        targets: which kernels, of `TARGETS`.

    Raises TypeError for what is no decoder; ValueError for a rank or alpha that is no number above 0, for other
    targets, and for a model that has an adapter already.
    """
    if not isinstance(model, Decoder | ScannedDecoder):
        raise TypeError(f"a {type(model).__name__} cannot have an adapter; wanted a Decoder, such as gemma.model")
    whole: Any = standing(model) if isinstance(model, Decoder) else model
    adapted = placed(whole, rank, alpha=alpha, targets=targets)
    names, drawings = _canonical(adapted), []
    for path, factor in factors(adapted).items():
        value = factor.get_raw_value()
        drawings.append(_Drawing(path, names[path], factor.get_metadata("dims"), value.shape, value.dtype))
    return with_factors(adapted, _drawn(tuple(drawings), seed))


def placed(model: AnyDecoder, rank: int, *, alpha: float | None = None, targets: Sequence[str] = TARGETS) -> AnyDecoder:
    """As `attach`, with shapes and dtypes in the place of factors; of a model that may be nothing else itself."""
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank is {rank!r}; wanted a whole number from 1 on")
    if alpha is not None and not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(f"alpha is {alpha}; wanted a number above 0")
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


class _Drawing(NamedTuple):
    """A factor that is to be drawn: one, or a stack of them."""

    path: str
    names: tuple[str, ...]  # the canonical one of each in a stack; they make the random numbers
    dims: str
    shape: tuple[int, ...]
    dtype: Any

    @property
    def is_first(self) -> bool:
        return self.dims.endswith(" r")

    @property
    def one(self) -> tuple[int, ...]:
        """The shape of one of a stack."""
        return self.shape[-len(self.dims.split()) :]


def _canonical(model: Decoder | ScannedDecoder) -> dict[str, tuple[str, ...]]:
    """Of each factor its name in the model as files have it, or the names of all in its stack."""
    turns = segments(model.config)
    starts = [0, *itertools.accumulate(len(specs) * count for specs, count in turns)]
    found = {}
    for path in factors(model):
        *place, room, _, _, _, part, side = path.split("/")  # layers_0, attn, qkv, kernel, pairs, q, a
        layers = [place[0]]
        if len(place) == 2:  # turns_0, layers_0
            turn, within = (int(one.rpartition("_")[2]) for one in place)
            specs, count = turns[turn]
            layers = [f"layers_{starts[turn] + i * len(specs) + within}" for i in range(count)]
        found[path] = tuple(f"{layer}/{room}/{part}/kernel/{side}" for layer in layers)
    return found


@functools.partial(jax.jit, static_argnums=0)
def _drawn(drawings: tuple[_Drawing, ...], seed: int) -> dict[str, Factor]:
    """Factors as they are in the beginning, where they lie on a mesh. Those of one shape are drawn at once."""
    alike: dict[tuple[str, tuple[int, ...], Any], list[_Drawing]] = {}
    for drawing in drawings:
        alike.setdefault((drawing.dims, drawing.one, drawing.dtype), []).append(drawing)
    found = {}
    for (dims, shape, dtype), members in alike.items():
        is_first = members[0].is_first
        names = [name for drawing in members for name in drawing.names]
        values = jnp.zeros((len(names), *shape), dtype)
        if is_first:
            numbers = jnp.asarray([zlib.crc32(name.encode()) for name in names], jnp.uint32)
            keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), numbers)
            values = jax.vmap(functools.partial(jax.random.normal, shape=shape, dtype=dtype))(keys)
            values = values * math.prod(shape[:-1]) ** -0.5
        ends = itertools.accumulate(len(drawing.names) for drawing in members)
        for drawing, end in zip(members, ends, strict=True):
            own = values[end - len(drawing.names) : end].reshape(drawing.shape)
            found[drawing.path] = Factor(own, dims=dims, inputs=len(shape) - 1 if is_first else 1)
    return logical.at_rest(found)


def factors(model: Decoder | ScannedDecoder) -> dict[str, Factor]:
    """What of a model is trained. Empty without an adapter."""
    return {path: param for path, param in parameters(model).items() if isinstance(param, Factor)}


def check_same(given: Mapping[str, nnx.Param], own: Mapping[str, nnx.Param]) -> None:
    """Raises ValueError if a state's parameters are not those of a model, by name and shape."""
    theirs, ours = ({path: param.get_raw_value().shape for path, param in one.items()} for one in (given, own))
    wrong = sorted(theirs.items() ^ ours.items())
    if wrong:
        path = wrong[0][0]
        raise ValueError(f"the state is of another model: {path} has the shape {theirs.get(path)} there, and "
                         f"{ours.get(path)} in the model (None: it has none)")  # fmt: skip


def with_factors(model: AnyDecoder, factors: Mapping[str, nnx.Param]) -> AnyDecoder:
    """The model with these values of its factors, or of other parameters."""
    adapted = jax.tree.map(lambda x: x, model)
    found = parameters(adapted)
    for path, factor in factors.items():
        found[path].set_raw_value(factor.get_raw_value())
    return adapted


def changes(model: Decoder | ScannedDecoder) -> dict[str, adapters.Change]:
    """The adapter of a model by the canonical paths of its weights, as files hold it.

    Raises ValueError if there is none, or if it lies on several processes.
    """
    whole = unstack(model) if isinstance(model, ScannedDecoder) else model
    found = {}
    for path, pair, scale in _pairs(whole):
        if not (pair.a[...].is_fully_addressable and pair.b[...].is_fully_addressable):
            raise ValueError(
                f"the adapter lies on several processes, {path} among it; gather it first, as by "
                "jax.experimental.multihost_utils.process_allgather(state.weights, tiled=True)"
            )
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
    Raises: FileExistsError if the destination is there; ValueError for another format, and as `changes`.
    """
    export.write_adapter(destination, format, changes(model), model.config.decoder)
