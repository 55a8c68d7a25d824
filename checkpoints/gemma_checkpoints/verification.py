"""Is a checkpoint what was written? Every byte of ours is under a digest; of others all values are looked at."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import gemma_checkpoints
from gemma_checkpoints import manifest
from gemma_checkpoints.gguf import GGUFReader
from gemma_checkpoints.gguf_writer import DIGESTS, NO_DIGEST, SEAL, aligned
from gemma_checkpoints.reader import PIECE_BYTES, CheckpointError, Reader


@dataclass(frozen=True)
class Verification:
    """What was found. `is_sealed`: all bytes were compared with digests, so that no problem means no damage; if not,
    the checkpoint has none, and its structure and values are all that could be looked at.
    """

    problems: tuple[str, ...]
    is_sealed: bool
    num_tensors: int
    num_bytes: int  # of the tensors, as stored


def verify(path: str | os.PathLike) -> Verification:
    """Looks at every byte of a checkpoint. Memory: one tensor.

    Raises FileNotFoundError; CheckpointError for what is no checkpoint at all. Damage is not raised but reported.
    """
    path = Path(path)
    if path.is_dir() and (path / manifest.NAME).exists():
        try:
            known = manifest.read(path)
            problems = manifest.damages(path, known) if known else [f"{manifest.NAME} is no file"]
        except CheckpointError as error:
            return Verification((str(error),), True, 0, 0)
        if problems:
            return Verification(tuple(problems), True, 0, 0)
        with gemma_checkpoints.open(path) as reader:
            return _report([], True, reader)
    try:
        with gemma_checkpoints.open(path) as reader:
            if isinstance(reader, GGUFReader) and {DIGESTS, SEAL} & set(reader.metadata):
                return _report(_gguf_damages(reader), True, reader)
            return _report(_value_problems(reader), False, reader)
    except CheckpointError as error:
        return Verification((str(error),), False, 0, 0)


def _report(problems: list[str], is_sealed: bool, reader: Reader) -> Verification:
    size = sum(info.nbytes for info in reader.tensors.values())
    return Verification(tuple(problems), is_sealed, len(reader.tensors), size)


def _value_problems(reader: Reader) -> list[str]:
    """Values that cannot be read, or are no numbers."""
    problems = []
    for name, info in reader.tensors.items():
        try:
            if not np.isfinite(reader.read(name)).all():
                problems.append(f"tensor {name!r} ({info.dtype}) has values that are infinite or no numbers")
        except CheckpointError as error:
            problems.append(str(error))
    return problems


def _gguf_damages(reader: GGUFReader) -> list[str]:
    """What is wrong with a file of ours; `GGUFWriter` says what is where."""
    digests = reader.metadata.get(DIGESTS)
    infos = sorted(reader.tensors.values(), key=lambda info: info.offset)
    if not isinstance(digests, list) or len(digests) != len(infos) + 1 or SEAL not in reader.metadata:
        return [f"{reader.path}: {DIGESTS} does not name a digest for each tensor and the header"]
    problems = [
        f"tensor {info.name!r} has changed: its SHA-256 is another"
        for info, digest in zip(infos, digests[:-1], strict=True)
        if reader.digest(info.name) != digest
    ]
    size = reader.path.stat().st_size
    with reader.path.open("rb") as file:
        header = file.read(infos[0].offset if infos else size)
        own = digests[-1].encode()
        if header.count(own) != 1 or hashlib.sha256(header.replace(own, NO_DIGEST)).hexdigest().encode() != own:
            problems.append("the header (metadata and list of tensors) has changed: its SHA-256 is another")
        ends = [info.offset for info in infos[1:]] + [info.offset + aligned(info.nbytes) for info in infos[-1:]]
        for info, end in zip(infos, ends, strict=True):
            file.seek(info.offset + info.nbytes)
            if any(file.read(min(end - info.offset - info.nbytes, PIECE_BYTES))):
                problems.append(f"the padding after tensor {info.name!r} has changed: it was zero")
        if ends and size != ends[-1]:
            problems.append(f"the file has {size} bytes; it had {ends[-1]}")
    return problems
