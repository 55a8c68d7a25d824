"""What lies in a device's memory, from shapes and rules alone: exact, at once, for any mesh, without devices."""

import functools
import math
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jax.sharding import PartitionSpec

from gemma_jax.configs.config import DecoderConfig
from gemma_jax.nn import logical, quantised
from gemma_jax.nn.cache import slot_counts, slot_names
from gemma_jax.nn.logical import Rules
from gemma_jax.nn.paths import parameters
from gemma_jax.nn.shapes import shapes
from gemma_jax.train import lora

PIECES = "embedder/ple"
MASTER = 4  # bytes of a weight in training, and of each of AdamW's two moments: float32
COUNTER = 4  # bytes of AdamW's count of steps, and of a row's length in a cache

Sizes = Mapping[str, int]  # of a mesh's axes


def served(
    config: DecoderConfig, rules: Rules, sizes: Sizes, batch: int, context: int, dtype: str, ple: str
) -> dict[str, int]:
    """Bytes of weights and cache on one device. Raises `logical.LogicalAxisError` if the mesh does not divide them."""
    is_int8 = dtype == quantised.DTYPE
    itemsize = jnp.dtype("bfloat16" if is_int8 else dtype).itemsize
    weights = weight_bytes(config, rules, sizes, itemsize, skips_pieces=ple == "host", is_int8=is_int8)
    return {"weights": weights, "cache": cache_bytes(config, rules, sizes, batch, context, itemsize)}


def trained(config: DecoderConfig, rules: Rules, sizes: Sizes) -> dict[str, int]:
    """Bytes of weights and AdamW's moments on one device, without towers. Raises as `served`."""
    weights = weight_bytes(config.decoder, rules, sizes, MASTER)
    return {"weights": weights, "optimizer": 2 * weights + COUNTER}


def adapted(config: DecoderConfig, rules: Rules, sizes: Sizes, dtype: str, rank: int) -> dict[str, int]:
    """Bytes of weights that stay, an adapter of all kernels, and AdamW's moments of that, on one device, without
    towers. Raises as `served`.
    """
    weights = weight_bytes(config.decoder, rules, sizes, jnp.dtype(dtype).itemsize)
    factors = lora.factors(lora.placed(shapes(config.decoder), rank)).values()
    adapter = MASTER * sum(
        _held(logical.weight_spec(rules, one.get_metadata("dims"), shape, sizes), shape, sizes)
        for one, shape in ((one, one.get_raw_value().shape) for one in factors)
    )
    return {"weights": weights, "adapter": adapter, "optimizer": 2 * adapter + COUNTER}


def weight_bytes(
    config: DecoderConfig,
    rules: Rules,
    sizes: Sizes,
    itemsize: int,
    *,
    skips_pieces: bool = False,
    is_int8: bool = False,
) -> int:
    """Of all weights the parts that one device holds; `itemsize` is that of floats."""
    total = 0
    for kind, count in _weights(config).items():
        if skips_pieces and kind.path == PIECES:
            continue
        held = _held(logical.weight_spec(rules, kind.dims, kind.shape, sizes), kind.shape, sizes)
        if is_int8 and kind.num_inputs is not None:  # a byte of each weight, and scales, which lie whole
            total += count * (held + itemsize * math.prod(kind.shape[kind.num_inputs :]))
        else:
            total += count * held * itemsize
    return total


def cache_bytes(config: DecoderConfig, rules: Rules, sizes: Sizes, batch: int, context: int, itemsize: int) -> int:
    """Of the caches of all layers the parts that one device holds."""
    heads, width = config.attention.num_kv_heads, config.attention.head_dim
    are_global = (config.kind(spec).window is None for spec in config.layers)
    kinds = Counter(zip(are_global, slot_counts(config, context), strict=True))
    total = 0
    for (is_global, slots), count in kinds.items():
        shape = (batch, heads, slots, width)
        spec = rules.spec(slot_names(is_global=is_global), shape, sizes)
        total += 2 * count * _held(spec, shape, sizes)
    rows = _held(rules.spec(("batch",), (batch,), sizes), (batch,), sizes)
    return total * itemsize + rows * COUNTER


class _Kind(NamedTuple):
    path: str  # of weights that are one of a kind; "" of others
    dims: str
    shape: tuple[int, ...]
    num_inputs: int | None  # of kernels that are int8 in a quantised model; None of others


@functools.lru_cache(maxsize=8)
def _weights(config: DecoderConfig) -> Counter[_Kind]:
    """How many weights there are of each kind."""
    found = Counter[_Kind]()
    for path, param in parameters(shapes(config)).items():
        num_inputs = param.get_metadata("inputs") if quantised.is_quantised(path) else None
        own = path if path == PIECES else ""
        found[_Kind(own, param.get_metadata("dims"), param.get_raw_value().shape, num_inputs)] += 1
    return found


def _held(spec: PartitionSpec, shape: tuple[int, ...], sizes: Sizes) -> int:
    """Elements of an array on one device."""
    parts = (logical.axes_at(spec, dimension) for dimension in range(len(shape)))
    return math.prod(
        size // math.prod(sizes.get(axis, 1) for axis in axes) for size, axes in zip(shape, parts, strict=True)
    )
