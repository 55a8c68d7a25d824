"""Writes GGUF version 3. Source: docs/gguf.md of github.com/ggml-org/ggml."""

import hashlib
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gemma_checkpoints import manifest
from gemma_checkpoints.encodings import GGML
from gemma_checkpoints.gguf import ARRAY, DEFAULT_ALIGNMENT, MAGIC, MAX_DIMENSIONS, NUMBERS, STRING
from gemma_checkpoints.reader import CheckpointError
from gemma_checkpoints.writer import Layout, Slot, Writer

VERSION = 3
_TYPE_OF_ENCODING = {encoding.name: number for number, encoding in GGML.items()}
_TYPE_OF_DTYPE = {np.dtype(name): number for number, name in NUMBERS.items()}
_UINT32, _INT32, _FLOAT32, _BOOL, _UINT64, _INT64 = 4, 5, 6, 7, 10, 11


DIGESTS = "gemma_jax.sha256"  # metadata key: of each tensor by offset, and last of the header with NO_DIGEST there
SEAL = "gemma_jax.seal"  # a second key that says that there are digests: a flipped bit can hide one key, not both
NO_DIGEST = b"0" * 64
MODEL_FILE, TOWER_FILE = "model.gguf", "mmproj.gguf"


class _File:
    """One GGUF file: its header, and where its tensors go. Digests of all bytes are part of the metadata."""

    def __init__(self, tensors: Mapping[str, Layout], metadata: Mapping[str, Any]):
        own = ("general.alignment", DIGESTS, SEAL)
        self.tensors, self.metadata = tensors, {key: value for key, value in metadata.items() if key not in own}
        for name, layout in tensors.items():
            if not 1 <= len(layout.shape) <= MAX_DIMENSIONS or 0 in layout.shape:
                raise CheckpointError(
                    f"tensor {name!r} has shape {list(layout.shape)}; GGUF stores 1 to {MAX_DIMENSIONS} dimensions"
                )

    def begin(self, path: Path) -> dict[str, Slot]:
        """Writes all but the data and the digests."""
        header = self._header([NO_DIGEST.decode()] * (len(self.tensors) + 1))
        offsets, offset = self._offsets()
        with path.open("wb") as file:
            file.write(header)
            file.truncate(len(header) + offset)
        return {name: Slot(self.tensors[name], path, len(header) + offsets[name]) for name in self.tensors}

    def finish(self, path: Path, digest_of: Mapping[str, str]) -> None:
        """Writes the header once more, now with the digests."""
        digests = [digest_of[name] for name in self.tensors]
        own = hashlib.sha256(self._header([*digests, NO_DIGEST.decode()])).hexdigest()
        with path.open("r+b") as file:
            file.write(self._header([*digests, own]))
            file.flush()
            os.fsync(file.fileno())

    def _header(self, digests: list[str]) -> bytes:
        """All before the first tensor, padding included."""
        metadata = {**self.metadata, SEAL: 1, DIGESTS: digests}
        head = [MAGIC, struct.pack("<IQQ", VERSION, len(self.tensors), len(metadata))]
        head += [_string(key) + _value(key, value) for key, value in metadata.items()]
        offsets, _ = self._offsets()
        for name, layout in self.tensors.items():
            kind = _TYPE_OF_ENCODING[layout.encoding.name]
            dims = layout.shape[::-1]
            head.append(_string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offsets[name]))
        header = b"".join(head)
        return header.ljust(aligned(len(header)), b"\0")

    def _offsets(self) -> tuple[dict[str, int], int]:
        """Where each tensor begins after the header, and where the last one's padding ends."""
        offset, offsets = 0, {}
        for name, layout in self.tensors.items():
            offsets[name] = offset
            offset = aligned(offset + layout.nbytes)
        return offsets, offset


class GGUFWriter(Writer):
    """A .gguf file that is being written. `metadata`: booleans, whole numbers, floats (stored as float32), texts, lists
    of texts, and numpy arrays, which keep their dtype. `unused` are tensors that only have to be there: zeros.
    """

    def __init__(
        self,
        destination: str | os.PathLike,
        tensors: Mapping[str, Layout],
        metadata: Mapping[str, Any],
        unused: Mapping[str, Layout] | None = None,
    ):
        self._unused = dict(unused or {})
        super().__init__(destination, {**tensors, **self._unused})
        self._contents = _File(self.tensors, metadata)

    def layout(self, folder: Path) -> tuple[dict[str, Slot], Path]:
        path = folder / self.destination.name
        return self._contents.begin(path), path

    def _commit(self) -> None:
        for name, layout in self._unused.items():
            self.put(name, np.broadcast_to(np.float32(0), layout.shape))
        super()._commit()

    def _finish(self) -> None:
        self._contents.finish(self._whole, self.digests)


class GGUFFolderWriter(Writer):
    """A folder with two GGUF files, as llama.cpp takes a model that sees: model.gguf, and mmproj.gguf with the tower.

    `tower` and its metadata are the second file's.
    """

    def __init__(
        self,
        destination: str | os.PathLike,
        tensors: Mapping[str, Layout],
        metadata: Mapping[str, Any],
        tower: Mapping[str, Layout],
        tower_metadata: Mapping[str, Any],
    ):
        super().__init__(destination, {**tensors, **tower})
        if Path(destination).suffix == ".gguf":
            raise CheckpointError(f"{destination} is to hold two GGUF files, a model and its tower: name a folder")
        self._files = {MODEL_FILE: _File(tensors, metadata), TOWER_FILE: _File(tower, tower_metadata)}

    def layout(self, folder: Path) -> tuple[dict[str, Slot], Path]:
        slots = [file.begin(folder / name) for name, file in self._files.items()]
        return {name: slot for each in slots for name, slot in each.items()}, folder

    def _finish(self) -> None:
        for name, file in self._files.items():
            file.finish(self._whole / name, self.digests)
        manifest.make(self._whole, {}).write(self._whole)


def aligned(offset: int) -> int:
    """The next offset at which a tensor may begin."""
    return -(-offset // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT


def _string(text: str) -> bytes:
    data = text.encode()
    return len(data).to_bytes(8, "little") + data


def _value(key: str, value: Any) -> bytes:
    """A value with its type in front."""
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_string, value))
    if isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype in _TYPE_OF_DTYPE:
        return struct.pack("<IIQ", ARRAY, _TYPE_OF_DTYPE[value.dtype], value.size) + value.tobytes()
    kind = _number_type(value)
    if kind is None:
        raise CheckpointError(f"{key} is {value!r}, {type(value).__name__}; GGUF metadata cannot hold it")
    return struct.pack("<I", kind) + np.array(value, NUMBERS[kind]).tobytes()


def _number_type(value: Any) -> int | None:
    if isinstance(value, bool):
        return _BOOL
    if isinstance(value, float):
        return _FLOAT32
    if not isinstance(value, int):
        return None
    if value < 0:
        return _INT32 if value >= -(2**31) else _INT64 if value >= -(2**63) else None
    return _UINT32 if value < 2**32 else _UINT64 if value < 2**64 else None
