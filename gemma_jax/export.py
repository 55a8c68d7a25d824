"""A decoder's weights on their way into a file: which tensors, in which encoding, with which config and vocabulary."""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gemma_checkpoints import GGUFFolderWriter, GGUFWriter, Layout, SafetensorsWriter, Writer, encodings, families, lora
from gemma_checkpoints.encodings import Encoding
from gemma_checkpoints.families import DecoderSizes, NoPlaceError, SiglipSizes
from gemma_checkpoints.gemma3n import Block, ConformerSizes, MobileNetSizes
from gemma_checkpoints.names import Assembly, Entry, Table
from gemma_checkpoints.rows import FORMATS
from gemma_jax.configs import gemma3n
from gemma_jax.configs.config import ConfigError, DecoderConfig, VisionConfig
from gemma_jax.configs.gguf import architecture, to_gguf, tower_to_gguf
from gemma_jax.configs.huggingface import to_huggingface
from gemma_jax.configs.sentence_transformers import to_files
from gemma_jax.configs.serialise import to_data
from gemma_jax.configs.towers import AudioConfig, MobileNetConfig
from gemma_jax.nn.adapted import refuse_adapted
from gemma_jax.nn.decoder import Decoder
from gemma_jax.nn.paths import weights
from gemma_jax.nn.sliced import standing
from gemma_jax.nn.stored import refuse_stored
from gemma_jax.text.tokenizer import Tokenizer
from gemma_jax.text.vocabulary import gguf_metadata, serialise

DTYPES: Mapping[str, Encoding] = {"float32": encodings.F32, "bfloat16": encodings.BF16}
QUANTIZATIONS: Mapping[str, Encoding] = {"q8_0": encodings.Q8_0, "q4_0": encodings.Q4_0}
_FILE_TYPES = {"F32": 0, "BF16": 32, "Q8_0": 7, "Q4_0": 2}  # llama.h, enum llama_ftype
_QUANTIZATION_VERSION = 2  # ggml.h, GGML_QNT_VERSION


@dataclass(frozen=True)
class Precision:
    """How weights are stored: `dtype` is "float32" or "bfloat16", `quantize` None, "q8_0" or "q4_0" (GGUF only).

    In a GGUF file vectors (norms) are float32 whatever is asked, as llama.cpp wants them; with "q4_0" the token table,
    which is the head too, is stored as Q8_0. Raises ValueError for other names.
    """

    dtype: str = "float32"
    quantize: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            reason = ": Gemma's activations pass 65504, the end of float16" if self.dtype == "float16" else ""
            raise ValueError(f"dtype is {self.dtype!r}; wanted {' or '.join(map(repr, DTYPES))}{reason}")
        if self.quantize is not None and self.quantize not in QUANTIZATIONS:
            raise ValueError(f"quantize is {self.quantize!r}; wanted {' or '.join(map(repr, QUANTIZATIONS))}, or None")

    @property
    def encoding(self) -> Encoding:
        """Of matrices."""
        return DTYPES[self.dtype] if self.quantize is None else QUANTIZATIONS[self.quantize]


def table(format: str, config: DecoderConfig, style: str | None = None) -> Table:
    """Where the weights of a model lie in one format, one of `FORMATS`; see `families.gemma`.

    Raises ValueError for another format; ConfigError for a model whose weights the format has no names for.
    """
    if format not in FORMATS:
        raise ValueError(f"the format is {format!r}; wanted {' or '.join(map(repr, FORMATS))}")
    towers = _vision(config.vision), _audio(config.audio)
    try:
        return families.gemma(format, _decoder(config), *towers, style)
    except NoPlaceError as error:
        hint = "; leave the towers out (text_only, --text-only)" if any(towers) else ""
        raise ConfigError(f"config {config.name!r} cannot be written: {error}{hint}") from None


