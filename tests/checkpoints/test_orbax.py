"""Orbax checkpoints: the library reads ours, ours reads the library's in every form, and damage never goes unseen."""

import json
import random
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from orbax import checkpoint as ocp_v0
from orbax.checkpoint.experimental import v1 as ocp

import gemma_checkpoints
from gemma_checkpoints import CheckpointError, Layout, manifest, orbax_writer
from gemma_checkpoints.encodings import BF16, F32, Q8_0
from gemma_checkpoints.orbax import CONFIG, OrbaxReader
from gemma_checkpoints.orbax_writer import OrbaxWriter
from gemma_checkpoints.verification import verify

LAYOUTS = {
    "embedder/embedding": Layout((40, 6), BF16),
    "layers_0/attn/q/kernel": Layout((6, 4, 3), F32),
    "layers_0/norm/scale": Layout((6,), F32),
}


def arrays() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    kinds = {"BF16": ml_dtypes.bfloat16, "F32": np.float32}
    return {
        name: generator.normal(size=layout.shape).astype(kinds[layout.encoding.name])
        for name, layout in LAYOUTS.items()
    }


def nested(flat: dict[str, np.ndarray]) -> dict:
    tree: dict = {}
    for name, value in flat.items():
        *places, leaf = name.split("/")
        node = tree
        for place in places:
            node = node.setdefault(place, {})
        node[leaf] = value
    return tree


def write(path: Path, monkeypatch, **options) -> None:
    monkeypatch.setattr(orbax_writer, "CHUNK_BYTES", 64)
    monkeypatch.setattr(orbax_writer, "BATCH_BYTES", 256)
    with OrbaxWriter(path, LAYOUTS, {"some": "config"}, {"tokenizer.model": b"pieces"}, **options) as writer:
        for name, value in arrays().items():
            writer.put(name, value)


@pytest.fixture
def saved(tmp_path, monkeypatch):
    write(tmp_path / "saved", monkeypatch)
    return tmp_path / "saved"


def read_all(path: Path) -> dict[str, np.ndarray]:
    with gemma_checkpoints.open(path) as reader:
        return {name: reader.read(name) for name in reader.tensors}


def assert_same(found: dict[str, np.ndarray]) -> None:
    assert set(found) == set(LAYOUTS)
    for name, value in arrays().items():
        np.testing.assert_array_equal(found[name], value.astype(np.float32), err_msg=name)


def test_what_is_written_is_read_back_with_its_files_and_several_pieces(saved):
    assert_same(read_all(saved))
    with OrbaxReader(saved) as reader:
        assert reader.format == "orbax"
        assert reader.metadata == {"some": "config"}
        assert len(reader.manifest.pieces["embedder/embedding"]) > 4
        assert {name: info.dtype for name, info in reader.tensors.items()} == {
            name: layout.encoding.name for name, layout in LAYOUTS.items()
        }
    assert (saved / "tokenizer.model").read_bytes() == b"pieces"


def test_the_orbax_library_loads_ours(saved):
    tree = ocp.load(str(saved))
    for name, value in arrays().items():
        leaf = tree
        for part in name.split("/"):
            leaf = leaf[part]
        np.testing.assert_array_equal(np.asarray(leaf), value)


@pytest.mark.parametrize(("start", "size"), [((0, 0), (40, 6)), ((7, 2), (11, 3)), ((39, 5), (1, 1))])
def test_a_region_is_what_the_whole_has_there(saved, start, size):
    with OrbaxReader(saved) as reader:
        out = np.full(size, np.nan, np.float32)
        reader.read("embedder/embedding", out=out, start=start)
    whole = arrays()["embedder/embedding"].astype(np.float32)
    np.testing.assert_array_equal(out, whole[start[0] : start[0] + size[0], start[1] : start[1] + size[1]])


def save_v1(path: Path, tree: dict, **options) -> None:
    context = ocp.Context()
    for name, value in options.items():
        setattr(context.array.saving, name, value)
    with context:
        ocp.save(str(path), tree)


FORMS = {
    "v1": save_v1,
    "zarr2": lambda path, tree: save_v1(path, tree, use_zarr3=False),
    "one folder a tensor": lambda path, tree: save_v1(path, tree, use_ocdbt=False, use_zarr3=False),
    "one folder a tensor, zarr3": lambda path, tree: save_v1(path, tree, use_ocdbt=False),
    "v0 at the root": lambda path, tree: ocp_v0.PyTreeCheckpointer().save(path, tree),
}


@pytest.mark.parametrize("form", FORMS)
def test_checkpoints_of_the_library_are_read_in_every_form(tmp_path, form):
    FORMS[form](tmp_path / "theirs", nested(arrays()))
    assert_same(read_all(tmp_path / "theirs"))
    found = verify(tmp_path / "theirs")
    assert (found.problems, found.is_sealed, found.num_tensors) == ((), False, 3)


def test_every_flipped_bit_is_found_and_none_is_ever_loaded(saved):
    """The payload is where Orbax itself loads wrong weights without a word."""
    chance, files = random.Random(0), [path for path in saved.rglob("*") if path.is_file() and path.stat().st_size]
    assert verify(saved).problems == ()
    refused = 0
    for number in range(300):
        path = files[number % len(files)]
        data = path.read_bytes()
        at = chance.randrange(len(data))
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :])
        found = verify(saved)
        assert found.problems, (path, at)
        assert path.name in found.problems[0]
        try:
            assert_same(read_all(saved))  # a bit that nothing reads
        except CheckpointError:
            refused += 1
        path.write_bytes(data)
    assert refused > 80  # the rest were bits that loading does not read
    assert verify(saved).problems == ()


