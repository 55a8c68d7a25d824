"""Thousands of damaged files of each format: a file that can be read, or our error; soon, and in little memory.

The damage knows the formats: lengths and offsets become extreme, names change, parts are cut, doubled and swapped.
"""

import json
import random
import re
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from orbax.checkpoint.experimental import v1 as ocp

import gemma_checkpoints
from gemma_checkpoints import CheckpointError, GGUFWriter, Layout, SafetensorsWriter, manifest
from gemma_checkpoints.encodings import BF16, F32, Q8_0
from gemma_checkpoints.orbax_writer import OrbaxWriter
from gemma_checkpoints.safetensors import INDEX

COUNT = 4000  # files of each kind
SECONDS = 1.0  # of the processor, for one file
ROOM = 4 << 20  # bytes beside twice the file: a reader's buffers
EXTREMES = (0, 1, 2, 31, 2**8 - 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1)
LAYOUTS = {"matrix": Layout((4, 64), Q8_0), "table": Layout((8, 32), F32), "norm": Layout((32,), F32)}
PLAIN = {name: Layout(layout.shape, BF16 if name == "table" else F32) for name, layout in LAYOUTS.items()}
METADATA = {
    "general.architecture": "gemma3",
    "gemma3.block_count": 2,
    "tokenizer.ggml.tokens": ["<pad>", "é", "word"],
    "tokenizer.ggml.scores": np.zeros(3, np.float32),
}

pytestmark = pytest.mark.slow


def fill(writer) -> None:
    with writer:
        for name, layout in writer.tensors.items():
            writer.put(name, np.ones(layout.shape, np.float32))


