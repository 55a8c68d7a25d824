"""Downloads by name, against a stand-in of the hub on this machine."""

import contextlib
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import gemma_jax as gj
from gemma_jax import hub
from gemma_jax.configs.config import ConfigError
from tests.hub_server import COMMIT, REPO, Hub

TOKENS = [[2, 5, 9]]
ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def online(monkeypatch):
    """The rest of the tests may never ask the real hub; these ask their own, without a wait between tries."""
    pytest.importorskip("huggingface_hub")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)


@pytest.fixture
def files(model_folder):
    return {path.name: path.read_bytes() for path in model_folder.iterdir()}


@pytest.fixture
def server(files):
    with Hub(files | {"README.md": b"words", "pytorch_model.bin": b"\x80\x04", "model.gguf": b"GGUF"}) as server:
        yield server


def fetch(server, tmp_path, source=REPO, **options):
    return hub.download(source, endpoint=server.url, cache=tmp_path / "cache", **options)


def test_only_what_is_read_is_downloaded_and_once(server, files, model_folder, tmp_path):
    folder = fetch(server, tmp_path)
    assert {path.name for path in folder.iterdir()} == set(files)
    assert all((folder / name).read_bytes() == data for name, data in files.items())
    np.testing.assert_array_equal(gj.load(folder).logits(TOKENS), gj.load(model_folder).logits(TOKENS))
    before = sum(method == "GET" and "resolve" in path for method, path, _ in server.requests)
    assert fetch(server, tmp_path) == folder
    assert sum(method == "GET" and "resolve" in path for method, path, _ in server.requests) == before


def test_what_is_there_is_used_when_the_hub_is_not(server, tmp_path):
    folder = fetch(server, tmp_path)
    server.close()
    assert fetch(server, tmp_path) == folder
    assert fetch(server, tmp_path, revision=COMMIT) == folder
    with pytest.raises(FileNotFoundError, match=r"someone/tiny is not, or not wholly, in the local cache.*Connect"):
        hub.download(REPO, endpoint=server.url, cache=tmp_path / "empty")


def test_a_download_that_broke_off_goes_on_where_it_stopped(server, tmp_path):
    """The library keeps what it has in pieces of 10 MB."""
    data = np.random.default_rng(0).bytes(24 << 20)
    server.files, server.cut_after = {"config.json": b"{}", "model.safetensors": data}, 15 << 20
    assert (fetch(server, tmp_path) / "model.safetensors").read_bytes() == data
    assert server.cut_after is None
    asked = [asked for _, path, asked in server.requests if path.endswith("model.safetensors") and asked]
    assert [int(each.removeprefix("bytes=").split("-")[0]) >= 10_000_000 for each in asked] == [True]


@pytest.mark.parametrize(
    ("gate", "token", "error", "words"),
    [
        ("gated", None, PermissionError, r"accept its licence: do so at https://huggingface.co/someone/tiny, then set"),
        ("gated", "bad", PermissionError, "accept its licence"),
        ("private", "bad", FileNotFoundError, "if it is private, set HF_TOKEN"),
    ],
)
def test_licences_and_tokens_are_explained(server, tmp_path, gate, token, error, words):
    server.gate = gate
    with pytest.raises(error, match=words):
        fetch(server, tmp_path, token=token)
    assert fetch(server, tmp_path, token="good").is_dir()


def test_what_the_hub_does_not_have_is_named(server, tmp_path):
    with pytest.raises(FileNotFoundError, match="someone/else is neither a path here nor a repository"):
        fetch(server, tmp_path, "someone/else")
    with pytest.raises(FileNotFoundError, match="someone/tiny has no revision 'v9'"):
        fetch(server, tmp_path, revision="v9")
    with pytest.raises(FileNotFoundError, match=r"someone/tiny has no file 'none\.gguf'"):
        fetch(server, tmp_path, f"{REPO}:none.gguf")


def test_a_gguf_file_is_asked_for_by_name(server, tmp_path):
    assert fetch(server, tmp_path, f"{REPO}:model.gguf").read_bytes() == b"GGUF"


def test_repositories_without_safetensors_say_what_they_have(server, tmp_path):
    server.files = {"config.json": b"{}", "a.gguf": b"", "b.gguf": b""}
    with pytest.raises(FileNotFoundError, match=r"name one of them, as someone/tiny:a.gguf \(there are a.gguf, b.gguf"):
        fetch(server, tmp_path)
    server.files = {"config.json": b"{}", "pytorch_model.bin": b""}
    with pytest.raises(FileNotFoundError, match=r"pytorch_model.bin is a pickle"):
        hub.download(REPO, endpoint=server.url, cache=tmp_path / "other")


