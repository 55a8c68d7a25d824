"""What lies in a device's memory, from shapes and rules alone: exact, at once, for any mesh, without devices."""

import functools
import math
from collections import Counter
from collections.abc import Mapping

import jax.numpy as jnp
from jax.sharding import PartitionSpec

from gemma_jax.configs.config import DecoderConfig
from gemma_jax.nn import logical
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
    itemsize = jnp.dtype(dtype).itemsize
    weights = weight_bytes(config, rules, sizes, itemsize, skips_pieces=ple == "host")
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
    config: DecoderConfig, rules: Rules, sizes: Sizes, itemsize: int, *, skips_pieces: bool = False
) -> int:
    """Of all weights the parts that one device holds."""
    total = 0
    for (path, dims, shape), count in _weights(config).items():
        if not (skips_pieces and path == PIECES):
            total += count * _held(logical.weight_spec(rules, dims, shape, sizes), shape, sizes)
    return total * itemsize


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


@functools.lru_cache(maxsize=8)
def _weights(config: DecoderConfig) -> Counter[tuple[str, str, tuple[int, ...]]]:
    """How many weights there are of each kind: the path of those that are one of a kind, dimensions, and shape."""
    model = shapes(config)
    return Counter(
        (path if path == PIECES else "", param.get_metadata("dims"), param.get_raw_value().shape)
        for path, param in parameters(model).items()
    )


def _held(spec: PartitionSpec, shape: tuple[int, ...], sizes: Sizes) -> int:
    """Elements of an array on one device."""
    parts = (logical.axes_at(spec, dimension) for dimension in range(len(shape)))
    return math.prod(
        size // math.prod(sizes.get(axis, 1) for axis in axes) for size, axes in zip(shape, parts, strict=True)
    )
