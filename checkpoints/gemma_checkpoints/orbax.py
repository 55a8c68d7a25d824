"""Reads Orbax checkpoints, ours and DeepMind's: OCDBT or one folder a tensor, zarr 2 or 3, through TensorStore.

A checkpoint is a tree of arrays; the name of a tensor is its path in the tree with "/" between. Ours have a manifest
(see `manifest`), and every piece that is read is compared with it.
Source: orbax-checkpoint 0.12, `_METADATA` of the PyTree handler.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from gemma_checkpoints import encodings, manifest
from gemma_checkpoints.encodings import Encoding
from gemma_checkpoints.reader import CheckpointError, Reader, TensorInfo

TREE = "_METADATA"
ITEMS = ("state", "default", "params", "pytree")  # subfolders in which a checkpoint may keep its tree
CONFIG = "gemma_jax.json"  # ours, beside the tree: the model's config
MAX_TREE_BYTES, MAX_TENSORS = 100_000_000, 20_000  # each is opened
MAX_PIECE_BYTES = 4 << 30  # of one stored chunk, which is read whole
ENCODINGS: dict[str, Encoding] = {
    "float64": encodings.F64,
    "float32": encodings.F32,
    "float16": encodings.F16,
    "bfloat16": encodings.BF16,
    "int64": encodings.I64,
    "int32": encodings.I32,
    "int8": encodings.I8,
    "uint8": encodings.U8,
}
READ_AHEAD = 2  # pieces
COMPRESSIONS = ("zstd", "gzip", "blosc", "bz2", "zlib")
MAX_COMPRESSION = 1000  # to one: zeros are smaller still, but a checkpoint is not all zeros


def tree_folder(path: Path) -> Path | None:
    """The folder below (or at) `path` that holds an Orbax tree; None if there is none."""
    for place in (path, *(path / item for item in ITEMS)):
        if (place / TREE).is_file():
            return place
    others = [found.parent for found in path.glob(f"*/{TREE}")]  # as in downloads, beside a tokenizer
    return others[0] if len(others) == 1 else None


class OrbaxReader(Reader):
    """An open Orbax checkpoint. `metadata` is the content of its gemma_jax.json, empty for checkpoints of others.

    `format` is "deepmind" if the names are those of DeepMind's library and "orbax" if they are ours.
    Raises CheckpointError for damaged checkpoints.
    """

    def __init__(self, path: str | os.PathLike):
        path = Path(path)
        tree = tree_folder(path)
        if tree is None:
            raise CheckpointError(f"{path} has no Orbax checkpoint: no {TREE} in it or in one of its folders")
        self.manifest = manifest.read(path)
        if self.manifest is not None:  # what is read but the payload, whose pieces are compared one by one
            small = [file.name for file in path.iterdir() if file.is_file() and file.name != manifest.NAME]
            manifest.check(path, self.manifest, {*small, (tree / TREE).relative_to(path).as_posix()})
        self._stores = _open_all(tree, _tree(tree / TREE))
        tensors = {}
        for number, (name, store) in enumerate(self._stores.items()):
            encoding = ENCODINGS[store.dtype.name]
            size = int(np.prod(store.shape, dtype=object)) * encoding.size
            tensors[name] = TensorInfo(name, tuple(store.shape), encoding, tree, number, size)
        self._check_pieces(path)
        is_theirs = any(name.endswith("embedder/input_embedding") for name in tensors)
        self.format = "deepmind" if is_theirs else "orbax"
        config = path / CONFIG
        if self.format == "orbax" and self.manifest is None and config.is_file():
            raise CheckpointError(
                f"{path} has no {manifest.NAME}, so damage could not be seen; get the checkpoint anew"
            )
        super().__init__(path, _json(config) if config.is_file() else {}, tensors)

    def close(self) -> None:
        """TensorStore keeps no file open between reads."""

    def digest(self, name: str) -> str:
        """SHA-256 of a tensor's values as stored, in row-major order; see `Writer.digests`."""
        return hashlib.sha256(self.raw(name).data).hexdigest()

    def raw(self, name: str) -> np.ndarray:
        """A tensor as bytes in row-major order, in the stored dtype."""
        out = np.empty(self.tensors[name].shape, self._stores[name].dtype.numpy_dtype)
        if out.size:
            self._fill(self.tensors[name], out, (0,) * out.ndim)
        return out.reshape(-1).view(np.uint8)

    def piece_digests(self, name: str) -> tuple[str, ...]:
        """SHA-256 of each stored chunk of a tensor, in row-major order of the chunks."""
        return tuple(_digest(piece) for _, piece in self._pieces(name, _chunks(self._stores[name])))

    def _fill(self, info: TensorInfo, out: np.ndarray, begin: tuple[int, ...]) -> None:
        """Whole chunks are read, those that the region meets, and compared with the manifest."""
        store = self._stores[info.name]
        known = self.manifest.pieces[info.name] if self.manifest else None
        wanted = [slice(first, first + size) for first, size in zip(begin, out.shape, strict=True)]
        meeting = [
            (number, chunk)
            for number, chunk in _chunks(store)
            if all(a.start < w.stop and w.start < a.stop for a, w in zip(chunk, wanted, strict=True))
        ]
        for (number, chunk), (_, piece) in zip(meeting, self._pieces(info.name, iter(meeting)), strict=True):
            if known is not None and _digest(piece) != known[number]:
                raise CheckpointError(
                    f"{self.path}: tensor {info.name!r} is damaged (piece {number} of {len(known)} has not the digest "
                    "it was written with); get the checkpoint anew"
                )
            into, of = [], []
            for a, w in zip(chunk, wanted, strict=True):
                low, high = max(a.start, w.start), min(a.stop, w.stop)
                into.append(slice(low - w.start, high - w.start))
                of.append(slice(low - a.start, high - a.start))
            out[tuple(into)] = piece[tuple(of)]

    def _pieces(self, name: str, chunks: Iterator[tuple[int, tuple[slice, ...]]]) -> Iterator[tuple[int, np.ndarray]]:
        """The values of chunks, the next ones being read meanwhile."""
        store = self._stores[name]
        ahead: list[tuple[int, Any]] = []
        try:
            for number, chunk in chunks:
                ahead.append((number, store[chunk].read()))
                if len(ahead) > READ_AHEAD:
                    first, future = ahead.pop(0)
                    yield first, future.result()
            for number, future in ahead:
                yield number, future.result()
        except (ValueError, OSError) as error:
            raise CheckpointError(f"{self.path}: tensor {name!r} cannot be read: {_short(error)}") from None
        finally:
            for _, future in ahead:
                future.exception()  # waits; see `_open_all`

    def _check_pieces(self, path: Path) -> None:
        if self.manifest is None:
            return
        for name, store in self._stores.items():
            count, known = sum(1 for _ in _chunks(store)), len(self.manifest.pieces.get(name, ()))
            if count != known:
                raise CheckpointError(
                    f"{path}: tensor {name!r} is stored in {count} pieces; the manifest knows {known}"
                )
        if lost := sorted(set(self.manifest.pieces) - set(self._stores)):
            raise CheckpointError(f"{path}: tensor {lost[0]!r} is in the manifest, and not in the checkpoint")


