"""Writes Hugging Face folders: config.json, tokenizer files, and weights as safetensors, with an index if sharded.

Source: github.com/huggingface/safetensors, README, Format; names of shards as transformers writes them.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma_checkpoints import manifest
from gemma_checkpoints.reader import CheckpointError
from gemma_checkpoints.safetensors import INDEX
from gemma_checkpoints.writer import Layout, Slot, Writer

SHARD_BYTES = 5 * 10**9
ALIGNMENT = 8  # of the data's first byte


class SafetensorsWriter(Writer):
    """A folder that is being written. `files` are further files by name: tokenizer.model, 1_Pooling/config.json.

    A tensor with one "/" in its name goes to a file in that folder: each module of an embedding model has its own.
    """

    config_name, weights_name = "config.json", "model.safetensors"

    def __init__(
        self,
        destination: str | os.PathLike,
        tensors: Mapping[str, Layout],
        config: Mapping[str, Any],
        files: Mapping[str, bytes] | None = None,
        shard_bytes: int = SHARD_BYTES,
    ):
        super().__init__(destination, tensors)
        self.config, self.files, self.shard_bytes = config, files or {}, shard_bytes
        for name, layout in self.tensors.items():
            if layout.encoding.block > 1:
                raise CheckpointError(f"tensor {name!r}: safetensors has no {layout.encoding.name}; use F32 or BF16")

    def layout(self, folder: Path) -> tuple[dict[str, Slot], Path]:
        own = {name: layout for name, layout in self.tensors.items() if "/" not in name}
        shards = _shards(own, self.shard_bytes, self.weights_name)
        files = {self.config_name: _json(self.config), **self.files}
        if len(shards) > 1:
            files[INDEX] = _json(_index(shards, own))
        for name, data in files.items():
            _place(folder, name).write_bytes(data)
        slots: dict[str, Slot] = {}
        for shard, names in shards.items():
            slots |= _begin(folder / shard, {name: self.tensors[name] for name in names})
        for name, layout in self.tensors.items():
            if name not in own:  # a module of an embedding model, in a folder of its own
                room, _, short = name.partition("/")
                slots[name] = _begin(_place(folder, f"{room}/model.safetensors"), {short: layout})[short]
        return slots, folder

    def _finish(self) -> None:
        manifest.make(self._whole, {}).write(self._whole)


def _place(folder: Path, name: str) -> Path:
    """A file in the folder or in a folder of its own there, which is made."""
    parts = name.split("/")
    if len(parts) > 2 or not all(Path(part).name == part and part != ".." for part in parts):
        raise CheckpointError(f"{name!r} is not the name of a file")
    (folder / name).parent.mkdir(exist_ok=True)
    return folder / name


def _shards(tensors: Mapping[str, Layout], limit: int, name: str) -> dict[str, list[str]]:
    """Names of files and of the tensors in each, in order; no file is larger unless a single tensor is."""
    groups: list[list[str]] = [[]]
    size = 0
    for tensor, layout in tensors.items():
        if groups[-1] and size + layout.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += layout.nbytes
    if len(groups) == 1:
        return {name: groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, start=1)}


def _index(shards: Mapping[str, list[str]], tensors: Mapping[str, Layout]) -> dict[str, Any]:
    return {
        "metadata": {"total_size": sum(layout.nbytes for layout in tensors.values())},
        "weight_map": {name: shard for shard, names in shards.items() for name in names},
    }


def _begin(path: Path, tensors: Mapping[str, Layout]) -> dict[str, Slot]:
    """Writes a file's header; where its tensors go."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # without it transformers refuses the file
    offset = 0
    for name, layout in tensors.items():
        end = offset + layout.nbytes
        entries[name] = {"dtype": layout.encoding.name, "shape": list(layout.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    starts = {name: entries[name]["data_offsets"][0] for name in tensors}
    return {name: Slot(layout, path, 8 + len(text) + starts[name]) for name, layout in tensors.items()}


def _json(data: Any) -> bytes:
    return (json.dumps(data, indent=2, sort_keys=True) + "\n").encode()
