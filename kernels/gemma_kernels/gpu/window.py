"""What the GPU kernels of window attention share: a tile's keys and queries, its mask and its logits.

Triton has no blocks that are padded for it: a tile is loaded from the whole array, and rows beyond its end are masked.
Dimension letters as in `gemma_kernels.reference`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Bool, Int

from gemma_kernels import reference

MASKED = reference.MASKED


@dataclass(frozen=True)
class Window:
    """What is fixed of an attention; the rule is `reference.band_mask`'s."""

    window: int | None
    softcap: float | None = None
    offset: int = 0

    def __post_init__(self):
        if self.window is not None and self.window < 1:
            raise ValueError(f"window is {self.window}, wanted at least 1 (a query sees itself), or None for no window")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap is {self.softcap}, wanted more than 0, or None for no cap")
        if self.offset < 0:
            raise ValueError(f"offset is {self.offset}, wanted the key column of the first query, 0 or more")


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Queries and keys of one step, powers of 2 of at least 16, and what Triton needs to know of a kernel.

    num_warps: warps of 32 threads that share a tile; num_stages: tiles that are loaded ahead.
    """

    block_q: int
    block_kv: int
    num_warps: int = 4
    num_stages: int = 2

    def __post_init__(self):
        for name, size in (("block_q", self.block_q), ("block_kv", self.block_kv)):
            if size < 16 or size & (size - 1):
                raise ValueError(f"{name} is {size}, wanted a power of 2 of at least 16: what a tensor core takes")

    @property
    def compiler_params(self) -> plt.CompilerParams:
        return plt.CompilerParams(num_warps=self.num_warps, num_stages=self.num_stages)


def load_rows(ref, start: jax.Array, size: int, head: jax.Array | None = None) -> jax.Array:
    """Rows start .. start + size of ref, or of one of its heads; those beyond its end are 0."""
    leading = () if head is None else (head,)
    num_rows, *width = ref.shape[len(leading) :]
    inside = (start + jnp.arange(size) < num_rows).reshape(-1, *[1] * len(width))
    return plt.load(ref.at[(*leading, pl.ds(start, size), *[slice(None)] * len(width))], mask=inside, other=0)


def store_rows(ref, start: jax.Array, value: jax.Array) -> None:
    """Writes rows from `start` on, those that ref has."""
    inside = start + jnp.arange(value.shape[0]) < ref.shape[0]
    if len(ref.shape) == 2:
        plt.store(ref.at[pl.ds(start, value.shape[0]), :], value.astype(ref.dtype), mask=inside[:, None])
    else:
        plt.store(ref.at[pl.ds(start, value.shape[0])], value.astype(ref.dtype), mask=inside)


def key_tiles(kind: Window, first_query: jax.Array, tile: Tile, num_keys: int) -> tuple[jax.Array, jax.Array]:
    """Numbers of the first tile of keys that a tile of queries sees, and of the first behind those."""
    first_column = first_query + kind.offset
    stop = jnp.minimum(first_column + tile.block_q, num_keys)
    start = jnp.int32(0) if kind.window is None else jnp.maximum(first_column - kind.window + 1, 0)
    return jax.lax.div(start, tile.block_kv), jax.lax.div(stop + tile.block_kv - 1, tile.block_kv)


def query_tiles(kind: Window, first_key: jax.Array, tile: Tile, num_queries: int) -> tuple[jax.Array, jax.Array]:
    """Numbers of the first tile of queries that see a tile of keys, and of the first behind those."""
    start = jnp.maximum(first_key - kind.offset, 0)
    stop = jnp.int32(num_queries)
    if kind.window is not None:
        last_key = first_key + tile.block_kv - 1
        stop = jnp.clip(last_key + kind.window - kind.offset, 0, num_queries)
    return jax.lax.div(start, tile.block_q), jax.lax.div(stop + tile.block_q - 1, tile.block_q)


def product(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    """a times b, summed over an axis of each, in float32; float32 keeps its bits, of which TF32 would drop 13."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((a_axis,), (b_axis,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def tile_mask(
    kind: Window,
    query: Int[Array, "..."],
    key: Int[Array, "..."],
    num_keys: int,
    segments: tuple[jax.Array, jax.Array] | None,
) -> Bool[Array, "..."]:
    """True where a query sees a key, each given by its number: one as a column and one as a row, so are `segments`."""
    distance = query + kind.offset - key
    seen = (distance >= 0) & (key < num_keys)
    if kind.window is not None:
        seen &= distance < kind.window
    return seen if segments is None else seen & (segments[0] == segments[1])


def whole(array: jax.Array | jax.ShapeDtypeStruct, index: Callable[..., tuple[Any, ...]]) -> pl.BlockSpec:
    """All that `array` has at the leading numbers which `index` gives for a place in the grid: a head's rows, say."""

    def place(*grid):
        leading = index(*grid)
        return *leading, *[0] * (len(array.shape) - len(leading))

    num_leading = len(index(0, 0, 0))
    return pl.BlockSpec((*[None] * num_leading, *array.shape[num_leading:]), place)
