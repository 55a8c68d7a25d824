"""From one checkpoint format to another, tensor by tensor: no model is ever whole in memory."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import gemma_checkpoints
from gemma_checkpoints import CheckpointError, Reader, Writer, verification
from gemma_checkpoints import lora as adapters
from gemma_checkpoints.names import Assembly, Weights
from gemma_checkpoints.subset import Subset
from gemma_checkpoints.verification import Verification
from gemma_jax import configs, export, loading
from gemma_jax.configs.config import ConfigError
from gemma_jax.configs.slicing import Slicing
from gemma_jax.export import Precision
from gemma_jax.text.vocabulary import TokenizerError

# Files of a Hugging Face folder that go along to another one.
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
PROBE = (2, 818, 5279, 529, 6237, 563)  # tokens whose logits are compared, modulo the size of the vocabulary
SAME = 1e-4  # largest difference of float32 logits that says "the same weights": GGUF rounds 1 + scale


@dataclass(frozen=True)
class Report:
    """What a conversion did."""

    source: str
    destination: str
    num_tensors: int
    num_bytes: int  # of the tensors, as written
    left_out: tuple[str, ...]  # tensors of the source that the destination does not have
    is_verified: bool = False  # every tensor read back has the digest that was written
    logit_difference: float | None = None  # largest, on a fixed prompt; if verified, and the model can be run


def convert(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    to: str,
    dtype: str | None = None,
    quantize: str | None = None,
    text_only: bool = False,
    style: str | None = None,
    lora: str | os.PathLike | None = None,
    slicing: Slicing | None = None,
    verify: bool = False,
    progress: bool | None = None,
) -> Report:
    """Writes the checkpoint at `source` in another format. The destination is absent or whole, whatever happens.

    Args:
        source: as for `load`.
        destination: a new folder; for "gguf" a new file.
        to: "orbax" (ours), "huggingface", "deepmind" (which the library gemma loads) or "gguf".
        dtype: "float32" or "bfloat16". None: bfloat16 if that is how the source stores its matrices, else float32.
        quantize: "q8_0" or "q4_0" for GGUF; see `export.Precision`.
        text_only: leave out the towers of a multimodal model.
        style: of the prefixes of Hugging Face's names, one of `families.STYLES`. None: as the releases do it.
        lora: an adapter that is merged into the weights; see `load`.
        slicing: writes only this part of a MatFormer model; see `matformer`.
        verify: read every tensor back and compare its digest with what was written, then load both and compare their
            logits on a fixed prompt (which needs memory for one whole model).
        progress: show a bar on stderr. None: if it is a terminal.

    Raises: FileExistsError if the destination is there; CheckpointError for a damaged source, for towers that would be
        lost, and if the verification fails; ConfigError for a model that the format cannot describe; ValueError.
    """
    path = loading.find(source)
    with gemma_checkpoints.open(path) as reader:
        config = loading.read_config(reader, path)
        weights = loading.open_weights(reader, config, lora, slicing)
        config = config if slicing is None else slicing.apply(config)
        config = config.replace_all([("vision", None), ("audio", None)]) if text_only else config
        assembly = Assembly(export.table(to, config, style))
        precision = Precision(dtype or stored_dtype(reader), quantize)
        tokenizer = loading.read_tokenizer(reader, path)
        files = {} if to == "gguf" else _tokenizer_files(path)
        target = export.writer(destination, config, assembly.table, precision, tokenizer, files)
        with target:
            _stream(weights, assembly, target, progress, jnp.dtype("float32" if lora else stored_dtype(reader)))
    kept = {entry.path for entry in assembly.table.entries}
    names = (weights.source_name(path) for path in weights.entries if path not in kept)
    left_out = tuple(dict.fromkeys(name for name in names if name is not None))
    num_bytes = sum(layout.nbytes for layout in target.tensors.values())
    report = Report(str(source), str(destination), len(target.tensors), num_bytes, left_out)
    if not verify:
        return report
    report = _reread(report, target)
    return _compared(report, (path, lora, slicing), target.destination, is_exact=_is_exact(reader, precision))


def convert_lora(
    source: str | os.PathLike, destination: str | os.PathLike, *, base: str | os.PathLike, to: str
) -> Report:
    """Writes a LoRA adapter by itself in another format.

    Args:
        source: a PEFT folder, a GGUF adapter or an Orbax one of ours.
        destination: a new folder; for "gguf" a new file.
        base: the model it is for: a published one's name or a checkpoint, of which only the config is read.
        to: "huggingface" (PEFT), "gguf" (llama.cpp) or "orbax".

    Raises: FileExistsError if the destination is there; CheckpointError for a damaged adapter or another model's;
        ConfigError, ValueError.
    """
    name = str(base)
    if name in configs.names():
        config = configs.get(name).decoder
    else:
        path = loading.find(base)
        with gemma_checkpoints.open(path) as reader:
            config = loading.read_config(reader, path).decoder
    writer = export.write_adapter(destination, to, loading.read_lora(source, config), config, name)
    num_bytes = sum(layout.nbytes for layout in writer.tensors.values())
    return Report(str(source), str(destination), len(writer.tensors), num_bytes, ())


def verify(source: str | os.PathLike) -> Verification:
    """Looks at every byte of a checkpoint, and whether its tensors are those of its config; see
    `gemma_checkpoints.verification`. Damage is not raised but reported.

    Raises: FileNotFoundError.
    """
    path = loading.find(source)
    found = verification.verify(path)
    if found.problems:
        return found
    try:
        with gemma_checkpoints.open(path) as reader:
            if adapters.is_adapter(reader):
                return found
            Weights(reader, loading.table_of(reader, loading.read_config(reader, path)))
            loading.read_tokenizer(reader, path)
    except (CheckpointError, ConfigError, TokenizerError) as error:
        return dataclasses.replace(found, problems=(str(error),))
    return found


def stored_dtype(reader: Reader) -> str:
    """What holds the matrices of a checkpoint without loss and without waste."""
    kinds = {info.dtype for info in reader.tensors.values() if len(info.shape) > 1}
    return "bfloat16" if kinds <= {"BF16"} else "float32"


def _is_exact(reader: Reader, precision: Precision) -> bool:
    return precision.quantize is None and precision.dtype in ("float32", stored_dtype(reader))


def _tokenizer_files(path: Path) -> dict[str, bytes]:
    folder = path if path.is_dir() else path.parent
    if path.suffix == ".gguf":
        return {}
    return {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).exists()}


def _stream(
    weights: Weights | Subset, assembly: Assembly, target: Writer, progress: bool | None, matrix_dtype: jnp.dtype
) -> None:
    """`matrix_dtype` holds the source's matrices without loss: bfloat16 takes half the memory."""
    wanted = {entry.path: entry for entry in assembly.table.entries}
    paths = [path for path in weights.paths() if path in wanted]
    is_quiet = None if progress is None else not progress  # tqdm's None: only if stderr is a terminal
    for path in tqdm(paths, desc="tensors", unit="tensor", disable=is_quiet):
        is_matrix = len(weights.entries[path].source_shape) > 1
        values = np.empty(wanted[path].shape, matrix_dtype if is_matrix else np.float32)
        weights.read(path, values)
        for name, stored in assembly.add(path, values):
            target.put(name, stored)