def save(
    destination: str | os.PathLike,
    format: str,
    config: DecoderConfig,
    model: Decoder,
    tokenizer: Tokenizer | None,
    precision: Precision,
) -> None:
    """See `Gemma.save`; raises as that does."""
    refuse_stored(model, "a new checkpoint")
    refuse_adapted(model, "a new checkpoint")
    if model.embedder.fetch is not None:
        raise ValueError(
            "the per-layer embeddings are mapped from a checkpoint; convert that, or load with ple='device'"
        )
    assembly = Assembly(table(format, config))
    with writer(destination, config, assembly.table, precision, tokenizer) as target:
        for path, place in weights(standing(model)).items():
            value = place.param.get_raw_value()
            if format != "orbax" and not value.is_fully_addressable:
                raise ValueError(f"the weights lie on several processes; only 'orbax' is written so, not {format!r}")
            whole = np.asarray(value) if value.is_fully_addressable else value
            for name, values in assembly.add(path, place.view(whole)):
                target.put(name, values)


def write_adapter(
    destination: str | os.PathLike, format: str, adapter: lora.Adapter, config: DecoderConfig, name: str | None = None
) -> Writer:
    """Writes a LoRA adapter by itself; it is whole when this returns. `name`: of the model it is for, if not its own.

    Raises: as `gemma_checkpoints.lora.writer`.
    """
    about = {"general.architecture": architecture(config)} if format == "gguf" else {"name": name or config.name}
    return lora.writer(destination, format, adapter, table(format, config), about)


def _decoder(config: DecoderConfig) -> DecoderSizes:
    attention, altup, table = config.attention, config.altup, config.per_layer_embedding
    is_3n = altup is not None or table is not None
    return DecoderSizes(
        vocab_size=config.vocab_size,
        width=config.width,
        num_heads=attention.num_heads,
        num_kv_heads=attention.num_kv_heads,
        head_dim=attention.head_dim,
        ffw_widths=tuple(spec.ffw_width for spec in config.layers),
        has_qk_norm=attention.has_qk_norm,
        has_post_norms=config.norm.has_post_norms,
        has_tied_head=config.has_tied_head,
        dense_widths=config.dense_widths,
        has_zero_centred_norms=config.norm.is_zero_centred,
        num_streams=altup.num_streams if altup else None,
        has_corrected_scale=altup is not None and altup.has_corrected_scale,
        laurel_rank=config.laurel_rank,
        per_layer_table=(table.num_rows, table.width) if table else None,
        sharing_layers=frozenset(i for i, spec in enumerate(config.layers) if spec.kv_source is not None),
        num_spare_rows=gemma3n.NUM_SPARE_ROWS if is_3n and config.vocab_size == gemma3n.VOCAB_SIZE else 0,
    )


