"""What the weights of a model take, and where; from the config alone, nothing is allocated."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp

from gemma_jax import export
from gemma_jax.configs.config import DecoderConfig

PIECES, TABLE = "embedder/ple", "embedder/embedding"
WHERE: Mapping[str, str] = {"device": "device", "host": "host", "mapped": "file"}  # pieces are for a value of ple


@dataclass(frozen=True)
class Held:
    """What lies in one place."""

    parameters: int
    nbytes: int


def weights_held(
    config: DecoderConfig,
    dtype: jnp.dtype | str = "bfloat16",
    ple: str = "device",
    stored: Mapping[str, int] | None = None,
) -> dict[str, Held]:
    """What `load(dtype=dtype, ple=ple)` puts on the "device" and in memory of the "host", and leaves in the "file".

    Counted are all weights of the model that runs, the token table among them and once (a tied head is the same
    array): the parameters of `Decoder(config)`, bytes as its arrays have. Of a sharded model: all shards. With dtype
    "stored" bytes depend on the file: give `loading.stored_bytes` of it.
    Raises ValueError for another `ple`, or one that only a model with per-layer embeddings has.
    """
    if ple not in WHERE or (ple != "device" and config.per_layer_embedding is None):
        wanted = "'device', 'host' or 'mapped'" if config.per_layer_embedding else "'device': it has no such embeddings"
        raise ValueError(f"ple is {ple!r}; {config.name} wants {wanted}")
    held: dict[str, Held] = {place: Held(0, 0) for place in ("device", "host", "file")}
    for path, size in _sizes(config).items():
        place = WHERE[ple] if path == PIECES else "device"
        nbytes = size * jnp.dtype(dtype).itemsize if stored is None else stored[path]
        held[place] = Held(held[place].parameters + size, held[place].nbytes + nbytes)
    return held


def effective_parameters(config: DecoderConfig) -> int:
    """The size by which Gemma 3n's models are called: E2B has 1,905,495,648, E4B 3,980,491,248.

    Counted are the decoder's parameters without its token table and per-layer embeddings, and, in each layer that
    reads another's keys, the key and value projections and key norm that checkpoints hold and nothing uses. So
    with per-layer embeddings elsewhere a device holds this, less those unused, and the token table (gemma3n.md, 1).
    """
    towers = ("vision/", "mm/", "audio/", "audio_mm/")
    sizes = {path: size for path, size in _sizes(config).items() if not path.startswith(towers)}
    return sum(sizes.values()) - sizes[TABLE] - sizes.get(PIECES, 0) + unused_parameters(config)


def unused_parameters(config: DecoderConfig) -> int:
    """Those of keys and values that checkpoints of Gemma 3n hold for layers that read another's; never loaded."""
    attention = config.attention
    norm = attention.head_dim if attention.has_qk_norm else 0
    each = 2 * config.width * attention.num_kv_heads * attention.head_dim + norm
    return each * sum(spec.kv_source is not None for spec in config.layers)


def _sizes(config: DecoderConfig) -> dict[str, int]:
    """Parameters of each weight of the model that runs, by canonical path."""
    return {entry.path: math.prod(entry.shape) for entry in export.table("orbax", config).entries}
