"""What every format gives: metadata, a list of tensors, and each tensor decoded to where the caller wants it."""

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from gemma_checkpoints.encodings import Encoding

PIECE_BYTES = 1 << 20  # decoded at once: fits a core's cache, so that writing it transposed is cheap too


class CheckpointError(ValueError):
    """A checkpoint that is damaged, incomplete, or does not hold what was asked for."""


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor. `shape` is in numpy's order, the last dimension contiguous."""

    name: str
    shape: tuple[int, ...]
    encoding: Encoding
    file: Path
    offset: int  # of the first byte in the file
    nbytes: int  # as stored

    @property
    def dtype(self) -> str:
        """The name of the stored type, such as F32 or Q4_K."""
        return self.encoding.name

    @property
    def size(self) -> int:
        """Number of values."""
        return int(np.prod(self.shape, dtype=object))


class Reader:
    """An open checkpoint; a context manager. Formats differ only in how they find `metadata` and `tensors`.

    Files are read by position, never mapped: a file that shrinks gives an error and not a bus error.
    """

    format: str  # as name tables call it

    def __init__(self, path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, TensorInfo]):
        self.path, self.metadata, self.tensors = path, metadata, tensors
        self._open: dict[Path, int] = {}

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files; reading opens them again."""
        while self._open:
            os.close(self._open.popitem()[1])

    def read(
        self, name: str, dtype: Any = np.float32, out: np.ndarray | None = None, start: Sequence[int] | None = None
    ) -> np.ndarray:
        """Decodes one tensor or a region of it, at most about a MiB at a time.

        Args:
            name: one of `tensors`.
            dtype: of the result when `out` is None.
            out: where to write, of any real dtype and strides, with the tensor's number of dimensions.
            start: where the region of the shape of `out` begins. None: at the tensor's first value.

        Raises: CheckpointError if there is no such tensor or the file is damaged; ValueError for a wrong `out`.
        """
        if name not in self.tensors:
            raise CheckpointError(f"{self.path} has no tensor {name!r}")
        info = self.tensors[name]
        out = np.empty(info.shape, dtype) if out is None else out
        begin = tuple(start or (0,) * len(info.shape))
        if out.ndim != len(info.shape) or any(
            first < 0 or first + count > size for first, count, size in zip(begin, out.shape, info.shape, strict=True)
        ):
            raise ValueError(f"out has shape {out.shape} and starts at {begin}; {name} has {info.shape}")
        if out.size:
            self._fill(info, out, begin)
        return out

    def read_rows(self, name: str, out: np.ndarray, start: int = 0) -> None:
        """Fills uint8 `out` [rows, bytes of a row] with rows as they are stored, undecoded, from row `start` on.

        A row is the last dimension; all before it count as one. Only for files in which tensors lie whole.
        Raises: CheckpointError if there is no such tensor or the file is damaged; ValueError for a wrong `out`.
        """
        if name not in self.tensors:
            raise CheckpointError(f"{self.path} has no tensor {name!r}")
        info = self.tensors[name]
        row_bytes, num_rows = info.encoding.num_bytes(info.shape[-1]), info.size // info.shape[-1]
        is_whole = out.dtype == np.uint8 and out.flags.c_contiguous and out.shape[1:] == (row_bytes,)
        if not is_whole or start < 0 or start + len(out) > num_rows:
            raise ValueError(
                f"out is {out.dtype}{list(out.shape)} from row {start}; {name} has {num_rows} rows of {row_bytes} bytes"
            )
        flat = out.reshape(-1)
        for at in range(0, len(flat), PIECE_BYTES):
            piece = self._bytes(info, info.offset + start * row_bytes + at, min(PIECE_BYTES, len(flat) - at))
            flat[at : at + len(piece)] = np.frombuffer(piece, np.uint8)

    def _fill(self, info: TensorInfo, out: np.ndarray, begin: tuple[int, ...]) -> None:
        """Reads whole rows, those that `out` has, and keeps of each what it has.

        A row is the last dimension with as many before it as `out` has whole and a piece holds: a kernel [O, I, 1, 1]
        is not read value by value.
        """
        if not info.shape:
            out[...] = self._piece(info, 0, 1)[0]
            return
        shape, first = (1, *info.shape)[-max(2, len(info.shape)) :], (0, *begin)[-max(2, len(begin)) :]
        target, per_piece = out if out.ndim > 1 else out[None], PIECE_BYTES // 4
        row_axis = len(shape) - 2  # the dimension that counts rows
        while row_axis and target.shape[row_axis:] == shape[row_axis:] and math.prod(shape[row_axis:]) <= per_piece:
            row_axis -= 1
        columns = math.prod(shape[row_axis + 1 :])
        wanted = slice(first[-1], first[-1] + target.shape[-1])
        rows_each = max(1, per_piece // columns)
        for index in np.ndindex(target.shape[:row_axis]):
            rows, before = target[index], 0
            for size, i, at in zip(shape, index, first, strict=False):
                before = before * size + at + i
            top = before * shape[row_axis] + first[row_axis]
            for row in range(0, rows.shape[0], rows_each):
                stop = min(row + rows_each, rows.shape[0])
                values = self._piece(info, (top + row) * columns, (top + stop) * columns)
                rows[row:stop] = values.reshape(-1, *shape[row_axis + 1 :])[..., wanted]

    def digest(self, name: str) -> str:
        """SHA-256 of a tensor's bytes as stored, in hexadecimal; see `Writer.digests`."""
        info, digest = self.tensors[name], hashlib.sha256()
        for start in range(0, info.nbytes, PIECE_BYTES):
            digest.update(self._bytes(info, info.offset + start, min(PIECE_BYTES, info.nbytes - start)))
        return digest.hexdigest()

    def _piece(self, info: TensorInfo, start: int, stop: int) -> np.ndarray:
        block, size = info.encoding.block, info.encoding.size
        raw = self._bytes(info, info.offset + start // block * size, (stop - start) // block * size)
        return info.encoding.decode(np.frombuffer(raw, np.uint8).reshape(-1, size)).reshape(-1)

    def _bytes(self, info: TensorInfo, offset: int, count: int) -> bytes:
        if info.file not in self._open:
            self._open[info.file] = os.open(info.file, os.O_RDONLY)
        parts = []
        while count > 0:
            part = os.pread(self._open[info.file], count, offset)
            if not part:
                raise CheckpointError(f"{info.file} ends inside tensor {info.name!r}: it was cut off; get it anew")
            parts.append(part)
            offset, count = offset + len(part), count - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)
