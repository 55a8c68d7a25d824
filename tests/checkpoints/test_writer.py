"""What is written is read back bit for bit, by us and by the formats' own libraries; and all or nothing is written."""

import os
import random
import signal
import stat
import subprocess
import sys
import time

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import gemma_checkpoints
from gemma_checkpoints import CheckpointError, GGUFReader, GGUFWriter, Layout, SafetensorsReader, SafetensorsWriter
from gemma_checkpoints.encodings import BF16, F16, F32, GGML, Q4_0, Q8_0
from gemma_checkpoints.gguf_writer import DIGESTS
from gemma_checkpoints.verification import verify

RANDOM = np.random.default_rng(0)
ARRAYS = {  # the first is decoded and encoded in several pieces
    "big": RANDOM.normal(size=(700, 512)).astype(np.float32),
    "narrow": RANDOM.normal(size=(6, 32)).astype(ml_dtypes.bfloat16),
    "turned": RANDOM.normal(size=(32, 6)).astype(np.float32).T,
    "cube": RANDOM.normal(size=(3, 5, 64)).astype(np.float32),
    "vector": RANDOM.normal(size=7).astype(np.float32),
}
LAYOUTS = {name: Layout(array.shape, BF16 if name == "narrow" else F32) for name, array in ARRAYS.items()}
METADATA = {
    "general.architecture": "gemma3",
    "a.flag": True,
    "a.whole": 7,
    "a.negative": -7,
    "a.huge": 2**40,
    "a.real": 0.5,
    "a.words": ["é", "", "ab"],
    "a.numbers": np.array([3, 1, 2], np.int32),
}


def writer_of(kind, path, layouts=LAYOUTS):
    return GGUFWriter(path, layouts, METADATA) if kind == "gguf" else SafetensorsWriter(path, layouts, {"a": 1})


def reader_of(kind, path):
    return GGUFReader(path) if kind == "gguf" else SafetensorsReader(path)


@pytest.mark.parametrize("kind", ["gguf", "huggingface"])
def test_tensors_come_back_bit_for_bit_in_whatever_order_they_came(tmp_path, kind):
    with writer_of(kind, tmp_path / "out") as writer:
        for name in reversed(ARRAYS):
            writer.put(name, ARRAYS[name])
    with reader_of(kind, tmp_path / "out") as reader:
        assert list(reader.tensors) == list(ARRAYS)
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(reader.read(name), array.astype(np.float32))
            assert reader.digest(name) == writer.digests[name]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_safetensors_library_reads_every_shard(tmp_path):
    limit = LAYOUTS["big"].nbytes
    with SafetensorsWriter(tmp_path / "out", LAYOUTS, {"a": 1}, {"tokenizer.model": b"x"}, limit) as writer:
        for name, array in ARRAYS.items():
            writer.put(name, array)
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert shards == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    found = {name: array for shard in shards for name, array in load_file(tmp_path / "out" / shard).items()}
    assert {name: array.dtype for name, array in found.items()} == {
        name: np.dtype(ml_dtypes.bfloat16 if name == "narrow" else np.float32) for name in ARRAYS
    }
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name], array)
    with SafetensorsReader(tmp_path / "out") as reader:  # through the index
        assert set(reader.tensors) == set(ARRAYS)
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"x"


@pytest.mark.parity
def test_the_gguf_library_reads_tensors_and_metadata(tmp_path):
    gguf = pytest.importorskip("gguf", reason="the parity extra brings the oracle")
    kinds = {"big": Q8_0, "narrow": BF16, "turned": F32, "cube": Q4_0, "vector": F32}
    with GGUFWriter(tmp_path / "o", {n: Layout(a.shape, kinds[n]) for n, a in ARRAYS.items()}, METADATA) as writer:
        for name, array in ARRAYS.items():
            writer.put(name, array)
    theirs = gguf.GGUFReader(tmp_path / "o")
    with GGUFReader(tmp_path / "o") as ours:
        for tensor in theirs.tensors:
            assert tuple(tensor.shape[::-1]) == ARRAYS[tensor.name].shape
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(ARRAYS[tensor.name].shape)
            np.testing.assert_array_equal(ours.read(tensor.name), values)
    for key, value in METADATA.items():
        np.testing.assert_array_equal(theirs.get_field(key).contents(), value)
    assert len(theirs.get_field(DIGESTS).contents()) == len(ARRAYS) + 1


@pytest.mark.parametrize("kind", ["gguf", "huggingface"])
def test_every_flipped_bit_and_every_cut_is_found(tmp_path, kind):
    layouts = {"a": Layout((3, 5), F32), "b": Layout((7,), F32), "c": Layout((2, 2), F32)}
    with writer_of(kind, tmp_path / "out", layouts) as writer:
        for name, layout in layouts.items():
            writer.put(name, np.ones(layout.shape))
    found = verify(tmp_path / "out")
    assert (found.problems, found.is_sealed, found.num_tensors, found.num_bytes) == ((), True, 3, 4 * 26)
    chance = random.Random(0)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()] or [tmp_path / "out"]
    for path in files:
        data = path.read_bytes()
        for at in range(len(data)):
            path.write_bytes(data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :])
            assert verify(tmp_path / "out").problems, (path, at)
        for length in range(0, len(data), 7):
            path.write_bytes(data[:length])
            assert verify(tmp_path / "out").problems, (path, length)
        path.write_bytes(data + b"\0")
        assert verify(tmp_path / "out").problems
        path.write_bytes(data)
    assert verify(tmp_path / "out").problems == ()