def _vision(tower: VisionConfig | MobileNetConfig | None) -> SiglipSizes | MobileNetSizes | None:
    if isinstance(tower, VisionConfig):
        patches = (tower.image_size // tower.patch_size) ** 2
        return SiglipSizes(tower.num_layers, tower.width, tower.num_heads, tower.ffw_width, tower.patch_size, patches)
    if tower is None:
        return None
    names = [field.name for field in dataclasses.fields(Block)]
    stages = tuple(tuple(Block(**{n: getattr(block, n) for n in names}) for block in stage) for stage in tower.stages)
    return MobileNetSizes(tower.stem_width, stages, tower.width, tower.fusion_expansion, tower.num_hard_tokens)


def _audio(tower: AudioConfig | None) -> ConformerSizes | None:
    if tower is None:
        return None
    return ConformerSizes(
        tower.num_layers,
        tower.width,
        tower.num_heads,
        4 * tower.width,
        (tower.channels[0], tower.channels[1]),
        tower.bins_left,
        tower.kernel,
        tower.num_hard_tokens,
    )


def writer(
    destination: str | os.PathLike,
    config: DecoderConfig,
    table: Table,
    precision: Precision,
    tokenizer: Tokenizer | None,
    files: Mapping[str, bytes] | None = None,
) -> Writer:
    """A writer, in the format of the table, that waits for its tensors; see `table` and `names.Assembly`.

    `files` are a folder's tokenizer files; without any, tokenizer.model is made from `tokenizer`.
    Raises ConfigError for a model or vocabulary that the format cannot hold, ValueError for another precision.
    """
    if table.format != "gguf" and precision.quantize is not None:
        raise ValueError(f"quantize is {precision.quantize!r}, but only GGUF holds quantised weights; leave it out")
    if tokenizer is not None and tokenizer.vocab_size != config.vocab_size:
        raise ConfigError(f"vocab_size is {config.vocab_size}, but the tokenizer has {tokenizer.vocab_size} pieces")
    layouts = {
        table.written(entry.source): Layout(entry.written_shape, _encoding(table.format, entry, precision))
        for entry in table.entries
    }
    if table.format == "gguf":
        return _gguf_writer(destination, layouts, config, precision, tokenizer)
    if not files and tokenizer is not None:
        files = {"tokenizer.model": serialise(tokenizer.vocabulary)}
    if table.format == "huggingface":
        files = {**(files or {}), **(to_files(config) if config.dense_widths else {})}
        return SafetensorsWriter(destination, layouts, to_huggingface(config, precision.dtype), files)
    from gemma_checkpoints.orbax_writer import OrbaxWriter  # Orbax takes time to import; loading needs none of it

    return OrbaxWriter(destination, layouts, to_data(config), files, is_nested=table.format == "deepmind")


def _encoding(to: str, entry: Entry, precision: Precision) -> Encoding:
    if to == "gguf" and len(entry.source_shape) == 1:
        return encodings.F32
    if to == "gguf" and entry.path.startswith(("vision/", "mm/")):  # llama.cpp convolves in float32
        return DTYPES[precision.dtype] if entry.path.startswith("vision/layers_") else encodings.F32
    is_ragged = entry.source_shape[-1] % precision.encoding.block != 0
    if to == "gguf" and "/altup/" in entry.path and is_ragged:  # rows of 4, of 16
        return DTYPES[precision.dtype]
    is_table = entry.path in ("embedder/embedding", "head/embedding")
    return encodings.Q8_0 if is_table and precision.quantize is not None else precision.encoding


def _gguf_writer(
    destination: str | os.PathLike,
    layouts: Mapping[str, Layout],
    config: DecoderConfig,
    precision: Precision,
    tokenizer: Tokenizer | None,
) -> Writer:
    metadata = _gguf_metadata(config, precision, tokenizer)
    if config.vision is None:
        return GGUFWriter(destination, layouts, metadata, _unused(config, layouts, precision))
    tower = {name: layout for name, layout in layouts.items() if name.startswith(("v.", "mm."))}
    model = {name: layout for name, layout in layouts.items() if name not in tower}
    tower_metadata = {**tower_to_gguf(config), "general.file_type": _FILE_TYPES[DTYPES[precision.dtype].name]}
    return GGUFFolderWriter(destination, model, metadata, tower, tower_metadata)


def _unused(config: DecoderConfig, used: Mapping[str, Layout], precision: Precision) -> dict[str, Layout]:
    """Keys and values of layers that read another's: released files hold them, and llama.cpp loads none without."""
    sizes = dataclasses.replace(_decoder(config), sharing_layers=frozenset())
    entries = families.gemma("gguf", sizes, None, None).entries
    return {
        entry.source: Layout(entry.written_shape, _encoding("gguf", entry, precision))
        for entry in entries
        if entry.source not in used
    }


def _gguf_metadata(config: DecoderConfig, precision: Precision, tokenizer: Tokenizer | None) -> dict[str, Any]:
    metadata: dict[str, Any] = to_gguf(config)
    metadata[f"{metadata['general.architecture']}.vocab_size"] = config.vocab_size
    metadata["general.file_type"] = _FILE_TYPES[precision.encoding.name]
    metadata["general.quantization_version"] = _QUANTIZATION_VERSION
    return metadata | (gguf_metadata(tokenizer.vocabulary) if tokenizer else {})