def _tree(path: Path) -> tuple[list[tuple[str, ...]], dict[str, Any]]:
    """The paths of all arrays, and the options that say how they are stored."""
    if path.stat().st_size > MAX_TREE_BYTES:
        raise CheckpointError(f"{path} has {path.stat().st_size} bytes; wanted at most {MAX_TREE_BYTES}")
    options = _json(path)
    entries = options.pop("tree_metadata", None)
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path} has no tree_metadata; is it an Orbax checkpoint of a tree of arrays?")
    if len(entries) > MAX_TENSORS:
        raise CheckpointError(f"{path} lists {len(entries)} arrays; wanted at most {MAX_TENSORS}")
    paths = []
    for key, entry in entries.items():
        try:
            names = tuple(str(part["key"]) for part in entry["key_metadata"])
            is_array = not entry["value_metadata"].get("skip_deserialize", False)
        except (KeyError, TypeError, AttributeError):
            raise CheckpointError(f"{path}: entry {key!r} of the tree is damaged") from None
        if not names or not all(_is_plain(name) for name in names):
            raise CheckpointError(f"{path}: {key!r} is no path of an array")
        if is_array:
            paths.append(names)
    return paths, options


def _is_plain(name: str) -> bool:
    is_text = not any("\ud800" <= letter <= "\udfff" for letter in name)  # half of a pair has no UTF-8
    return is_text and "\0" not in name and name not in ("", ".", "..")