def test_a_folder_without_a_file_or_with_another_is_found(tmp_path):
    with writer_of("huggingface", tmp_path / "out") as writer:
        for name, array in ARRAYS.items():
            writer.put(name, array)
    (tmp_path / "out" / "pytorch_model.bin").write_bytes(b"x")
    (tmp_path / "out" / "config.json").unlink()
    assert verify(tmp_path / "out").problems == (
        "config.json is missing",
        "pytorch_model.bin is foreign: it was not written with the checkpoint",
    )


def test_values_that_are_no_numbers_are_found_where_there_are_no_digests(tmp_path):
    save_file({"a": np.array([1.0, np.nan]), "b": np.ones(2)}, tmp_path / "model.safetensors")
    found = verify(tmp_path)
    assert not found.is_sealed
    assert found.problems == ("tensor 'a' (F64) has values that are infinite or no numbers",)


@pytest.mark.parametrize("kind", ["gguf", "huggingface"])
def test_an_error_leaves_neither_destination_nor_rests(tmp_path, kind):
    def write_and_fail():
        with writer_of(kind, tmp_path / "out") as writer:
            writer.put("vector", ARRAYS["vector"])
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_and_fail()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("puts", "problem"),
    [
        ([("vector", ARRAYS["vector"])], "4 tensors never came"),
        ([("vector", ARRAYS["vector"])] * 2, "'vector' was written before"),
        ([("other", ARRAYS["vector"])], "'other' was not announced"),
        ([("vector", ARRAYS["big"])], r"'vector' has shape \[700, 512\], announced was \[7\]"),
    ],
)
def test_tensors_that_do_not_fit_the_announcement_are_refused(tmp_path, puts, problem):
    def write():
        with writer_of("gguf", tmp_path / "out") as writer:
            for name, array in puts:
                writer.put(name, array)

    with pytest.raises(CheckpointError, match=problem):
        write()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["gguf", "huggingface"])
def test_others_may_read_what_the_umask_lets_them(tmp_path, kind):
    before = os.umask(0o027)
    try:
        with writer_of(kind, tmp_path / "out", {}):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == (0o640 if kind == "gguf" else 0o750)


def test_what_cannot_be_stored_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(CheckpointError, match="'a' cannot be written as F16: Gemma's activations pass"):
        writer_of("gguf", tmp_path / "out", {"a": Layout((2, 32), F16)})
    with pytest.raises(CheckpointError, match="cannot be written as Q4_K"):
        writer_of("gguf", tmp_path / "out", {"a": Layout((2, 256), GGML[12])})
    with pytest.raises(CheckpointError, match=r"shape \[2, 33\]; rows of Q8_0 are multiples of 32"):
        writer_of("gguf", tmp_path / "out", {"a": Layout((2, 33), Q8_0)})
    with pytest.raises(CheckpointError, match="safetensors has no Q8_0"):
        writer_of("huggingface", tmp_path / "out", {"a": Layout((2, 32), Q8_0)})
    with pytest.raises(CheckpointError, match="GGUF stores 1 to 4 dimensions"):
        writer_of("gguf", tmp_path / "out", {"a": Layout((), F32)})
    with pytest.raises(CheckpointError, match="is not the name of a file"):
        SafetensorsWriter(tmp_path / "out", {}, {}, {"../x": b""}).__enter__()
    with pytest.raises(CheckpointError, match=r"x.y is None, NoneType; GGUF metadata"):
        GGUFWriter(tmp_path / "out", {}, {"x.y": None}).__enter__()
    (tmp_path / "there").touch()
    with pytest.raises(FileExistsError, match="there already"):
        writer_of("gguf", tmp_path / "there")
    with pytest.raises(FileNotFoundError, match="is no folder"):
        writer_of("gguf", tmp_path / "no" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


_WRITES = """
import sys, numpy as np
from gemma_checkpoints import GGUFWriter, Layout, SafetensorsWriter, orbax_writer
from gemma_checkpoints.encodings import F32
layouts = {f"t{i}": Layout((256, 512), F32) for i in range(40)}
orbax_writer.BATCH_BYTES = 4 << 20
make = {
    "gguf": lambda path: GGUFWriter(path, layouts, {"a": 1}),
    "huggingface": lambda path: SafetensorsWriter(path, layouts, {}),
    "orbax": lambda path: orbax_writer.OrbaxWriter(path, layouts, {}),
}
print("begin", flush=True)
with make[sys.argv[1]](sys.argv[2]) as writer:
    for i, name in enumerate(layouts):
        writer.put(name, np.full((256, 512), i, np.float32))
print("end", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gguf", "huggingface", "orbax"])
def test_a_writer_killed_at_any_moment_leaves_the_destination_absent_or_whole(tmp_path, kind):
    """20 kills, spread over the time that one whole write takes."""
    seconds, outcomes = None, []
    for attempt in range(-1, 20):
        target = tmp_path / f"{kind}{attempt}"
        process = subprocess.Popen(
            [sys.executable, "-c", _WRITES, kind, str(target)],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"begin\n"
        start = time.perf_counter()
        if attempt < 0:
            assert process.wait() == 0
            seconds = time.perf_counter() - start
        else:
            assert seconds is not None
            time.sleep(seconds * attempt / 19)
            process.send_signal(signal.SIGKILL)
            process.wait()
        process.stdout.close()
        outcomes.append(target.exists())
        if target.exists():
            assert verify(target).problems == ()
            with gemma_checkpoints.open(target) as reader:
                assert all((reader.read(f"t{i}") == i).all() for i in range(40))
    assert outcomes[0]
    assert not outcomes[1]
