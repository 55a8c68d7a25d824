"""The programs that a model runs, for devices that need not be there: shapes and places of arrays, nothing computed."""

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding

import gemma_kernels
from gemma_jax.configs.config import ConfigError, DecoderConfig
from gemma_jax.generate import engine, sampling
from gemma_jax.nn import host, quantised
from gemma_jax.nn.cache import Cache, LayerCache, empty_cache, slot_names
from gemma_jax.nn.decoder import Decoder
from gemma_jax.nn.paths import parameters
from gemma_jax.nn.scanned import ScannedDecoder, refuse_unstacked
from gemma_jax.nn.shapes import shapes
from gemma_jax.parallel.partition import Partition
from gemma_jax.planner.arithmetic import PIECES
from gemma_jax.train import lora as adapters
from gemma_jax.train import losses, step

TRAINING_PASSES = 4  # through attention: forward, again for what was not kept, and two products backward
OPTIMIZER = optax.adamw(1e-4)  # its moments have the dtype of the weights
TRAINING = ("train", "lora")  # purposes
TOWERS = tuple(f"{name}/" for name in step.TOWERS)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A model on a mesh, and how much it is given."""

    config: DecoderConfig
    partition: Partition
    target: str | None  # of kernels, see `gemma_kernels.using`
    batch: int  # rows in all
    context: int  # tokens of a row: slots of a global layer's cache, or of training
    dtype: str = "bfloat16"
    ple: str = "device"
    chunk: int | None = None  # tokens of a row taken at once in prefill; None: the engine's
    rank: int = 16  # of an adapter

    @property
    def floats(self) -> str:
        """Of activations and caches, and of weights that are no int8 codes."""
        return "bfloat16" if self.dtype == quantised.DTYPE else self.dtype

    def scope(self) -> AbstractContextManager[None]:
        """Programs traced inside are those that run on the mesh; on one device they are those without a mesh."""
        return self.partition.scope() if self.partition.mesh.size > 1 else contextlib.nullcontext()


@dataclass(frozen=True, kw_only=True)
class Program:
    """One function of a model, ready to be compiled.

    held: what lies in the devices' memory, as trees of ShapeDtypeStructs with shardings: "weights", "cache",
        "adapter", "optimizer", "inputs". All of it are arguments of the program, used or not.
    traffic: bytes that one device's memory reads and writes at least, by what for.
    pairs: of queries and keys that attention has to look at, in all rows, heads and layers.
    """

    name: str
    lower: Callable[[], jax.stages.Lowered]
    held: Mapping[str, Any]
    traffic: Mapping[str, int]
    tokens: int  # that it takes in, of all rows
    pairs: int


def held(purpose: str, setting: Setting) -> dict[str, Any]:
    """What lies in memory for a purpose: "weights", and "cache", or "optimizer" and perhaps "adapter".

    Raises `logical.LogicalAxisError` if the mesh does not divide the weights.
    """
    if purpose not in TRAINING:
        return {"weights": abstract_model(setting), "cache": abstract_cache(setting)}
    config, partition = setting.config.decoder, setting.partition
    model = _shapes(config, "float32" if purpose == "train" else setting.dtype, _is_stackable(config))
    model = _placed(model, partition.weights(model))
    if purpose == "train":
        return {"weights": model, "optimizer": _at_rest(setting, jax.eval_shape(OPTIMIZER.init, model))}
    factors = _at_rest(setting, adapters.factors(adapters.placed(model, setting.rank)))
    optimizer = _at_rest(setting, jax.eval_shape(OPTIMIZER.init, factors))
    return {"weights": model, "adapter": factors, "optimizer": optimizer}


def _at_rest(setting: Setting, tree: Any) -> Any:
    """An abstract tree whose parameters lie as weights do, and all else whole; see `logical.at_rest`."""

    def placed(leaf: Any) -> Any:
        if not isinstance(leaf, nnx.Param):
            return _whole(setting, leaf)
        value = leaf.get_raw_value()
        return _placed(leaf, leaf.replace(setting.partition.weight(leaf.get_metadata("dims"), value.shape)))

    return jax.tree.map(placed, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Param))


@functools.lru_cache(maxsize=4)
def _shapes(config: DecoderConfig, dtype: str, is_stacked: bool) -> Any:
    """A model of which nothing but shapes is known; not to be changed."""
    if is_stacked:
        return nnx.eval_shape(lambda: ScannedDecoder(config, rngs=nnx.Rngs(0), dtype=dtype))
    return shapes(config, dtype)


def abstract_model(setting: Setting) -> Decoder:
    """The decoder's weights as they lie on the mesh. Raises `logical.LogicalAxisError` if they do not divide."""
    model = _shapes(setting.config, setting.floats, False)
    model = quantised.abstract(model) if setting.dtype == quantised.DTYPE else model
    placed = _placed(model, setting.partition.weights(model))
    if setting.ple == "host":
        pieces = parameters(placed)[PIECES]
        value = pieces.get_raw_value()
        there = host.host_sharding(value.sharding)
        pieces.set_raw_value(jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=there))
    return placed


