"""LoRA adapters, by themselves or merged into a model's weights (arXiv:2106.09685).

An adapter changes a weight by scale * (a @ b): `a` has the weight's inputs and the rank, `b` the rank and its outputs.
It is kept as PEFT does (Hugging Face), as llama.cpp does (GGUF), or as an Orbax checkpoint of ours.
"""

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import gemma_checkpoints
from gemma_checkpoints.encodings import F32
from gemma_checkpoints.families import styled
from gemma_checkpoints.gguf_writer import GGUFWriter
from gemma_checkpoints.names import Region, Table, Weights
from gemma_checkpoints.reader import CheckpointError, Reader
from gemma_checkpoints.safetensors import SafetensorsReader
from gemma_checkpoints.safetensors_writer import SafetensorsWriter
from gemma_checkpoints.writer import Layout, Writer

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PEFT_FILES = (PEFT_CONFIG, PEFT_WEIGHTS, "adapter_model.bin")
KEY = "lora"  # in gemma_jax.json: the scale of each change
_PEFT_NAME = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight")
_PLAIN = re.compile(r"[\w.]+")
_SIDES = {"peft": ("A", "B"), "gguf": ("lora_a", "lora_b"), "orbax": ("lora_a", "lora_b")}


@dataclass(frozen=True)
class Change:
    """Of one weight: a [*inputs, r] and b [r, *outputs], in the order of the weight's own dimensions; float32."""

    a: np.ndarray
    b: np.ndarray
    scale: float

    @property
    def rank(self) -> int:
        return self.b.shape[0]

    def region(self, region: Region) -> np.ndarray:
        """What is added to a region of the weight, float32."""
        count = self.a.ndim - 1
        return self.scale * np.tensordot(self.a[region[:count]], self.b[(slice(None), *region[count:])], 1)


Adapter = Mapping[str, Change]  # by the weight's path


class MergedWeights(Weights):
    """The weights of a checkpoint with an adapter's changes, added in float32 while they are read.

    Raises: CheckpointError as `Weights`.
    """

    def __init__(self, reader: Reader, table: Table, adapter: Adapter):
        super().__init__(reader, table)
        self.adapter = adapter

    def read(self, path: str, out: np.ndarray, region: Region | None = None) -> None:
        if path not in self.adapter:
            super().read(path, out, region)
            return
        region = region or tuple(slice(0, size) for size in self.entries[path].shape)
        values = np.empty(out.shape, np.float32)
        super().read(path, values, region)
        out[...] = values + self.adapter[path].region(region)


def is_adapter(reader: Reader) -> bool:
    """Whether an open checkpoint is an adapter and not a model."""
    kind = reader.metadata.get("general.type")
    return kind == "adapter" or KEY in reader.metadata or is_peft(reader.path)


def is_peft(path: Path) -> bool:
    """Whether a folder is an adapter of PEFT's."""
    return path.is_dir() and any((path / name).exists() for name in _PEFT_FILES)


