"""Writes small GGUF files byte by byte from the format's description, independent of the reader."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

F32, Q8_0 = 0, 8  # ggml types
UINT32, FLOAT32, BOOL, STRING, ARRAY, UINT64 = 4, 6, 7, 8, 9, 10


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def entry(key: str | bytes, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def array(kind: int, items: list[bytes], count: int | None = None) -> bytes:
    return struct.pack("<IQ", kind, len(items) if count is None else count) + b"".join(items)


def tensor_info(name: str, dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    """`dims` in GGUF's order, the contiguous one first."""
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def gguf_bytes(
    entries: list[bytes],
    infos: list[bytes],
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    num_tensors: int | None = None,
    num_entries: int | None = None,
    alignment: int = 32,
) -> bytes:
    counts = len(infos) if num_tensors is None else num_tensors, len(entries) if num_entries is None else num_entries
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join(entries) + b"".join(infos)
    return head + b"\0" * (-len(head) % alignment) + data


MATRIX = np.arange(64, dtype=np.float32).reshape(2, 32)
VECTOR = np.array([1.5, -2.0, 0.25, 8.0], np.float32)


def small_file(version: int = 3) -> bytes:
    """Two tensors and one metadata value of each kind."""
    entries = [
        entry("general.architecture", STRING, string("gemma3")),
        entry("a.number", UINT32, struct.pack("<I", 7)),
        entry("a.real", FLOAT32, struct.pack("<f", 0.5)),
        entry("a.flag", BOOL, b"\1"),
        entry("a.list", ARRAY, array(UINT32, [struct.pack("<I", i) for i in (3, 1, 2)])),
        entry("a.words", ARRAY, array(STRING, [string("é"), string(""), string("ab")])),
    ]
    infos = [tensor_info("matrix", (32, 2), F32, 0), tensor_info("vector", (4,), F32, 256)]
    return gguf_bytes(entries, infos, MATRIX.tobytes() + VECTOR.tobytes(), version=version)


@pytest.fixture
def written(tmp_path: Path) -> Callable[[bytes], Path]:
    """Bytes as a file."""

    def write(data: bytes, name: str = "file.gguf") -> Path:
        path = tmp_path / name
        path.write_bytes(data)
        return path

    return write


@pytest.fixture(scope="session")
def gguf() -> Any:
    """This module's writers, for tests (files are imported without a package)."""
    from types import SimpleNamespace

    return SimpleNamespace(**{name: value for name, value in globals().items() if not name.startswith("_")})