def _open_all(folder: Path, tree: tuple[list[tuple[str, ...]], dict[str, Any]]) -> dict[str, Any]:
    """A TensorStore for each array, by its path with "/"."""
    paths, options = tree
    base = {"driver": "file", "path": f"{folder.resolve().as_posix()}/"}
    context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
    specs = {}
    for names in paths:
        key = ".".join(names) + "/"
        stored = {"driver": "file", "path": f"{folder.resolve().as_posix()}/{key}"}
        if options.get("use_ocdbt", True):
            stored = {"driver": "ocdbt", "base": base, "path": key}
        elif ".." in Path(key).parts or Path(key).is_absolute():
            raise CheckpointError(f"{folder}: {key!r} lies outside of the checkpoint")
        driver = "zarr3" if options.get("use_zarr3") else "zarr"
        name = "/".join(names)
        if name in specs:
            raise CheckpointError(f"{folder}: there are two tensors {name!r}")
        specs[name] = {"driver": driver, "kvstore": stored, "fill_missing_data_reads": False}
    futures = {name: ts.open(spec, open=True, read=True, context=context) for name, spec in specs.items()}
    stores, problems = {}, {}
    for name, future in futures.items():  # all are waited for: one that is dropped while it runs can crash the process
        try:
            stores[name] = future.result()
        except (ValueError, OSError) as error:
            problems[name] = _short(error)
    for name, problem in problems.items():
        raise CheckpointError(f"{folder}: tensor {name!r} cannot be opened: {problem}")
    for name, store in stores.items():
        _check(folder, name, store)
    _check_room(folder, stores)
    return stores


def _check_room(folder: Path, stores: Mapping[str, Any]) -> None:
    """Nothing that is claimed to be larger than its files can hold is ever allocated."""
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    for name, store in stores.items():
        size = int(np.prod(store.shape, dtype=object)) * store.dtype.numpy_dtype.itemsize
        is_compressed = any(word in json.dumps(store.spec().to_json()) for word in COMPRESSIONS)
        if size > there * (MAX_COMPRESSION if is_compressed else 1):
            raise CheckpointError(
                f"{folder}: tensor {name!r} of shape {list(store.shape)} claims {size} bytes, but all files together "
                f"have {there}"
            )


def _check(folder: Path, name: str, store: Any) -> None:
    if store.dtype.name not in ENCODINGS:
        raise CheckpointError(
            f"{folder}: tensor {name!r} has dtype {store.dtype.name}; can be read: {', '.join(ENCODINGS)}"
        )
    if any(store.origin):
        raise CheckpointError(f"{folder}: tensor {name!r} starts at {store.origin}; wanted zeros")
    chunk = min(int(np.prod(part, dtype=object)) for part in (_chunk_shape(store), store.shape))
    if chunk * ENCODINGS[store.dtype.name].size > MAX_PIECE_BYTES:
        raise CheckpointError(f"{folder}: tensor {name!r} is stored in pieces of more than {MAX_PIECE_BYTES} bytes")


def _chunk_shape(store: Any) -> tuple[int, ...]:
    return tuple(store.chunk_layout.read_chunk.shape or store.shape)


def _chunks(store: Any) -> Iterator[tuple[int, tuple[slice, ...]]]:
    """The stored chunks of an array as regions, in row-major order."""
    starts = [range(0, size, max(1, step)) for size, step in zip(store.shape, _chunk_shape(store), strict=True)]
    for number, first in enumerate(itertools.product(*starts)):
        regions = zip(first, _chunk_shape(store), store.shape, strict=True)
        yield number, tuple(slice(at, min(at + step, size)) for at, step, size in regions)


def _digest(piece: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data).hexdigest()


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a {type(data).__name__}; wanted an object")
    return data


def _short(error: Exception) -> str:
    """TensorStore appends its whole specification to what it says."""
    return str(error).split(" [tensorstore_spec", maxsplit=1)[0]
