"""Writes Orbax checkpoints (OCDBT, zarr 3) tensor by tensor: ours, and DeepMind's, which its library loads.

Tensors are collected to batches that Orbax saves one after another, so that no model is ever whole in memory.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint.experimental import v1 as ocp

from gemma_checkpoints import manifest
from gemma_checkpoints.orbax import CONFIG, ENCODINGS, OrbaxReader
from gemma_checkpoints.reader import CheckpointError
from gemma_checkpoints.writer import Layout, Slot, Writer, encoded

BATCH_BYTES = 256 << 20
CHUNK_BYTES = 32 << 20  # of stored pieces: what a device reads for a small shard, and the grain of the digests
_DTYPE = {encoding.name: np.dtype(name) for name, encoding in ENCODINGS.items()}
_MAX_NAME = 255  # bytes of a file's name


class OrbaxWriter(Writer):
    """An Orbax checkpoint that is being written: a tree of arrays by the "/" in their names.

    Args:
        config: the content of gemma_jax.json.
        files: further files by name, such as tokenizer.model.
        is_nested: the tree lies in the folder itself, as DeepMind's library expects it, not in "state".

    In a run of several processes all of them make the same writer and put the same arrays, which may be sharded over
    the processes; each writes what it holds. The folder must be one that all of them see.
    """

    def __init__(
        self,
        destination: str | os.PathLike,
        tensors: Mapping[str, Layout],
        config: Mapping[str, Any],
        files: Mapping[str, bytes] | None = None,
        *,
        is_nested: bool = False,
    ):
        super().__init__(destination, tensors)
        self.config, self.files, self.is_nested = config, files or {}, is_nested
        self._batch: dict[str, np.ndarray | jax.Array] = {}
        for name, layout in self.tensors.items():
            if layout.encoding.name not in _DTYPE:
                raise CheckpointError(f"tensor {name!r}: Orbax has no {layout.encoding.name}; use F32 or BF16")

    def layout(self, folder: Path) -> tuple[dict[str, Slot], Path]:
        return {}, folder / ("save/state" if self.is_nested else "save")

    def _write(self, name: str, values: np.ndarray | jax.Array) -> str:
        layout = self.tensors[name]
        dtype = _DTYPE[layout.encoding.name]
        if isinstance(values, jax.Array) and not values.is_fully_addressable:
            self._batch[name], digest = values.astype(dtype), ""  # nobody has all of it
        else:
            array = np.empty(layout.shape, dtype)
            flat, sha, at = array.reshape(-1).view(np.uint8), hashlib.sha256(), 0
            for data in encoded(np.asarray(values), layout.encoding):
                flat[at : at + len(data)] = np.frombuffer(data, np.uint8)
                sha.update(data)
                at += len(data)
            self._batch[name], digest = array, sha.hexdigest()
        if sum(array.nbytes for array in self._batch.values()) >= BATCH_BYTES:
            self._flush()
        return digest

    def _flush(self) -> None:
        if self._batch:
            context = ocp.Context()
            context.array.saving.use_compression = False
            context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
            with context:
                ocp.partial.save(str(self._save), _nested(self._batch))
        self._batch = {}

    def _make_folder(self) -> Path:
        """One folder for all processes: the first makes it and says its name."""
        if jax.process_count() == 1:
            return super()._make_folder()
        name = super()._make_folder().name.encode() if jax.process_index() == 0 else b""
        shared = multihost_utils.broadcast_one_to_all(np.frombuffer(name.ljust(_MAX_NAME), np.uint8))
        return self.destination.parent / np.asarray(shared).tobytes().decode().rstrip()

    def _rename(self) -> None:
        _barrier("whole")
        if jax.process_index() == 0:
            super()._rename()
        _barrier("named")

    def _remove(self) -> None:
        self._batch = {}
        if jax.process_index() == 0:
            super()._remove()

    @property
    def _save(self) -> Path:
        return self._folder.absolute() / "save"

    def _finish(self) -> None:
        self._flush()
        ocp.partial.finalize(str(self._save))
        pieces = self._pieces()
        if jax.process_index() == 0:
            files = {CONFIG: (json.dumps(self.config, indent=2, sort_keys=True) + "\n").encode(), **self.files}
            for name, data in files.items():
                if Path(name).name != name:
                    raise CheckpointError(f"{name!r} is not the name of a file")
                (self._whole / name).write_bytes(data)
            manifest.make(self._whole, pieces).write(self._whole)

    def _pieces(self) -> dict[str, tuple[str, ...]]:
        """The digests of all stored pieces, read back; each process does its share. Raises CheckpointError for a tensor
        that is not what was put.
        """
        own: dict[str, tuple[str, ...]] = {}
        reader = OrbaxReader(self._whole)
        if set(reader.tensors) != set(self.tensors):
            raise CheckpointError(f"{self.destination}: Orbax did not write all tensors; nothing was kept")
        for name in sorted(self.tensors)[jax.process_index() :: jax.process_count()]:
            if self.digests[name] and reader.digest(name) != self.digests[name]:
                raise CheckpointError(f"{self.destination}: tensor {name!r} was damaged on its way to the disk")
            own[name] = reader.piece_digests(name)
        if jax.process_count() == 1:
            return own
        share = self._folder / f"pieces.{jax.process_index()}.json"
        share.write_text(json.dumps(own))
        _barrier("pieces")
        shares = (self._folder / f"pieces.{i}.json" for i in range(jax.process_count()))
        return {name: tuple(digests) for each in shares for name, digests in json.loads(each.read_text()).items()}


def _nested(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """A tree from paths with "/"."""
    tree: dict[str, Any] = {}
    for name, value in tensors.items():
        *places, leaf = name.split("/")
        node = tree
        for place in places:
            node = node.setdefault(place, {})
        node[leaf] = value
    return tree


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"gemma_checkpoints.{name}")
