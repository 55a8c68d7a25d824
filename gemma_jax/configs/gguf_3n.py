"""What the metadata of a GGUF file of Gemma 3n has beside a Gemma 3's, and back.

Not in the files: LAuReL's rank, AltUp's clip, the rows of the per-layer table; they are those of the published models.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np

from gemma_jax.configs.config import (
    AltUpConfig,
    ConfigError,
    DecoderConfig,
    NormConfig,
    PerLayerEmbeddingConfig,
)
from gemma_jax.configs.gemma3n import VOCAB_SIZE, layer_specs
from gemma_jax.configs.huggingface_3n import pattern

FAMILY = "gemma3n"
LAUREL_RANK = 64
_NORMAL = statistics.NormalDist()


def extended(config: DecoderConfig, key: Callable[..., Any]) -> DecoderConfig:
    """A Gemma 3 decoder that was read from the common keys, made a 3n by its own; `key(suffix, default, kinds=)`."""
    count = config.num_layers
    is_local = _list(key, "attention.sliding_window_pattern", pattern(count))
    scales = [float(scale) for scale in _list(key, "activation_sparsity_scale", [-math.inf] * count)]
    if len(is_local) != count or len(scales) != count:
        raise ConfigError(f"sliding_window_pattern or activation_sparsity_scale has not {count} values, one a layer")
    shared = key("attention.shared_kv_layers", 0)
    if not 0 <= shared < count:
        raise ConfigError(f"attention.shared_kv_layers is {shared}; wanted 0 to {count - 1}")
    # the multiplier of the standard deviation is what the share of zeros is stored as
    sparsities = [round(_NORMAL.cdf(scale), 6) if math.isfinite(scale) else 0.0 for scale in scales]
    local = [bool(one) for one in is_local]
    period = next(n for n in range(1, count + 1) if all(local[i] == local[i % n] for i in range(count)))
    return dataclasses.replace(
        config,
        attention=dataclasses.replace(config.attention, query_pre_attn_scalar=1.0, has_qk_norm=True, has_v_norm=True),
        layers=layer_specs(local, [spec.ffw_width for spec in config.layers], sparsities, shared),
        period=period,
        norm=NormConfig(epsilon=config.norm.epsilon, is_zero_centred=False),
        final_softcap=key("final_logit_softcapping", 30.0, kinds=(int, float)),
        altup=AltUpConfig(num_streams=key("altup.num_inputs"), active_stream=key("altup.active_idx")),
        laurel_rank=LAUREL_RANK,
        per_layer_embedding=PerLayerEmbeddingConfig(
            num_rows=min(VOCAB_SIZE, config.vocab_size), width=key("embedding_length_per_layer_input")
        ),
    )


def _list(key: Callable[..., Any], suffix: str, default: list[Any]) -> list[Any]:
    return np.asarray(key(suffix, default, kinds=(list, np.ndarray))).tolist()


def metadata(config: DecoderConfig) -> dict[str, Any]:
    """The keys that 3n has beside the common ones, without the architecture's name in front."""
    altup, table = config.altup, config.per_layer_embedding
    shares = [spec.activation_sparsity for spec in config.layers]
    scales = [_NORMAL.inv_cdf(share) if share else -math.inf for share in shares]
    widths = [spec.ffw_width for spec in config.layers]
    return {
        "altup.active_idx": altup.active_stream if altup else 0,
        "altup.num_inputs": altup.num_streams if altup else 1,
        "embedding_length_per_layer_input": table.width if table else 0,
        "feed_forward_length": np.array(widths, np.uint32),
        "attention.shared_kv_layers": sum(spec.kv_source is not None for spec in config.layers),
        "attention.sliding_window_pattern": np.array([spec.is_local for spec in config.layers]),
        "activation_sparsity_scale": np.array(scales, np.float32),
    }