def read(path: str | os.PathLike, tables: Mapping[str, Table]) -> dict[str, Change]:
    """The adapter in a PEFT folder, in a GGUF file of llama.cpp's, or in an Orbax checkpoint of ours.

    Args:
        tables: of the model that it is for, by format; all three are needed.

    Raises: FileNotFoundError; CheckpointError for what is damaged, for another model, or of a kind that is not LoRA.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give the folder or file of an adapter")
    kernels = _kernels(tables["huggingface"])
    if is_peft(path):
        return _read_peft(path, tables["huggingface"], kernels)
    with gemma_checkpoints.open(path) as reader:
        if reader.metadata.get("general.type") == "adapter":
            return _read_gguf(reader, tables["gguf"], kernels)
        if KEY in reader.metadata:
            return _read_orbax(reader, tables["orbax"], kernels)
    raise CheckpointError(f"{path} is no adapter: no {PEFT_CONFIG}, no GGUF file of type adapter, no Orbax one of ours")


Dims = tuple[tuple[int, ...], tuple[int, ...]]  # of a kernel: its inputs and its outputs


def _kernels(table: Table) -> dict[str, Dims]:
    """The matrices of a model by path: Hugging Face stores them as [outputs, inputs], ours stand (inputs, outputs)."""
    found = {}
    for entry in table.entries:
        if entry.path.endswith("/kernel") and len(entry.source_shape) == 2:
            inputs = entry.source_shape[1]
            count = next(i for i in range(len(entry.shape) + 1) if math.prod(entry.shape[:i]) >= inputs)
            found[entry.path] = entry.shape[:count], entry.shape[count:]
    return found


def _read_peft(folder: Path, table: Table, kernels: Mapping[str, Dims]) -> dict[str, Change]:
    if not (folder / PEFT_WEIGHTS).is_file():
        raise CheckpointError(
            f"{folder} has no {PEFT_WEIGHTS}; pickles (adapter_model.bin) are never read: save it anew"
        )
    config = _config(folder / PEFT_CONFIG)
    with SafetensorsReader(folder / PEFT_WEIGHTS) as reader:
        pairs: dict[str, dict[str, str]] = {}
        modules: dict[str, str] = {}
        for name in reader.tensors:
            match = _PEFT_NAME.fullmatch(name)
            if match is None:
                raise CheckpointError(f"{folder}: tensor {name!r} is no lora_A or lora_B of a linear layer")
            source = table.normalised(f"{match[1]}.weight")
            pairs.setdefault(source, {})[match[2]] = name
            modules[source] = match[1]
        scales = {source: _scale(config, modules[source]) for source in pairs}
        expected = _Expected(table, kernels, _SIDES["peft"])
        return _changes(reader, expected, pairs, lambda source, rank: scales[source](rank))


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type", "LORA") != "LORA":
        raise CheckpointError(f"{path} does not describe LoRA; other methods of PEFT are not read")
    for key, plain in (
        ("use_dora", False),
        ("bias", "none"),
        ("modules_to_save", None),
        ("fan_in_fan_out", False),
        ("layer_replication", None),
    ):
        if config.get(key, plain) not in (plain, [], None):
            raise CheckpointError(f"{path}: {key} is {config[key]!r}; only plain LoRA is read ({key} {plain!r})")
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.setdefault(key, {}) or {}, dict):
            raise CheckpointError(f"{path}: {key} is {config[key]!r}; wanted an object")
    return config


def _scale(config: Mapping[str, Any], module: str) -> Any:
    """alpha / r (arXiv:2106.09685), or alpha / sqrt(r) (arXiv:2312.03732), as a function of the rank r."""
    alpha = config.get("lora_alpha", 8)
    for name, value in (config["alpha_pattern"] or {}).items():
        if not _PLAIN.fullmatch(name):  # PEFT takes regular expressions, which a file could make run for ever
            raise CheckpointError(f"alpha_pattern has {name!r}; only names of modules are read, whole or their ends")
        if module == name or module.endswith(f".{name}"):
            alpha = value
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise CheckpointError(f"lora_alpha of {module} is {alpha!r}; wanted a number")
    return lambda rank: alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _read_gguf(reader: Reader, table: Table, kernels: Mapping[str, Dims]) -> dict[str, Change]:
    alpha = reader.metadata.get("adapter.lora.alpha", 0.0)
    if reader.metadata.get("adapter.type", "lora") != "lora" or not isinstance(alpha, int | float):
        raise CheckpointError(f"{reader.path} is no LoRA adapter with a number as adapter.lora.alpha")
    pairs: dict[str, dict[str, str]] = {}
    for name in reader.tensors:
        source, _, side = name.rpartition(".")
        pairs.setdefault(source, {})[side] = name
    expected = _Expected(table, kernels, _SIDES["gguf"])
    return _changes(reader, expected, pairs, lambda source, rank: alpha / rank if alpha else 1.0)


def _read_orbax(reader: Reader, table: Table, kernels: Mapping[str, Dims]) -> dict[str, Change]:
    scales = reader.metadata[KEY]
    pairs: dict[str, dict[str, str]] = {}
    for name in reader.tensors:
        source, _, side = name.rpartition("/")
        pairs.setdefault(source, {})[side] = name
    if not isinstance(scales, dict) or set(scales) != set(pairs):
        raise CheckpointError(f"{reader.path}: its config does not give a scale for each of its weights")
    expected = _Expected(table, kernels, _SIDES["orbax"])
    return _changes(reader, expected, pairs, lambda source, rank: float(scales[source]))


@dataclass(frozen=True)
class _Expected:
    """What an adapter's file may hold."""

    table: Table
    kernels: Mapping[str, Dims]
    sides: tuple[str, str]


def _changes(
    reader: Reader, expected: _Expected, pairs: Mapping[str, Mapping[str, str]], scale: Callable[[str, int], float]
) -> dict[str, Change]:
    """The changes from matrices [r, in] and [out, r]; all that does not fit the model is listed at once."""
    paths = {entry.source: entry.path for entry in expected.table.entries if entry.path in expected.kernels}
    problems, changes = [], {}
    for source, pair in pairs.items():
        if source not in paths:
            problems.append(f"{source!r} is no matrix of the model")
            continue
        if set(pair) != set(expected.sides):
            problems.append(f"{source!r} has {', '.join(sorted(pair))}; wanted {' and '.join(expected.sides)}")
            continue
        inputs, outputs = expected.kernels[paths[source]]
        first, second = (reader.tensors[pair[side]].shape for side in expected.sides)
        is_pair = len(first) == len(second) == 2 and first[0] == second[1] > 0
        if not is_pair or (first[1], second[0]) != (math.prod(inputs), math.prod(outputs)):
            wanted = f"[r, {math.prod(inputs)}] and [{math.prod(outputs)}, r]"
            problems.append(f"{source!r} has shapes {list(first)} and {list(second)}, the model wants {wanted}")
            continue
        a, b = (reader.read(pair[side]) for side in expected.sides)
        rank = len(a)
        parts = a.T.reshape(*inputs, rank), b.T.reshape(rank, *outputs)
        changes[paths[source]] = Change(*parts, scale(source, rank))
    if problems or not changes:
        shown = problems[:20] + ([f"and {len(problems) - 20} more"] if len(problems) > 20 else [])
        what = "\n  ".join(shown) or "it changes nothing"
        raise CheckpointError(f"the adapter {reader.path} does not fit the model:\n  {what}")
    return changes


