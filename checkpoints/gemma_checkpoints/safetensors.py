"""Reads Hugging Face folders: config.json and weights as safetensors, in one file or sharded with an index.

Source: github.com/huggingface/safetensors, README, Format.
"""

import dataclasses
import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from gemma_checkpoints import encodings
from gemma_checkpoints.encodings import Encoding
from gemma_checkpoints.reader import CheckpointError, Reader, TensorInfo

MODULES = "modules.json"
INDEX = "model.safetensors.index.json"
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
ENCODINGS: dict[str, Encoding] = {
    name: getattr(encodings, name)
    for name in ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8")
}


class SafetensorsReader(Reader):
    """An open folder (or a single .safetensors file). `metadata` is its config.json, empty if there is none.

    Raises CheckpointError for damaged files, shards that are missing and tensors that are not where the index says.
    """

    format = "huggingface"

    def __init__(self, path: str | os.PathLike):
        path = Path(path)
        folder = path if path.is_dir() else path.parent
        config = folder / "config.json"
        tensors = _folder(path) if path.is_dir() else _header(path)
        metadata = _json(config) if config.exists() else {}
        if path.is_dir() and (path / MODULES).exists():
            metadata["sentence_transformers"] = modules = _modules(path)
            for module in modules:
                tensors |= _module_tensors(path / module["path"]) if module["path"] else {}
        super().__init__(path, metadata, tensors)


def _modules(folder: Path) -> list[dict[str, Any]]:
    """modules.json of sentence-transformers: the parts of an embedding model, each with the config of its folder."""
    try:
        listing = json.loads((folder / MODULES).read_bytes())
        modules: list[dict[str, Any]] = [
            {"path": str(module["path"]), "type": str(module["type"])} for module in listing
        ]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / MODULES} is no list of modules: {error!r}") from None
    for module in modules:
        path = module["path"]
        if path and (Path(path).name != path or path in (".", "..") or "\0" in path):
            raise CheckpointError(f"{folder / MODULES} names {path!r}, which is not a folder of its own")
        config = folder / path / "config.json"
        module["config"] = _json(config) if path and config.is_file() else {}
    return modules


def _module_tensors(folder: Path) -> dict[str, TensorInfo]:
    """The tensors of a module's folder, by names such as "2_Dense/linear.weight"."""
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    infos = [info for file in files for info in _header(file).values()]
    return {(name := f"{folder.name}/{info.name}"): dataclasses.replace(info, name=name) for info in infos}


def _folder(folder: Path) -> dict[str, TensorInfo]:
    if (folder / INDEX).exists():
        return _indexed(folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} has no *.safetensors")
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in _header(file).items():
            if name in tensors:
                raise CheckpointError(f"tensor {name!r} is in {tensors[name].file.name} and in {file.name} of {folder}")
            tensors[name] = info
    return tensors


def _indexed(folder: Path) -> dict[str, TensorInfo]:
    shard_of = _json(folder / INDEX).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(shard, str) for shard in shard_of.values()):
        raise CheckpointError(f"{folder / INDEX} has no weight_map from tensors to files")
    shards = sorted(set(shard_of.values()))
    if outside := [shard for shard in shards if not shard or Path(shard).name != shard]:
        raise CheckpointError(f"{folder / INDEX} names {outside[0]!r}, which is not a file of its folder")
    there = set(os.listdir(folder))
    if missing := [shard for shard in shards if shard not in there]:
        count = sum(shard in missing for shard in shard_of.values())
        raise CheckpointError(f"{folder} lacks {', '.join(missing)} with {count} tensors; download the rest of it")
    headers = {shard: _header(folder / shard) for shard in shards}
    if lost := [name for name, shard in shard_of.items() if name not in headers[shard]]:
        raise CheckpointError(f"{folder / shard_of[lost[0]]} has no tensor {lost[0]!r}, but {INDEX} says so")
    return {name: headers[shard][name] for name, shard in shard_of.items()}


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a {type(data).__name__}; wanted an object")
    return data


def _header(path: Path) -> dict[str, TensorInfo]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER, size - 8):
            raise CheckpointError(
                f"{path} is not a whole safetensors file: {size} bytes, and a header of {length} claimed"
            )
        text = file.read(length)
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not JSON: {error}") from None
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path}: the header is a {type(entries).__name__}; wanted an object")
    entries.pop("__metadata__", None)
    infos = {name: _info(path, name, entry, 8 + length, size) for name, entry in entries.items()}
    ordered = sorted(infos.values(), key=lambda info: info.offset)
    for before, after in itertools.pairwise(ordered):
        if before.offset + before.nbytes > after.offset:
            raise CheckpointError(f"{path}: tensors {before.name!r} and {after.name!r} overlap")
    return infos


def _info(path: Path, name: str, entry: Any, start: int, size: int) -> TensorInfo:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
        raise CheckpointError(f"{path}: tensor {name!r} lacks dtype, shape or data_offsets")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in ENCODINGS:
        raise CheckpointError(f"{path}: tensor {name!r} has dtype {kind!r}; can be read: {', '.join(ENCODINGS)}")
    if not (_are_counts(shape) and _are_counts(offsets) and len(offsets) == 2):
        raise CheckpointError(f"{path}: tensor {name!r} has shape {shape!r} and data_offsets {offsets!r}")
    nbytes = int(np.prod(shape, dtype=object)) * ENCODINGS[kind].size
    if offsets[1] - offsets[0] != nbytes:
        raise CheckpointError(f"{path}: tensor {name!r} of {nbytes} bytes has data_offsets {offsets}")
    if start + offsets[1] > size:
        raise CheckpointError(f"{path} ends before tensor {name!r} does: it was cut off; download it anew")
    return TensorInfo(name, tuple(shape), ENCODINGS[kind], path, start + offsets[0], nbytes)


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)