def test_files_that_are_missing_cut_off_or_foreign_are_found(saved):
    for path in [path for path in saved.rglob("*") if path.is_file()]:
        data, name = path.read_bytes(), path.name
        path.unlink()
        if name == manifest.NAME:
            assert any(manifest.NAME in problem for problem in verify(saved).problems)
        else:
            assert any(f"{name} is missing" in problem for problem in verify(saved).problems)
        if data:
            path.write_bytes(data[:-1])
            assert any(name in problem for problem in verify(saved).problems)
        path.write_bytes(data)
    (saved / "state" / "more").write_bytes(b"")
    assert verify(saved).problems == ("state/more is foreign: it was not written with the checkpoint",)
    (saved / "state" / "more").unlink()
    (saved / "state" / "d2").symlink_to(saved / "state" / "d", target_is_directory=True)
    assert "state/d2 is foreign" in verify(saved).problems[0]


def test_ours_without_its_manifest_is_not_loaded(saved):
    (saved / manifest.NAME).unlink()
    with pytest.raises(CheckpointError, match=f"has no {manifest.NAME}"):
        gemma_checkpoints.open(saved)


def test_a_config_or_tokenizer_that_was_changed_is_not_loaded(saved):
    (saved / CONFIG).write_text('{"other": "config"}')
    with pytest.raises(CheckpointError, match=f"{CONFIG} is damaged or foreign"):
        gemma_checkpoints.open(saved)


def test_a_piece_that_is_gone_is_an_error_and_not_zeros(tmp_path):
    save_v1(tmp_path / "theirs", nested(arrays()), use_ocdbt=False)
    pieces = [path for path in (tmp_path / "theirs").rglob("c/*") if "embedding" in str(path)]
    shutil.rmtree(pieces[0]) if pieces[0].is_dir() else pieces[0].unlink()
    with pytest.raises(CheckpointError, match="'embedder/embedding' cannot be read"):
        read_all(tmp_path / "theirs")


def test_a_tree_that_is_damaged_or_points_outside_is_refused(tmp_path):
    save_v1(tmp_path / "theirs", nested(arrays()), use_ocdbt=False)
    path = tmp_path / "theirs" / "state" / "_METADATA"
    whole = json.loads(path.read_text())
    key, entry = next(iter(whole["tree_metadata"].items()))
    for part in ("..", "", "a\0b", "/etc"):
        hurt = {**entry, "key_metadata": [{"key": part, "key_type": 2}]}
        path.write_text(json.dumps({**whole, "tree_metadata": {key: hurt}}))
        with pytest.raises(CheckpointError):
            gemma_checkpoints.open(tmp_path / "theirs")
    for text in ("[]", "{", "{}", '{"tree_metadata": {"a": 3}}', '{"tree_metadata": {"a": {"key_metadata": []}}}'):
        path.write_text(text)
        with pytest.raises(CheckpointError):
            gemma_checkpoints.open(tmp_path / "theirs")


@pytest.mark.parametrize("name", ["with space", "per%20cent#and?", "ümlaut-東京", "a.b'c\"d"])
def test_any_name_of_a_folder_works(tmp_path, monkeypatch, name):
    write(tmp_path / name, monkeypatch)
    assert_same(read_all(tmp_path / name))
    assert verify(tmp_path / name).problems == ()


def test_a_folder_of_links_as_download_caches_have_is_whole(saved, tmp_path):
    copy = tmp_path / "links"
    for path in saved.rglob("*"):
        if path.is_file():
            (copy / path.relative_to(saved)).parent.mkdir(parents=True, exist_ok=True)
            (copy / path.relative_to(saved)).symlink_to(path)
    assert verify(copy).problems == ()
    assert_same(read_all(copy))


def test_bad_requests_leave_nothing_behind(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="Orbax has no Q8_0"):
        OrbaxWriter(tmp_path / "x", {"a": Layout((4, 32), Q8_0)}, {})
    with pytest.raises(CheckpointError, match="3 tensors never came"), OrbaxWriter(tmp_path / "x", LAYOUTS, {}):
        pass
    outside = OrbaxWriter(tmp_path / "x", {"a": Layout((2,), F32)}, {}, {"../y": b""})
    with pytest.raises(CheckpointError, match=r"'\.\./y' is not the name of a file"), outside:
        outside.put("a", np.zeros(2))
    write(tmp_path / "x", monkeypatch)
    with pytest.raises(FileExistsError):
        write(tmp_path / "x", monkeypatch)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_damage_on_the_way_to_the_disk_is_an_error(tmp_path, monkeypatch):
    real = ocp.partial.finalize

    def finalize_and_damage(path):
        real(path)
        for file in Path(path).rglob("d/*"):
            if file.stat().st_size > 400:
                data = bytearray(file.read_bytes())
                data[10] ^= 1
                file.write_bytes(data)

    monkeypatch.setattr(orbax_writer.ocp.partial, "finalize", finalize_and_damage)
    with pytest.raises(CheckpointError):
        write(tmp_path / "x", monkeypatch)
    assert not list(tmp_path.iterdir())