def abstract_cache(setting: Setting) -> Cache:
    """As `empty_cache` makes it on the mesh."""
    config, partition = setting.config, setting.partition
    cache = jax.eval_shape(lambda: empty_cache(config, setting.batch, setting.context, setting.floats))

    def placed(x: Any, *names: str | None) -> Any:
        spec = partition.rules.spec(names, x.shape, partition.mesh.shape)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(partition.mesh, spec))

    layers = []
    for spec, layer in zip(config.layers, cache.layers, strict=True):
        names = slot_names(is_global=config.kind(spec).window is None)
        layers.append(LayerCache(placed(layer.keys, *names), placed(layer.values, *names)))
    return Cache(tuple(layers), placed(cache.lengths, "batch"))


def decode(setting: Setting) -> list[Program]:
    """One token of each row, greedy, with a full cache: the body of the loop in `engine.decode_chunk`."""
    rest = held("decode", setting)
    model, cache = rest["weights"], rest["cache"]
    rows = [sampling.sampling_params(temperature=0.0)] * setting.batch
    plan = sampling.plan(rows)

    def others() -> tuple[Any, ...]:
        idle = jnp.zeros((setting.batch,), jnp.int32)
        limits = engine.Limits(idle, jnp.zeros((setting.batch, engine.MAX_STOP_IDS), jnp.int32))
        return idle, idle > 0, sampling.sampler(rows, setting.config.vocab_size), limits

    idle, is_done, sampler, limits = _whole(setting, jax.eval_shape(others))
    state = engine.State(cache, idle, idle, is_done, None)
    step = jax.jit(engine.decode_step, static_argnames="plan", donate_argnames="state", keep_unused=True)
    return [
        Program(
            name="decode",
            lower=lambda: _lowered(setting, step, model, state, sampler, limits, plan),
            held={**rest, "inputs": (idle, idle, is_done, sampler, limits)},
            traffic={"weights": decoder_bytes(model), "cache": device_bytes(cache)},
            tokens=setting.batch,
            pairs=setting.batch * _pairs(setting.config, setting.context - 1, 1),
        )
    ]


def prefill(setting: Setting) -> list[Program]:
    """A prompt's first chunk, and the last one, before which the cache has all others, if it takes several."""
    rest = held("prefill", setting)
    model, cache = rest["weights"], rest["cache"]
    with setting.scope():
        sizes = engine.chunk_sizes(setting.context, setting.chunk)
    step = jax.jit(
        inspect.unwrap(engine.prefill_chunk), static_argnames="is_first", donate_argnames=("cache", "last"),
        keep_unused=True,
    )  # fmt: skip

    def program(name: str, size: int, before: int) -> Program:
        def inputs() -> tuple[jax.Array, ...]:
            shape, dtype = (setting.batch, setting.config.width), model.final_norm.scale.dtype
            numbers = jnp.zeros((setting.batch, size), jnp.int32)
            return numbers, numbers[:, 0], jnp.zeros(shape, dtype)

        tokens, counts, last = _whole(setting, jax.eval_shape(inputs))
        read = device_bytes(cache) * (before + size) // setting.context
        return Program(
            name=name,
            lower=lambda: _lowered(setting, step, model, tokens, counts, cache, last, before == 0),
            held={**rest, "inputs": (tokens, counts, last)},
            traffic={"weights": decoder_bytes(model), "cache": read},
            tokens=setting.batch * size,
            pairs=setting.batch * _pairs(setting.config, before, size),
        )

    first = program(f"prefill, first {sizes[0]:,} tokens", sizes[0], 0)
    if len(sizes) == 1:
        return [first]
    return [first, program(f"prefill, last {sizes[-1]:,} tokens", sizes[-1], setting.context - sizes[-1])]