def writer(
    destination: str | os.PathLike,
    format: str,
    adapter: Adapter,
    table: Table,
    base: Mapping[str, Any],
) -> Writer:
    """Writes an adapter as "huggingface" (PEFT), "gguf" (llama.cpp) or "orbax"; it is whole when this returns.

    Args:
        table: of the model in the same format.
        base: what the format says of the model: {"general.architecture": ...} for GGUF, else its name.

    Raises: FileExistsError; ValueError for another format.
    """
    entries = {entry.path: entry for entry in table.entries}
    if unknown := sorted(set(adapter) - set(entries)):
        raise CheckpointError(f"{unknown[0]!r} is no weight of the model")
    sources = {path: entries[path].source for path in adapter}
    if format == "huggingface":
        return _write_peft(destination, adapter, sources, base)
    if format == "gguf":
        return _write_gguf(destination, adapter, sources, base)
    if format == "orbax":
        from gemma_checkpoints.orbax_writer import OrbaxWriter

        tensors = _tensors(adapter, sources, "{}/lora_a", "{}/lora_b")
        scales = {path: change.scale for path, change in adapter.items()}
        return _write(OrbaxWriter(destination, _layouts(tensors), {**base, KEY: scales}), tensors)
    raise ValueError(f"the format is {format!r}; adapters are written as 'huggingface', 'gguf' or 'orbax'")


class _PeftWriter(SafetensorsWriter):
    config_name, weights_name = PEFT_CONFIG, PEFT_WEIGHTS


def _write_peft(
    destination: str | os.PathLike, adapter: Adapter, sources: Mapping[str, str], base: Mapping[str, Any]
) -> Writer:
    names = {path: styled("text", source).removesuffix(".weight") for path, source in sources.items()}
    tensors = _tensors(adapter, names, "base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight")
    first = next(iter(adapter.values()))
    alphas = {path: change.scale * change.rank for path, change in adapter.items()}
    alpha = alphas[next(iter(adapter))]
    config = {
        "base_model_name_or_path": base.get("name"),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": first.rank,
        "rank_pattern": {names[p]: c.rank for p, c in adapter.items() if c.rank != first.rank},
        "alpha_pattern": {names[path]: value for path, value in alphas.items() if value != alpha},
        "target_modules": sorted({name.rpartition(".")[2] for name in names.values()}),
        "task_type": "CAUSAL_LM",
        "use_rslora": False,
    }
    return _write(_PeftWriter(destination, _layouts(tensors), config), tensors)


def _write_gguf(
    destination: str | os.PathLike, adapter: Adapter, sources: Mapping[str, str], base: Mapping[str, Any]
) -> Writer:
    """One alpha stands for all: where a change's own differs, the difference goes into its second factor."""
    alpha = next(change.scale * change.rank for change in adapter.values())
    scaled = {
        path: change
        if change.scale * change.rank == alpha
        else Change(change.a, change.b * np.float32(change.scale * change.rank / alpha), alpha / change.rank)
        for path, change in adapter.items()
    }
    tensors = _tensors(scaled, sources, "{}.lora_a", "{}.lora_b")
    metadata = {**base, "general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": float(alpha)}
    return _write(GGUFWriter(destination, _layouts(tensors), metadata), tensors)


def _tensors(adapter: Adapter, names: Mapping[str, str], a: str, b: str) -> dict[str, np.ndarray]:
    """The matrices [r, in] and [out, r] by their names in a file."""
    tensors = {}
    for path, change in adapter.items():
        tensors[a.format(names[path])] = change.a.reshape(-1, change.rank).T
        tensors[b.format(names[path])] = change.b.reshape(change.rank, -1).T
    return tensors


def _layouts(tensors: Mapping[str, np.ndarray]) -> dict[str, Layout]:
    return {name: Layout(array.shape, F32) for name, array in tensors.items()}


def _write(writer: Writer, tensors: Mapping[str, np.ndarray]) -> Writer:
    with writer:
        for name, array in tensors.items():
            writer.put(name, array)
    return writer