@pytest.mark.parametrize("name", ["../../outside.json", "/outside.json", "a/../../../outside.json"])
def test_no_file_is_written_outside_of_the_cache(server, files, tmp_path, name):
    server.files = {**files, name: b"{}"}
    with contextlib.suppress(OSError, ValueError):
        fetch(server, tmp_path)
    assert not [path for path in tmp_path.rglob("outside.json") if tmp_path / "cache" not in path.parents]
    assert not (tmp_path.parent / "outside.json").exists()
    assert not Path("/outside.json").exists()


def test_load_takes_the_name_of_a_repository(server, model_folder, tmp_path):
    """In a process of its own, which reads HF_ENDPOINT and HF_HOME from the start."""
    code = f"import gemma_jax as gj, numpy as np; print(np.asarray(gj.load({REPO!r}).logits({TOKENS})).sum())"
    path = os.pathsep.join(str(ROOT / part) for part in (".", "checkpoints"))
    environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path), "PYTHONPATH": path}
    environment["HF_HUB_OFFLINE"] = "0"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    assert float(done.stdout) == pytest.approx(float(np.asarray(gj.load(model_folder).logits(TOKENS)).sum()), rel=1e-5)


@pytest.mark.parametrize(
    ("source", "want"),
    [
        ("google/gemma-3-1b-it", True),
        ("owner/name:model-q4.gguf", True),
        ("kaggle:google/gemma-3/flax/gemma-3-1b", True),
        ("weights/model.gguf", False),
        ("./owner/name", False),
        ("/owner/name", False),
        ("a/b/c", False),
        ("name", False),
        ("owner/", False),
        ("owner/name:model.bin", False),
    ],
)
def test_names_of_repositories_are_told_from_paths(source, want):
    assert hub.is_reference(source) == want


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("gemma-3-1b", "google/gemma-3-1b-pt"),
        ("gemma-3-27b-it", "google/gemma-3-27b-it"),
        ("gemma-3-270m", "google/gemma-3-270m"),
        ("gemma-2-2b", "google/gemma-2-2b"),
    ],
)
def test_published_models_have_their_repository(name, want, monkeypatch):
    assert hub.repository(name) == want
    asked = []
    monkeypatch.setattr(hub, "download", lambda source, **options: asked.append((source, options)) or 1 / 0)
    if name != "gemma-3-270m":  # the demo's own weights
        with pytest.raises(ZeroDivisionError):
            gj.load(name, revision="r", token="t")
        assert asked == [(want, {"revision": "r", "token": "t"})]


def test_a_name_that_is_no_model_does_not_ask_the_hub():
    with pytest.raises(ConfigError, match="did you mean"):
        gj.load("gemma-3-271m")


def test_a_missing_library_names_the_extra(monkeypatch):
    for module, source in (("huggingface_hub", REPO), ("kagglehub", "kaggle:google/gemma-3/flax/gemma-3-1b")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ImportError, match=r"pip install 'gemma-jax\[hub\]'"):
            hub.download(source)


def test_kaggle_is_asked_through_its_library_and_its_errors_are_explained(monkeypatch, tmp_path):
    """The library is stood in for by a module with its names; the service itself was not asked."""
    library, exceptions = types.ModuleType("kagglehub"), types.ModuleType("kagglehub.exceptions")

    class UnauthenticatedError(Exception):
        pass

    class KaggleApiHTTPError(OSError):
        def __init__(self, status):
            super().__init__(f"{status} Client Error")
            self.response = types.SimpleNamespace(status_code=status)

    exceptions.UnauthenticatedError, exceptions.KaggleApiHTTPError = UnauthenticatedError, KaggleApiHTTPError
    library.exceptions = exceptions
    monkeypatch.setitem(sys.modules, "kagglehub", library)
    monkeypatch.setitem(sys.modules, "kagglehub.exceptions", exceptions)
    source = "kaggle:google/gemma-3/flax/gemma-3-1b"
    asked = []
    library.model_download = lambda handle: asked.append(handle) or str(tmp_path)
    assert hub.download(source) == tmp_path
    assert asked == ["google/gemma-3/flax/gemma-3-1b"]

    def fail(error):
        def download(handle):
            raise error

        library.model_download = download

    for error, kind, words in (
        (UnauthenticatedError(), PermissionError, "KAGGLE_API_TOKEN"),
        (KaggleApiHTTPError(403), PermissionError, "accept its licence"),
        (KaggleApiHTTPError(404), FileNotFoundError, "Kaggle has no model google/gemma-3/flax/gemma-3-1b"),
    ):
        fail(error)
        with pytest.raises(kind, match=words):
            hub.download(source)
