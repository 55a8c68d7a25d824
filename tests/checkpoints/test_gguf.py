import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gemma_checkpoints
from gemma_checkpoints import CheckpointError
from gemma_checkpoints.gguf import GGUFReader


@pytest.mark.parametrize("version", [2, 3])
def test_metadata_and_tensors_are_read_back(gguf, written, version):
    with GGUFReader(written(gguf.small_file(version))) as reader:
        found = dict(reader.metadata)
        assert found.pop("a.list").tolist() == [3, 1, 2]
        assert found == {
            "general.architecture": "gemma3",
            "a.number": 7,
            "a.real": 0.5,
            "a.flag": True,
            "a.words": ["é", "", "ab"],
        }
        assert {name: info.shape for name, info in reader.tensors.items()} == {"matrix": (2, 32), "vector": (4,)}
        np.testing.assert_array_equal(reader.read("matrix"), gguf.MATRIX)
        np.testing.assert_array_equal(reader.read("vector"), gguf.VECTOR)


def test_open_knows_a_gguf_by_its_content_and_not_its_name(gguf, written):
    with gemma_checkpoints.open(written(gguf.small_file(), "weights.bin")) as reader:
        assert set(reader.tensors) == {"matrix", "vector"}


def test_tensors_go_where_the_caller_wants_them(gguf, written):
    """Transposed, as another type, and only the first rows."""
    with GGUFReader(written(gguf.small_file())) as reader:
        out = np.zeros((32, 2), np.float64)
        reader.read("matrix", out=out.T)
        np.testing.assert_array_equal(out, gguf.MATRIX.T)
        first = np.zeros((1, 32), np.float32)
        reader.read("matrix", out=first)
        np.testing.assert_array_equal(first, gguf.MATRIX[:1])
        with pytest.raises(ValueError, match=r"\(3, 32\)"):
            reader.read("matrix", out=np.zeros((3, 32), np.float32))
        with pytest.raises(CheckpointError, match="'other'"):
            reader.read("other")


def hostile(gguf) -> dict[str, tuple[bytes, str]]:
    """What is wrong: the file, and words of the error."""
    make, info, entry = gguf.gguf_bytes, gguf.tensor_info, gguf.entry
    number, huge = struct.pack("<I", 1), 2**62
    data = bytes(512)

    def key(kind: int, value: bytes, name: str | bytes = "k") -> bytes:
        return make([entry(name, kind, value)], [])

    def tensor(*infos: bytes) -> bytes:
        return make([], list(infos), data)

    return {
        "empty": (b"", "0 bytes"),
        "a text": (b"Once upon a time there was a model that was none.\n" * 3, "not a GGUF"),
        "another magic": (make([], [], magic=b"GGML", version=3) + data, "not a GGUF"),
        "version 1": (make([], [], version=1) + data, "version 1"),
        "version 4": (make([], [], version=4) + data, "version 4"),
        "big endian": (make([], [], version=3 << 24) + data, "big-endian"),
        "too many tensors": (make([], [], num_tensors=huge) + data, f"{huge} tensors"),
        "too many keys": (make([], [], num_entries=huge) + data, f"{huge} keys"),
        "string too long": (make([struct.pack("<Q", huge)], []) + data, "key 0"),
        "array too long": (key(gguf.ARRAY, gguf.array(gguf.UINT32, [number], huge)), f"{huge} numbers"),
        "strings too many": (key(gguf.ARRAY, gguf.array(gguf.STRING, [], huge)), f"{huge} strings"),
        "array of arrays": (key(gguf.ARRAY, gguf.array(gguf.ARRAY, [number])), "type 9"),
        "unknown value type": (key(13, number), "type 13"),
        "key is no text": (key(gguf.UINT32, number, b"\xff\xfe"), "UTF-8"),
        "value is no text": (key(gguf.STRING, gguf.string(b"\xff")), "UTF-8"),
        "a word is no text": (key(gguf.ARRAY, gguf.array(gguf.STRING, [gguf.string(b"\xff")])), "UTF-8"),
        "key twice": (make([entry("k", gguf.UINT32, number)] * 2, []), "'k' is there twice"),
        "alignment 0": (key(gguf.UINT32, struct.pack("<I", 0), "general.alignment"), "general.alignment is 0"),
        "alignment 3": (key(gguf.UINT32, struct.pack("<I", 3), "general.alignment"), "general.alignment is 3"),
        "alignment text": (key(gguf.STRING, gguf.string("x"), "general.alignment"), "general.alignment is 'x'"),
        "tensor twice": (tensor(info("t", (4,), 0, 0), info("t", (4,), 0, 32)), "'t' is there twice"),
        "overlap": (tensor(info("t", (16,), 0, 0), info("u", (4,), 0, 32)), "'t' and 'u' overlap"),
        "misaligned": (tensor(info("t", (4,), 0, 8)), "begins at 8"),
        "beyond the end": (tensor(info("t", (4,), 0, 512)), "'t' should end at byte"),
        "no dimensions": (tensor(info("t", (), 0, 0)), "0 dimensions"),
        "five dimensions": (tensor(info("t", (1,) * 5, 0, 0)), "5 dimensions"),
        "a dimension of 0": (tensor(info("t", (0, 4), 0, 0)), "'t' has shape"),
        "sizes that overflow": (tensor(info("t", (2**32, 2**32), 0, 0)), "'t' should end at byte"),
        "unknown tensor type": (tensor(info("t", (4,), 999, 0)), "type 999"),
        "half a block": (tensor(info("t", (33,), 8, 0)), "multiples of 32"),
    }


def test_every_damage_is_named_with_its_file(gguf, written):
    for what, (data, words) in hostile(gguf).items():
        path = written(data)
        with pytest.raises(CheckpointError) as error:
            GGUFReader(path)
        assert words in str(error.value), what
        assert str(path) in str(error.value), what


def test_every_cut_is_noticed_when_the_file_is_opened(gguf, written):
    data = gguf.small_file()
    for length in range(len(data)):
        with pytest.raises(CheckpointError):
            GGUFReader(written(data[:length]))


def test_a_file_cut_after_it_was_opened_is_noticed_when_read(gguf, written):
    path = written(gguf.small_file())
    reader = GGUFReader(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="'vector'"):
        reader.read("vector")


@given(st.data())
@settings(max_examples=150, deadline=2000)
def test_changed_bytes_give_a_file_or_a_checkpoint_error_and_nothing_else(gguf, data):
    content = bytearray(gguf.small_file())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, 420))] = data.draw(st.sampled_from([0, 1, 8, 9, 127, 128, 255]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "changed.gguf"
        path.write_bytes(content)
        try:
            with GGUFReader(path) as reader:
                for name in reader.tensors:
                    reader.read(name)
        except CheckpointError:
            pass


@pytest.mark.slow
@pytest.mark.parity
def test_the_real_file_is_decoded_as_by_the_gguf_library():
    library = pytest.importorskip("gguf")
    from gemma_jax.loading import find

    path = find("gemma-3-270m")
    wanted = {"token_embd.weight", "output_norm.weight", "blk.0.attn_q.weight", "blk.17.ffn_down.weight"}
    with GGUFReader(path) as reader:
        theirs = [tensor for tensor in library.GGUFReader(path).tensors if tensor.name in wanted]
        assert {tensor.name for tensor in theirs} == wanted
        for tensor in theirs:
            want = library.dequantize(tensor.data, tensor.tensor_type)
            np.testing.assert_array_equal(reader.read(tensor.name), want.reshape(reader.tensors[tensor.name].shape))
