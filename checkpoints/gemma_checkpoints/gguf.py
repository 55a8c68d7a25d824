"""Reads GGUF versions 2 and 3. Nothing a file claims is believed before it is compared with the file's size.

Source: docs/gguf.md of github.com/ggml-org/ggml.
"""

import itertools
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gemma_checkpoints.encodings import GGML
from gemma_checkpoints.reader import CheckpointError, Reader, TensorInfo

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4
HEADER_PIECE = 1 << 20  # bytes read ahead

TOWER = "clip"  # general.architecture of a tower's file
STRING, ARRAY = 8, 9
NUMBERS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}


class GGUFReader(Reader):
    """An open .gguf file. `metadata` holds its key/values: numbers, strings, arrays (numpy; of strings: a list).

    Raises CheckpointError for anything that is not a whole, consistent GGUF file.
    """

    format = "gguf"

    def __init__(self, path: str | os.PathLike):
        path = Path(path)
        with path.open("rb") as file:
            header = _Header(path, file.read, os.fstat(file.fileno()).st_size)
            num_tensors = header.begin()
            metadata = header.metadata()
            tensors = header.tensors(num_tensors, _alignment(path, metadata))
        super().__init__(path, metadata, tensors)


class GGUFFolderReader(Reader):
    """A folder with the GGUF files of one model: its decoder, and its tower if there is one (llama.cpp's mmproj).

    `metadata` is the decoder's, with the keys of the tower ("clip.*") added.
    Raises CheckpointError for other numbers of files, and as `GGUFReader`.
    """

    format = "gguf"

    def __init__(self, path: str | os.PathLike):
        files = [GGUFReader(file) for file in sorted(Path(path).glob("*.gguf"))]
        towers = [file for file in files if file.metadata.get("general.architecture") == TOWER]
        models = [file for file in files if file not in towers]
        if len(models) != 1 or len(towers) > 1:
            raise CheckpointError(
                f"{path} has {len(models)} GGUF files of models and {len(towers)} of towers; wanted one of a model, "
                "and at most one of its tower: give the path of the file"
            )
        metadata, tensors = dict(models[0].metadata), dict(models[0].tensors)
        for tower in towers:
            metadata |= {key: value for key, value in tower.metadata.items() if key.startswith(f"{TOWER}.")}
            if twice := sorted(set(tensors) & set(tower.tensors)):
                raise CheckpointError(
                    f"tensor {twice[0]!r} is in {models[0].path.name} and in {tower.path.name} of {path}"
                )
            tensors |= tower.tensors
        super().__init__(Path(path), metadata, tensors)


