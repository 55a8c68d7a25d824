"""What every format that writes does: tensors laid out beforehand, filled one by one, and all or nothing at the end."""

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from gemma_checkpoints.encodings import Encoding
from gemma_checkpoints.reader import PIECE_BYTES, CheckpointError


@dataclass(frozen=True)
class Layout:
    """How a tensor is to be stored. `shape` is in numpy's order, the last dimension contiguous."""

    shape: tuple[int, ...]
    encoding: Encoding

    @property
    def nbytes(self) -> int:
        return self.encoding.num_bytes(int(np.prod(self.shape, dtype=object)))


@dataclass(frozen=True)
class Slot:
    """Where a tensor goes."""

    layout: Layout
    file: Path
    offset: int


class Writer:
    """A checkpoint that is being written; a context manager. Formats differ in how they lay out files.

    Everything goes to a temporary neighbour of `destination`, which takes its name when the block ends well: whatever
    happens, even a power cut, the destination is absent or whole. Its name begins with a dot and ends in ".partial".

    Raises: FileExistsError if the destination is there; CheckpointError at the end for a tensor that never came.
    """

    def __init__(self, destination: str | os.PathLike, tensors: Mapping[str, Layout]):
        self.destination, self.tensors = Path(destination), dict(tensors)
        if os.path.lexists(self.destination):
            raise FileExistsError(f"{self.destination} is there already; remove it or give another name")
        if not self.destination.parent.is_dir():
            raise FileNotFoundError(f"{self.destination.parent} is no folder; make it first")
        for name, layout in self.tensors.items():
            check(name, layout)
        self.digests: dict[str, str] = {}  # SHA-256 of each tensor's bytes as written, in hexadecimal
        self._missing = set(self.tensors)
        self._open: dict[Path, BinaryIO] = {}

    def layout(self, folder: Path) -> tuple[dict[str, Slot], Path]:
        """Writes all but the tensors' data below `folder`; where each tensor goes, and what gets the final name."""
        raise NotImplementedError

    def __enter__(self) -> "Writer":
        self._folder = self._make_folder()
        try:
            self._slots, self._whole = self.layout(self._folder)
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None:
                self._commit()
        finally:
            self._remove()

    def put(self, name: str, values: np.ndarray) -> None:
        """Encodes one tensor into its place; `values` may have any strides and real dtype."""
        if name not in self._missing:
            problem = "was written before" if name in self.tensors else "was not announced"
            raise CheckpointError(f"tensor {name!r} {problem}; {self.destination} is not written")
        shape = self.tensors[name].shape
        if values.shape != shape:
            raise CheckpointError(f"tensor {name!r} has shape {list(values.shape)}, announced was {list(shape)}")
        self.digests[name] = self._write(name, values)
        self._missing.remove(name)

    def _write(self, name: str, values: np.ndarray) -> str:
        """Writes about a MiB at a time; returns the digest."""
        slot = self._slots[name]
        file, encoding = self._file(slot.file), slot.layout.encoding
        file.seek(slot.offset)
        digest = hashlib.sha256()
        for data in encoded(values, encoding):
            digest.update(data)
            file.write(data)
        return digest.hexdigest()

    def _file(self, path: Path) -> BinaryIO:
        if path not in self._open:
            self._open[path] = path.open("r+b" if path.exists() else "w+b")
        return self._open[path]

    def _commit(self) -> None:
        if self._missing:
            lost = ", ".join(sorted(self._missing)[:5])
            raise CheckpointError(
                f"{len(self._missing)} tensors never came ({lost}); {self.destination} is not written"
            )
        while self._open:
            with self._open.popitem()[1] as file:
                file.flush()
                os.fsync(file.fileno())
        self._finish()
        self._rename()

    def _make_folder(self) -> Path:
        parent = self.destination.parent
        return Path(tempfile.mkdtemp(dir=parent, prefix=f".{self.destination.name}.", suffix=".partial"))

    def _rename(self) -> None:
        if os.path.lexists(self.destination):
            raise FileExistsError(f"{self.destination} appeared while it was written; nothing was changed")
        if self._whole.is_dir():
            self._whole.chmod(0o777 & ~_umask())  # mkdtemp's folders are their owner's alone
        self._whole.rename(self.destination)
        _sync(self.destination.parent)

    def _finish(self) -> None:
        """What a format does once all tensors are there, before the checkpoint gets its name."""

    def _remove(self) -> None:
        while self._open:
            self._open.popitem()[1].close()
        shutil.rmtree(self._folder, ignore_errors=True)


def encoded(values: np.ndarray, encoding: Encoding) -> Iterator[bytes]:
    """The bytes of a tensor, about a MiB of values at a time."""
    rows = values.reshape(1, -1) if values.ndim < 2 else values
    step = max(1, PIECE_BYTES // max(1, 4 * int(np.prod(rows.shape[1:]))))
    assert encoding.encode is not None
    for start in range(0, len(rows), step):
        piece = np.ascontiguousarray(rows[start : start + step], np.float32)
        yield encoding.encode(piece.reshape(-1, encoding.block)).tobytes()


def check(name: str, layout: Layout) -> None:
    """Raises CheckpointError for a tensor that cannot be stored as asked."""
    encoding = layout.encoding
    if encoding.encode is None:
        hint = ": Gemma's activations pass its largest number, 65504" if encoding.name == "F16" else ""
        raise CheckpointError(f"tensor {name!r} cannot be written as {encoding.name}{hint}; use F32 or BF16")
    if encoding.block > 1 and (not layout.shape or layout.shape[-1] % encoding.block):
        raise CheckpointError(
            f"tensor {name!r} has shape {list(layout.shape)}; rows of {encoding.name} are multiples of {encoding.block}"
        )


def _umask() -> int:
    """Python only tells it by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _sync(folder: Path) -> None:
    """Makes a rename durable where folders can be synced."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
