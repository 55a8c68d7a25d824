"""A parameter's value from an open checkpoint: as floats, sharded or not, or stored as the file has it."""

import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from gemma_checkpoints.names import Weights
from gemma_checkpoints.subset import Subset
from gemma_jax.nn.paths import Place
from gemma_jax.nn.stored import Piece, Stored
from gemma_kernels import blocks
from gemma_kernels.blocks import Encoding

ALIGNMENT = 64  # bytes; JAX on CPU uses a numpy buffer as it is when it begins at a multiple of this
Placement = Sharding | Callable[[str, tuple[int, ...]], Sharding | None]
Members = Sequence[tuple[str, Place]]  # of a parameter: its weights by path; a fused one has several


def fill(source: Weights | Subset, members: Members, dtype: str, sharding: Placement | None) -> None:
    """Reads a parameter, shard by shard: of the file each process reads what its devices hold."""
    param = members[0][1].param
    shape = param.get_raw_value().shape
    shards: dict[tuple[tuple[int, int], ...], np.ndarray] = {}  # replicas are read once

    def shard(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        if bounds not in shards:
            region = tuple(slice(*pair) for pair in bounds)
            shards[bounds] = buffer = _aligned(tuple(stop - start for start, stop in bounds), dtype)
            for path, place in members:
                view, part = place.within(buffer, region)
                if view.size:
                    source.read(path, view, part)
        return shards[bounds]

    to = placed(sharding, param.get_metadata("dims"), shape)
    if to is None or isinstance(to, SingleDeviceSharding):
        param.set_raw_value(_on_device(shard(tuple(slice(None) for _ in shape)), to))
        return
    param.set_raw_value(jax.make_array_from_callback(shape, to, shard))


def placed(sharding: Placement | None, dims: str, shape: tuple[int, ...]) -> Sharding | None:
    """Where a parameter of these dimensions goes."""
    return sharding if sharding is None or isinstance(sharding, Sharding) else sharding(dims, shape)


def fill_stored(source: Weights, members: Members) -> None:
    """Reads a parameter as the file stores it, if it is a matrix or table in encodings that there are kernels for; else
    as float32.
    """
    param = members[0][1].param
    num_inputs: int | None = param.get_metadata("inputs", None)
    pieces = [] if num_inputs is None else _pieces(source, members, num_inputs)
    if pieces:
        param.set_raw_value(Stored(tuple(pieces), param.get_raw_value().shape))
    else:
        fill(source, members, "float32", None)


def _pieces(source: Weights, members: Members, num_inputs: int) -> list[Piece]:
    """Of all weights of a parameter in their order, or of none, if one of them cannot stay as it is."""
    ordered = sorted(members, key=lambda member: member[1].part.start if member[1].part else 0)
    kept = [(path, place.shape, _kept(source, path, num_inputs)) for path, place in ordered]
    if any(encoding is None for _, _, encoding in kept):
        return []
    return [
        Piece(_on_device(_matrix(source, path, shape, num_inputs, encoding)), encoding.name)
        for path, shape, encoding in kept
        if encoding is not None
    ]


def stored_bytes(source: Weights, places: Mapping[str, Place]) -> dict[str, int]:
    """What weights take that `fill_stored` reads, by path; nothing is read."""
    members: dict[str, list[str]] = {}
    for path, place in places.items():
        members.setdefault(place.name, []).append(path)
    held: dict[str, int] = {}
    for paths in members.values():
        num_inputs = places[paths[0]].param.get_metadata("inputs", None)
        kept = [None if num_inputs is None else _kept(source, path, num_inputs) for path in paths]
        for path, encoding in zip(paths, kept, strict=True):
            size, each = math.prod(places[path].shape), None if None in kept else encoding
            held[path] = 4 * size if each is None else size // each.values * each.size
    return held


def _kept(source: Weights, path: str, num_inputs: int) -> Encoding | None:
    """What a weight stays in; None if there is no kernel for it, or the file's rows are not ours."""
    stored = source.encoding(path)
    kept = None if stored is None else blocks.ENCODINGS.get(stored.name.lower())
    has_form = kept is not None and (kept.values == 1 or source.entries[path].has_rows(num_inputs))
    return kept if has_form else None


def _matrix(source: Weights, path: str, shape: tuple[int, ...], num_inputs: int, encoding: Encoding) -> np.ndarray:
    """A weight of our `shape` by its outputs (a table by its rows), as it is stored."""
    inputs, outputs = (shape[:num_inputs], shape[num_inputs:]) if num_inputs else (shape[1:], shape[:1])
    data = _aligned((math.prod(outputs), encoding.width(math.prod(inputs))), encoding.dtype)
    if encoding.values > 1:
        source.read_rows(path, data)
        return data
    whole = data.reshape(*outputs, *inputs)
    source.read(path, np.moveaxis(whole, range(len(outputs)), range(-len(outputs), 0)) if num_inputs else whole)
    return data


def _on_device(buffer: np.ndarray, to: Sharding | None = None) -> jax.Array:
    """On CPU no copy: the buffer is not written again."""
    return jax.device_put(buffer, to, may_alias=True)


def _aligned(shape: tuple[int, ...], dtype: str | jnp.dtype) -> np.ndarray:
    size = int(np.prod(shape)) * jnp.dtype(dtype).itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(jnp.dtype(dtype)).reshape(shape)
