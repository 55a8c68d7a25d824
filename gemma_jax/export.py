"""A decoder's weights on their way into a file: which tensors, in which encoding, with which config and vocabulary."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gemma_checkpoints import GGUFWriter, Layout, SafetensorsWriter, Writer, encodings, names
from gemma_checkpoints.encodings import Encoding
from gemma_checkpoints.names import Table
from gemma_jax.configs.config import ConfigError, DecoderConfig
from gemma_jax.configs.gguf import to_gguf
from gemma_jax.configs.huggingface import to_huggingface
from gemma_jax.text.tokenizer import Tokenizer
from gemma_jax.text.vocabulary import gguf_metadata, serialise

FORMATS = ("huggingface", "gguf")
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


def table(source: str, config: DecoderConfig) -> Table:
    """The names of a decoder's weights in one kind of file, "gguf" or "huggingface"."""
    return names.decoder(
        source,
        config.num_layers,
        has_qk_norm=config.attention.has_qk_norm,
        has_post_norms=config.norm.has_post_norms,
        has_tied_head=config.has_tied_head,
    )


def writer(
    destination: str | os.PathLike,
    to: str,
    config: DecoderConfig,
    shapes: Mapping[str, tuple[int, ...]],
    precision: Precision,
    tokenizer: Tokenizer | None,
    files: Mapping[str, bytes] | None = None,
) -> Writer:
    """A writer that waits for every weight of `shapes` (by our path), under the names of `table(to, config)`.

    `files` are a Hugging Face folder's tokenizer files; without any, tokenizer.model is made from `tokenizer`.
    Raises ConfigError for a decoder or vocabulary that the format cannot hold, ValueError for another format.
    """
    if to not in FORMATS:
        raise ValueError(f"the format is {to!r}; wanted {' or '.join(map(repr, FORMATS))}")
    if to == "huggingface" and precision.quantize is not None:
        raise ValueError(f"quantize is {precision.quantize!r}, but only GGUF holds quantised weights; leave it out")
    if tokenizer is not None and tokenizer.vocab_size != config.vocab_size:
        raise ConfigError(f"vocab_size is {config.vocab_size}, but the tokenizer has {tokenizer.vocab_size} pieces")
    names_in_file = table(to, config)
    layouts = {}
    for entry in names_in_file.entries:
        shape = entry.source_shape(shapes[entry.path])
        layouts[names_in_file.written(entry)] = Layout(shape, _encoding(to, entry.path, shape, precision))
    if to == "gguf":
        return GGUFWriter(destination, layouts, _gguf_metadata(config, precision, tokenizer))
    if not files and tokenizer is not None:
        files = {"tokenizer.model": serialise(tokenizer.vocabulary)}
    return SafetensorsWriter(destination, layouts, to_huggingface(config, precision.dtype), files)


def _encoding(to: str, path: str, shape: tuple[int, ...], precision: Precision) -> Encoding:
    if to == "gguf" and len(shape) == 1:
        return encodings.F32
    is_table = path in ("embedder/embedding", "head/embedding")
    return encodings.Q8_0 if is_table and precision.quantize is not None else precision.encoding


def _gguf_metadata(config: DecoderConfig, precision: Precision, tokenizer: Tokenizer | None) -> dict[str, Any]:
    metadata: dict[str, Any] = to_gguf(config)
    metadata[f"{metadata['general.architecture']}.vocab_size"] = config.vocab_size
    metadata["general.file_type"] = _FILE_TYPES[precision.encoding.name]
    metadata["general.quantization_version"] = _QUANTIZATION_VERSION
    return metadata | (gguf_metadata(tokenizer.vocabulary) if tokenizer else {})
