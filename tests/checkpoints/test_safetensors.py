import json
import os
import struct

import numpy as np
import pytest
from safetensors.numpy import save_file

import gemma_checkpoints
from gemma_checkpoints import CheckpointError
from gemma_checkpoints.safetensors import INDEX, SafetensorsReader

A = np.arange(12, dtype=np.float32).reshape(3, 4)
B = np.array([0.5, -1.25], np.float16)


def by_hand(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def sharded(folder, **changes):
    save_file({"a": A}, folder / "one.safetensors")
    save_file({"b": B}, folder / "two.safetensors")
    weight_map = {"a": "one.safetensors", "b": "two.safetensors", **changes}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_a_folder_with_one_file_and_its_config(tmp_path):
    save_file({"a": A, "b": B}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "gemma3_text"}')
    with gemma_checkpoints.open(tmp_path) as reader:
        assert reader.metadata == {"model_type": "gemma3_text"}
        np.testing.assert_array_equal(reader.read("a"), A)
        np.testing.assert_array_equal(reader.read("b"), B.astype(np.float32))


def test_shards_are_found_by_their_index_or_without_one(tmp_path):
    sharded(tmp_path)
    for _ in range(2):
        with SafetensorsReader(tmp_path) as reader:
            assert reader.metadata == {}
            np.testing.assert_array_equal(reader.read("a"), A)
            np.testing.assert_array_equal(reader.read("b"), B.astype(np.float32))
        (tmp_path / INDEX).unlink(missing_ok=True)


def test_bfloat16_is_the_upper_half_of_a_float32(tmp_path):
    values = np.array([1.0, -3.140625, 2.0**-130, np.inf], np.float32)
    data = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    path = tmp_path / "x.safetensors"
    path.write_bytes(by_hand({"x": {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}}, data))
    with SafetensorsReader(path) as reader:
        np.testing.assert_array_equal(reader.read("x"), values)


def test_a_missing_shard_is_named_with_what_it_held(tmp_path):
    sharded(tmp_path)
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"two\.safetensors with 1 tensors"):
        SafetensorsReader(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"c": "one.safetensors"}, "no tensor 'c'"), ({"c": "../one.safetensors"}, "not a file of its folder")],
)
def test_an_index_that_does_not_fit_its_shards_is_refused(tmp_path, changes, words):
    sharded(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=words):
        SafetensorsReader(tmp_path)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    save_file({"a": A}, tmp_path / "one.safetensors")
    save_file({"a": A}, tmp_path / "two.safetensors")
    with pytest.raises(CheckpointError, match=r"'a' is in one\.safetensors and in two\.safetensors"):
        SafetensorsReader(tmp_path)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors"):
        SafetensorsReader(tmp_path)


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "0 bytes"),
        (b"abc", "3 bytes"),
        (by_hand({}, length=2**60), "header of"),
        (by_hand(b"{not json"), "not JSON"),
        (by_hand([1]), "list"),
        (by_hand({"x": GOOD}, bytes(4)), "cut off"),
        (by_hand({"x": {**GOOD, "dtype": "F8_E4M3"}}, bytes(8)), "F8_E4M3"),
        (by_hand({"x": {**GOOD, "shape": [3]}}, bytes(8)), "'x' of 12 bytes"),
        (by_hand({"x": {**GOOD, "shape": [-2]}}, bytes(8)), r"shape \[-2\]"),
        (by_hand({"x": {**GOOD, "data_offsets": [0]}}, bytes(8)), "data_offsets"),
        (by_hand({"x": {"dtype": "F32"}}, bytes(8)), "lacks"),
        (by_hand({"x": GOOD, "y": {**GOOD, "data_offsets": [4, 12]}}, bytes(12)), "overlap"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path, data, words):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=words) as error:
        SafetensorsReader(path)
    assert str(path) in str(error.value)


def test_a_config_that_is_no_json_is_refused(tmp_path):
    save_file({"a": A}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not JSON"):
        SafetensorsReader(tmp_path)


@pytest.mark.parametrize("shape", [(7,), (5, 6), (64, 64, 1, 1), (3, 4, 5, 2), (2, 300, 1000), (1, 1, 4, 1)])
def test_any_region_of_a_tensor_can_be_read_into_any_strides(tmp_path, shape):
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    save_file({"a": values}, tmp_path / "x.safetensors")
    rng = np.random.default_rng(1)
    with SafetensorsReader(tmp_path / "x.safetensors") as reader:
        for _ in range(40):
            start = tuple(int(rng.integers(size)) if rng.random() < 0.5 else 0 for size in shape)
            stop = tuple(
                int(rng.integers(first, size)) + 1 if rng.random() < 0.5 else size
                for first, size in zip(start, shape, strict=True)
            )
            wanted = values[tuple(map(slice, start, stop))]
            out = np.full(wanted.shape[::-1], np.nan, np.float32).T
            np.testing.assert_array_equal(reader.read("a", out=out, start=start), wanted)


def test_small_kernels_are_read_many_at_a_time(tmp_path, monkeypatch):
    save_file({"a": np.ones((256, 128, 1, 1), np.float32)}, tmp_path / "x.safetensors")
    with SafetensorsReader(tmp_path / "x.safetensors") as reader:
        pread, counts = os.pread, []
        monkeypatch.setattr(os, "pread", lambda *args: counts.append(args[1]) or pread(*args))
        assert (reader.read("a") == 1).all()
        assert counts == [4 * 256 * 128]
        reader.read("a", out=np.empty((256, 64, 1, 1), np.float32), start=(0, 64, 0, 0))
        assert len(counts) == 1 + 256
