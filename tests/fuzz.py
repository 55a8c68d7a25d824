"""Coverage-guided fuzzing of the readers, for longer runs than CI's: python -m tests.fuzz FORMAT [libFuzzer options].

Needs the `fuzz` extra (atheris). FORMAT is gguf, safetensors, index, tree (Orbax) or manifest. Any exception but
CheckpointError stops it and leaves the input in a file; -max_total_time=600 stops it after ten minutes.
"""

import functools
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris
import numpy as np

with atheris.instrument_imports(include=["gemma_checkpoints"]):
    import gemma_checkpoints
    from gemma_checkpoints import CheckpointError, GGUFWriter, Layout, SafetensorsWriter, manifest, orbax
    from gemma_checkpoints.encodings import F32
    from gemma_checkpoints.safetensors import INDEX

assert orbax  # imported here, so that it is instrumented

MAX_TENSORS = 8  # that are read of one input
FILES = {
    "gguf": "model.gguf",
    "safetensors": "model.safetensors",
    "index": f"model/{INDEX}",
    "tree": "model/_METADATA",
    "manifest": f"model/{manifest.NAME}",
}


def target(path: Path, is_manifest: bool) -> Callable[[bytes], None]:
    """What is fuzzed: the file with these bytes is opened and read."""

    def one(data: bytes) -> None:
        path.write_bytes(data)
        try:
            if is_manifest:
                manifest.read(path.parent)
                return
            with gemma_checkpoints.open(path.parent if path.parent.name == "model" else path) as reader:
                for name in list(reader.tensors)[:MAX_TENSORS]:
                    reader.read(name)
        except CheckpointError:
            pass

    return one


def seed(kind: str, folder: Path) -> bytes:
    """A whole file to begin with."""
    layouts = {"a": Layout((2, 32), F32), "b": Layout((3,), F32)}
    if kind == "tree":
        entry = {"key_metadata": [{"key": "a", "key_type": 2}], "value_metadata": {"skip_deserialize": False}}
        return json.dumps({"tree_metadata": {"('a',)": entry}, "use_ocdbt": False, "use_zarr3": True}).encode()
    name = "model.gguf" if kind == "gguf" else "model"
    make = GGUFWriter if kind == "gguf" else functools.partial(SafetensorsWriter, shard_bytes=200)
    with make(folder / name, layouts, {"general.architecture": "gemma3"}) as writer:
        for tensor, layout in layouts.items():
            writer.put(tensor, np.ones(layout.shape))
    if kind == "safetensors":
        return next((folder / name).glob("*.safetensors")).read_bytes()
    return (folder / FILES[kind]).read_bytes()


def main() -> None:
    kind = sys.argv[1] if len(sys.argv) > 1 else ""
    if kind not in FILES:
        raise SystemExit(f"the format is {kind!r}; wanted {', '.join(FILES)}")
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus"
        corpus.mkdir()
        (corpus / "whole").write_bytes(seed(kind, Path(folder)))
        path = Path(folder) / FILES[kind]
        path.parent.mkdir(exist_ok=True)
        atheris.Setup([sys.argv[0], *sys.argv[2:], str(corpus)], target(path, kind == "manifest"))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
