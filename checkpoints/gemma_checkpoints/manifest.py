"""The manifest of a checkpoint folder: a digest of every file, and of every stored piece of every tensor.

File formats of weights do not notice a flipped bit (of Orbax's payload measured: 12 of 12 loaded as wrong weights). The
manifest is written before a folder gets its name; pieces are compared whenever they are read, files by `damages`.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_checkpoints.reader import PIECE_BYTES, CheckpointError

NAME = "gemma_jax.manifest.json"
VERSION = 1


@dataclass(frozen=True)
class Manifest:
    """What a folder holds. Digests are SHA-256 in hexadecimal.

    `files`: (bytes, digest) by path relative to the folder, with "/". `pieces`: of each tensor the digests of its
    pieces (chunks of the storage, in row-major order); empty for formats without pieces.
    """

    files: Mapping[str, tuple[int, str]]
    pieces: Mapping[str, tuple[str, ...]]

    def write(self, folder: Path) -> None:
        """Writes it into the folder, with a digest of its own."""
        content = {"version": VERSION, "files": dict(self.files), "pieces": dict(self.pieces)}
        data = json.dumps({**content, "digest": _digest_of(content)}, indent=1).encode()
        with (folder / NAME).open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())


def read(folder: Path) -> Manifest | None:
    """The manifest of a folder; None if it has none. Raises CheckpointError for a damaged one."""
    path = folder / NAME
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_bytes())
        digest = content.pop("digest")
        files = {str(name): (int(size), str(sha)) for name, (size, sha) in content["files"].items()}
        pieces = {str(name): tuple(map(str, digests)) for name, digests in content["pieces"].items()}
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r}); get the checkpoint anew") from None
    if content.get("version") != VERSION:
        raise CheckpointError(f"{path} has version {content.get('version')!r}; this program reads {VERSION}")
    if digest != _digest_of(content):
        raise CheckpointError(f"{path} is damaged: it has not the digest that it names; get the checkpoint anew")
    return Manifest(files, pieces)


def make(folder: Path, pieces: Mapping[str, tuple[str, ...]]) -> Manifest:
    """The manifest of a folder that is complete but for it; every file is made durable on the way."""
    return Manifest({name: _file_digest(path, sync=True) for name, path in _files(folder)}, pieces)


def damages(folder: Path, manifest: Manifest) -> list[str]:
    """What is wrong with a folder's files, one sentence each; none if all is as it was written."""
    found, problems = dict(_files(folder)), []
    for name, (size, digest) in manifest.files.items():
        path = found.pop(name, None)
        if path is None:
            problems.append(f"{name} is missing")
        elif not path.is_file():
            problems.append(f"{name} is no file")
        elif path.stat().st_size != size:
            problems.append(f"{name} has {path.stat().st_size} bytes; it had {size}")
        elif _file_digest(path)[1] != digest:
            problems.append(f"{name} has changed: its SHA-256 is another")
    return problems + [f"{name} is foreign: it was not written with the checkpoint" for name in found]


def check(folder: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """Raises CheckpointError if one of these files, which must be there, is not what was written."""
    for name in names:
        if _file_digest(folder / name) != manifest.files.get(name):
            raise CheckpointError(f"{folder / name} is damaged or foreign (see {NAME}); get the checkpoint anew")


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """All files below a folder but the manifest, by their relative path; links are not followed."""
    for place, folders, files in os.walk(folder):
        folders.sort()
        links = [name for name in folders if (Path(place) / name).is_symlink()]
        for name in sorted([*files, *links]):
            path = Path(place) / name
            relative = path.relative_to(folder).as_posix()
            if relative != NAME:
                yield relative, path


def _file_digest(path: Path, *, sync: bool = False) -> tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while data := file.read(PIECE_BYTES):
            digest.update(data)
            size += len(data)
        if sync:
            os.fsync(file.fileno())
    return size, digest.hexdigest()


def _digest_of(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
