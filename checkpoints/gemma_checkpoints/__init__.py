"""Checkpoints of Gemma models: readers and writers of files, and tables of names. Knows numpy, no model code."""

import os
from pathlib import Path

from gemma_checkpoints.gguf import GGUFFolderReader, GGUFReader
from gemma_checkpoints.gguf_writer import GGUFFolderWriter, GGUFWriter
from gemma_checkpoints.reader import CheckpointError, Reader, TensorInfo
from gemma_checkpoints.safetensors import SafetensorsReader
from gemma_checkpoints.safetensors_writer import SafetensorsWriter
from gemma_checkpoints.writer import Layout, Writer

__all__ = [
    "CheckpointError", "GGUFFolderReader", "GGUFFolderWriter", "GGUFReader", "GGUFWriter", "Layout", "Reader",
    "SafetensorsReader", "SafetensorsWriter", "TensorInfo", "Writer", "open",
]  # fmt: skip


def open(path: str | os.PathLike) -> Reader:
    """The reader for an Orbax checkpoint, a folder with *.safetensors or *.gguf, a .safetensors or .gguf file.

    Raises: FileNotFoundError; CheckpointError for anything else or a damaged file.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if not path.is_dir():
        return SafetensorsReader(path) if path.suffix == ".safetensors" else GGUFReader(path)
    if (path / "_METADATA").exists() or (not _has(path, "*.safetensors") and _has(path, "*/_METADATA")):
        from gemma_checkpoints.orbax import OrbaxReader  # TensorStore takes time to import; most files need none

        return OrbaxReader(path)
    if _has(path, "*.gguf") and not _has(path, "*.safetensors"):
        return GGUFFolderReader(path)
    return SafetensorsReader(path)


def _has(folder: Path, pattern: str) -> bool:
    return next(folder.glob(pattern), None) is not None