def hurt_bytes(data: bytes, chance: random.Random, header: int) -> bytes:
    """Between one and three damages; most of them in the first `header` bytes."""
    out = bytearray(data)
    for _ in range(chance.randint(1, 3)):
        if not out:
            break
        at = chance.randrange(min(header, len(out))) if chance.random() < 0.9 else chance.randrange(len(out))
        kind = chance.randrange(6)
        if kind == 0:
            out[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            size = chance.choice((4, 8))
            out[at : at + size] = (chance.choice(EXTREMES) % 256**size).to_bytes(size, "little")
        elif kind == 2:
            del out[at:]
        elif kind == 3:
            del out[at : at + chance.randint(1, 40)]
        elif kind == 4:
            out[at:at] = out[at : at + chance.randint(1, 80)]
        else:
            other = chance.randrange(len(out))
            out[at : at + 8], out[other : other + 8] = out[other : other + 8], out[at : at + 8]
    return bytes(out)


def hurt_json(text: str, chance: random.Random) -> str:
    """Numbers become extreme, names equal, strange or paths, types wrong; now and then it is no JSON."""
    for _ in range(chance.randint(1, 3)):
        spots = list(re.finditer(r'-?\d+|"[^"]*"|[\[\]{}:,]', text))
        if not spots:
            break
        spot = chance.choice(spots)
        number = str(chance.choice(EXTREMES) * chance.choice((1, -1)))
        others = [number, "1.5", "1e400", "NaN", "null", "[]", "{}", '"../../x"', '"/etc/passwd"', '"F32"', '"I4"', ""]
        new = chance.choice([*others, chance.choice(spots).group(), "[" * 3000, '"\\ud800"', '"' + "a" * 5000 + '"'])
        text = text[: spot.start()] + new + text[spot.end() :]
    return text


def gguf_files(folder: Path, chance: random.Random) -> Callable[[], Path]:
    fill(GGUFWriter(folder / "whole.gguf", LAYOUTS, METADATA))
    data, path = (folder / "whole.gguf").read_bytes(), folder / "hurt.gguf"
    header = len(data) - sum(layout.nbytes for layout in LAYOUTS.values())

    def hurt() -> Path:
        path.write_bytes(hurt_bytes(data, chance, header))
        return path

    return hurt


def safetensors_files(folder: Path, chance: random.Random) -> Callable[[], Path]:
    fill(SafetensorsWriter(folder / "whole", PLAIN, {"model_type": "gemma3_text"}))
    data, path = (folder / "whole" / "model.safetensors").read_bytes(), folder / "hurt.safetensors"
    length = int.from_bytes(data[:8], "little")

    def hurt() -> Path:
        if chance.random() < 0.3:
            path.write_bytes(hurt_bytes(data, chance, 8 + length))
        else:
            text = hurt_json(data[8 : 8 + length].decode(), chance).encode("utf-8", "surrogatepass")
            path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
        return path

    return hurt


def index_files(folder: Path, chance: random.Random) -> Callable[[], Path]:
    path = folder / "sharded"
    fill(SafetensorsWriter(path, PLAIN, {"model_type": "gemma3_text"}, shard_bytes=600))
    whole = (path / INDEX).read_text()
    assert len(set(json.loads(whole)["weight_map"].values())) > 1

    def hurt() -> Path:
        (path / INDEX).write_bytes(hurt_json(whole, chance).encode("utf-8", "surrogatepass"))
        return path

    return hurt


def orbax_tree_files(folder: Path, chance: random.Random) -> Callable[[], Path]:
    """The list of arrays of a checkpoint of another's, which has no digests."""
    path = folder / "tree"
    ocp.save(str(path), {name: np.ones(layout.shape, np.float32) for name, layout in LAYOUTS.items()})
    whole = (path / "state" / "_METADATA").read_text()

    def hurt() -> Path:
        (path / "state" / "_METADATA").write_bytes(hurt_json(whole, chance).encode("utf-8", "surrogatepass"))
        return path

    return hurt


def orbax_array_files(folder: Path, chance: random.Random) -> Callable[[], Path]:
    """What describes an array: shapes, chunks, codecs."""
    path = folder / "arrays"
    context = ocp.Context()
    context.array.saving.use_ocdbt = False
    context.array.saving.use_compression = False
    with context:
        ocp.save(str(path), {name: np.ones(layout.shape, np.float32) for name, layout in LAYOUTS.items()})
    files = {file: file.read_text() for file in path.rglob("zarr.json")}
    assert len(files) == len(LAYOUTS)

    def hurt() -> Path:
        for file, whole in files.items():
            file.write_text(whole)
        file = chance.choice(list(files))
        file.write_bytes(hurt_json(files[file], chance).encode("utf-8", "surrogatepass"))
        return path

    return hurt


def orbax_database_files(folder: Path, chance: random.Random) -> Callable[[], Path]:
    """The database's own files, the payload among them."""
    path = folder / "database"
    ocp.save(str(path), {name: np.ones(layout.shape, np.float32) for name, layout in LAYOUTS.items()})
    files = {file: file.read_bytes() for file in (path / "state").rglob("*") if file.is_file() and file.name[0] != "_"}

    def hurt() -> Path:
        for file, whole in files.items():
            file.write_bytes(whole)
        file = chance.choice(list(files))
        file.write_bytes(hurt_bytes(files[file], chance, len(files[file])))
        return path

    return hurt


def manifest_files(folder: Path, chance: random.Random) -> Callable[[], Path]:
    path = folder / "ours"
    fill(OrbaxWriter(path, PLAIN, {}))
    whole = (path / manifest.NAME).read_text()

    def hurt() -> Path:
        (path / manifest.NAME).write_bytes(hurt_json(whole, chance).encode("utf-8", "surrogatepass"))
        return path

    return hurt


FILES = (
    gguf_files,
    safetensors_files,
    index_files,
    orbax_tree_files,
    orbax_array_files,
    orbax_database_files,
    manifest_files,
)


@pytest.mark.parametrize("files", FILES)
def test_a_damaged_file_is_read_or_refused_soon_and_in_little_memory(tmp_path, files):
    hurt = files(tmp_path, random.Random(files.__name__))
    refused, size = 0, 0
    tracemalloc.start()
    try:
        for _ in range(COUNT):
            path = hurt()
            size = sum(p.stat().st_size for p in path.rglob("*")) if path.is_dir() else path.stat().st_size
            tracemalloc.reset_peak()
            held, start = tracemalloc.get_traced_memory()[0], time.process_time()
            try:
                with gemma_checkpoints.open(path) as reader:
                    for name, info in reader.tensors.items():
                        assert path in (info.file, info.file.parent)
                        reader.read(name)
            except CheckpointError:
                refused += 1
            assert time.process_time() - start < SECONDS
            assert tracemalloc.get_traced_memory()[1] - held < 2 * size + ROOM
    finally:
        tracemalloc.stop()
    assert refused > COUNT // 8  # the damage bites (a database has many bytes that nothing reads)
    assert refused < COUNT or files is manifest_files  # and not all of it is fatal, but where a digest sees it