def _alignment(path: Path, metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0 or alignment % 8:
        raise CheckpointError(f"{path}: general.alignment is {alignment!r}; wanted a positive multiple of 8")
    return alignment


class _Header:
    """The part of the file before the tensors' data, read front to back."""

    def __init__(self, path: Path, read: Callable[[int], bytes], size: int):
        self.path, self.size = path, size
        self._read, self._buffer, self._base, self._at = read, b"", 0, 0

    @property
    def position(self) -> int:
        return self._base + self._at

    def error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {problem}")

    def check_room(self, count: int, each: int, what: str) -> None:
        """Refuses `count` things of at least `each` bytes that cannot be in what is left of the file."""
        if count * each > self.size - self.position:
            raise self.error(
                f"{what} would need at least {count * each} bytes at {self.position}, but the file has {self.size}: it "
                "is damaged or was cut off"
            )

    def take(self, count: int, what: str) -> bytes:
        if self._at + count > len(self._buffer):
            self.check_room(count, 1, what)
            rest = self._buffer[self._at :]
            self._base, self._at = self.position, 0
            self._buffer = rest + self._read(max(HEADER_PIECE, count - len(rest)))
            if len(self._buffer) < count:
                raise self.error(f"the file ends inside {what}")
        start, self._at = self._at, self._at + count
        return self._buffer[start : self._at]

    def integer(self, size: int, what: str) -> int:
        return int.from_bytes(self.take(size, what), "little")

    def string(self, what: str) -> str:
        length = self.integer(8, what)
        try:
            return self.take(length, what).decode()
        except UnicodeDecodeError as error:
            raise self.error(f"{what} is not UTF-8 ({error.reason})") from None

    def begin(self) -> int:
        """Checks magic and version; the number of tensors."""
        magic = self.take(4, "the magic number") if self.size >= 24 else b""
        if magic != MAGIC:
            found = f"begins with {magic!r}" if magic else f"has only {self.size} bytes"
            raise self.error(f"this is not a GGUF file: such a file begins with {MAGIC!r}, this one {found}")
        version = self.integer(4, "the version")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            kind = "a big-endian file" if swapped in VERSIONS else f"version {version}"
            raise self.error(f"this is {kind}; little-endian versions 2 and 3 can be read")
        num_tensors = self.integer(8, "the number of tensors")
        self.check_room(num_tensors, 24, f"{num_tensors} tensors")
        return num_tensors

    def metadata(self) -> dict[str, Any]:
        count = self.integer(8, "the number of keys")
        self.check_room(count, 13, f"{count} keys")
        values: dict[str, Any] = {}
        for i in range(count):
            key = self.string(f"key {i}")
            if key in values:
                raise self.error(f"key {key!r} is there twice")
            values[key] = self.value(self.integer(4, f"the type of {key!r}"), repr(key))
        return values

    def value(self, kind: int, what: str) -> Any:
        if kind == STRING:
            return self.string(what)
        if kind == ARRAY:
            return self.array(what)
        if kind not in NUMBERS:
            raise self.error(f"{what} has type {kind}, which GGUF does not know")
        dtype = np.dtype(NUMBERS[kind])
        return np.frombuffer(self.take(dtype.itemsize, what), dtype)[0].item()

    def array(self, what: str) -> Any:
        kind, count = self.integer(4, what), self.integer(8, what)
        if kind == STRING:
            self.check_room(count, 8, f"the {count} strings of {what}")
            return self._strings(count, what)
        if kind not in NUMBERS:
            raise self.error(f"{what} is an array of type {kind}; numbers and strings can be read")
        dtype = np.dtype(NUMBERS[kind])
        self.check_room(count, dtype.itemsize, f"the {count} numbers of {what}")
        return np.frombuffer(self.take(count * dtype.itemsize, what), dtype)

    def _strings(self, count: int, what: str) -> list[str]:
        """As `string`, count times, without a call for each of a vocabulary's 262,144."""
        strings, length_of = [], struct.Struct("<Q").unpack_from
        try:
            for _ in range(count):
                at, buffer = self._at, self._buffer
                if at + 8 <= len(buffer) and (stop := at + 8 + length_of(buffer, at)[0]) <= len(buffer):
                    strings.append(buffer[at + 8 : stop].decode())
                    self._at = stop
                else:
                    strings.append(self.string(what))
        except UnicodeDecodeError as error:
            raise self.error(f"string {len(strings)} of {what} is not UTF-8 ({error.reason})") from None
        return strings

    def tensors(self, count: int, alignment: int) -> dict[str, TensorInfo]:
        found: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for i in range(count):
            name = self.string(f"the name of tensor {i}")
            if name in found:
                raise self.error(f"tensor {name!r} is there twice")
            num_dims = self.integer(4, f"tensor {name!r}")
            if not 1 <= num_dims <= MAX_DIMENSIONS:
                raise self.error(f"tensor {name!r} has {num_dims} dimensions; wanted 1 to {MAX_DIMENSIONS}")
            shape = tuple(self.integer(8, f"tensor {name!r}") for _ in range(num_dims))[::-1]
            found[name] = (shape, self.integer(4, f"tensor {name!r}"), self.integer(8, f"tensor {name!r}"))
        start = -(-self.position // alignment) * alignment
        infos = {name: self._info(name, *fields, start, alignment) for name, fields in found.items()}
        self._check_overlaps(infos)
        return infos

    def _info(
        self, name: str, shape: tuple[int, ...], kind: int, offset: int, start: int, alignment: int
    ) -> TensorInfo:
        if kind not in GGML:
            raise self.error(f"tensor {name!r} has type {kind}, which cannot be read")
        encoding, size = GGML[kind], int(np.prod(shape, dtype=object))
        if size == 0 or shape[-1] % encoding.block:
            raise self.error(
                f"tensor {name!r} has shape {shape}; rows of {encoding.name} are multiples of {encoding.block}"
            )
        nbytes = size // encoding.block * encoding.size
        if offset % alignment:
            raise self.error(f"tensor {name!r} begins at {offset}, which is no multiple of the alignment {alignment}")
        if start + offset + nbytes > self.size:
            raise self.error(
                f"tensor {name!r} should end at byte {start + offset + nbytes}, but the file has {self.size}: it was "
                "cut off; get it anew"
            )
        return TensorInfo(name, shape, encoding, self.path, start + offset, nbytes)

    def _check_overlaps(self, infos: dict[str, TensorInfo]) -> None:
        ordered = sorted(infos.values(), key=lambda info: info.offset)
        for before, after in itertools.pairwise(ordered):
            if before.offset + before.nbytes > after.offset:
                raise self.error(f"tensors {before.name!r} and {after.name!r} overlap")