def train(setting: Setting) -> list[Program]:
    """A step of AdamW on all weights of the decoder, without towers: float32, computed with in the setting's dtype."""
    rest = held("train", setting)
    state = step.State(rest["weights"], rest["optimizer"])
    return [_training("train", setting, rest, state, None, setting.dtype)]


def lora(setting: Setting) -> list[Program]:
    """A step of AdamW on an adapter of all kernels, beside weights in the setting's dtype; see `train.lora`."""
    rest = held("lora", setting)
    state = step.State(rest["adapter"], rest["optimizer"])
    return [_training("lora", setting, rest, state, adapters.placed(rest["weights"], setting.rank), None)]


def _training(
    name: str, setting: Setting, rest: Mapping[str, Any], state: step.State, adapted: Any, dtype: str | None
) -> Program:
    partition, shape = setting.partition, (setting.batch, setting.context)
    spec = partition.rules.spec(("batch", "act_seq"), shape, partition.mesh.shape)
    tokens: Any = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(partition.mesh, spec))
    compiled = step.program(OPTIMIZER, dtype=dtype, is_remat=True)
    changed = [name for name in rest if adapted is None or name != "weights"]  # read and written
    return Program(
        name=name,
        lower=lambda: _lowered(setting, compiled, state, losses.Batch(tokens), adapted),
        held={**rest, "inputs": tokens},
        traffic={name: (1 + (name in changed)) * device_bytes(tree) for name, tree in rest.items()},
        tokens=setting.batch * setting.context,
        pairs=TRAINING_PASSES * setting.batch * _pairs(setting.config, 0, setting.context),
    )


PURPOSES: Mapping[str, Callable[[Setting], list[Program]]] = {
    "decode": decode, "prefill": prefill, "train": train, "lora": lora,
}  # fmt: skip


def _is_stackable(config: DecoderConfig) -> bool:
    try:
        refuse_unstacked(config)
    except ConfigError:
        return False
    return True


def _lowered(setting: Setting, step: Any, *arguments: Any) -> jax.stages.Lowered:
    with setting.scope(), gemma_kernels.using(setting.target):
        return step.lower(*arguments)


def _pairs(config: DecoderConfig, before: int, count: int) -> int:
    """Queries times keys they see, over all heads and layers, of `count` tokens of one row after `before` others."""
    total = 0
    for spec in config.layers:
        window = config.kind(spec).window or before + count
        whole = min(count, max(0, window - before))  # tokens that see all before them
        total += whole * before + whole * (whole + 1) // 2 + (count - whole) * window
    return total * config.attention.num_heads


def _whole(setting: Setting, tree: Any) -> Any:
    return _placed(tree, jax.tree.map(lambda _: setting.partition.whole(), tree))


def _placed(tree: Any, shardings: Any) -> Any:
    """Abstract arrays that lie somewhere."""
    return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, shardings)


def device_bytes(tree: Any) -> int:
    """Of abstract arrays, what one device's memory holds; tables on the host count nothing."""
    return sum(_shard_bytes(x) for x in jax.tree.leaves(tree) if x.sharding.memory_kind != host.KIND)


def host_bytes(tree: Any) -> int:
    """Of abstract arrays, what the host's memory holds for one device."""
    return sum(_shard_bytes(x) for x in jax.tree.leaves(tree)) - device_bytes(tree)


def decoder_bytes(model: nnx.Module) -> int:
    """What one device holds of the weights that text passes through: no towers, no table that is read by rows."""
    values = {path: param.get_raw_value() for path, param in parameters(model).items()}
    return sum(device_bytes(value) for path, value in values.items() if not path.startswith((*TOWERS, PIECES)))


def _shard_bytes(x: Any) -> int:
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