def _reread(report: Report, target: Writer) -> Report:
    """Raises CheckpointError unless every tensor read back has the digest that was written."""
    destination = target.destination
    with gemma_checkpoints.open(destination) as reader:
        wrong = [name for name, digest in target.digests.items() if reader.digest(name) != digest]
        if wrong or set(reader.tensors) != set(target.digests):
            names_wrong = ", ".join(wrong[:5]) or "other names"
            raise CheckpointError(f"{destination} does not hold what was written ({names_wrong}); remove it, try again")
    return dataclasses.replace(report, is_verified=True)


def _compared(
    report: Report,
    source: tuple[Path, str | os.PathLike | None, Slicing | None],
    destination: Path,
    *,
    is_exact: bool,
) -> Report:
    """With the difference of logits."""
    difference = float(np.max(np.abs(_probe(*source) - _probe(destination))))
    if is_exact and not difference <= SAME:
        raise CheckpointError(
            f"logits of {destination} differ from those of {source[0]} by {difference:.3g}, more than {SAME}; remove it"
        )
    return dataclasses.replace(report, logit_difference=difference)


def _probe(path: Path, lora: str | os.PathLike | None = None, slicing: Slicing | None = None) -> np.ndarray:
    gemma = loading.load(path, dtype="float32", lora=lora, slicing=slicing, progress=False)
    tokens = jnp.asarray([[token % gemma.config.vocab_size for token in PROBE]])
    return np.asarray(gemma.logits(tokens))
