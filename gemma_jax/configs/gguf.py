"""A decoder's config from the metadata of a GGUF file, and back."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from gemma_jax.configs import gguf_3n
from gemma_jax.configs.config import (
    MAX_LAYERS,
    AttentionConfig,
    AttentionKind,
    ConfigError,
    DecoderConfig,
    LayerSpec,
    NormConfig,
    VisionConfig,
    check_same,
)
from gemma_jax.configs.gemma3 import PADDED_VOCAB_SIZE, PERIOD, VOCAB_SIZE
from gemma_jax.configs.gemma3n import NUM_SPARE_ROWS

ARCHITECTURES = ("gemma3", "gemma2", "gemma", "gemma-embedding", gguf_3n.FAMILY)
PROJECTOR, POOLING = "gemma3", 4  # of vision towers; patches pooled to a soft token, a side, where files do not say
POOLING_MEAN = 1  # llama.h, enum llama_pooling_type
DENSE = ("dense_2_feat_out", "dense_3_feat_out")  # of EmbeddingGemma
LOCAL_THETA = 10_000.0  # not in the files
# The largest models scale queries by width / heads, not by the head's width; files do not say it, llama.cpp knows the
# models by their number of layers.
SCALED_BY_WIDTH = {("gemma3", 62), ("gemma2", 46)}


def from_gguf(metadata: Mapping[str, Any], name: str = "gguf") -> DecoderConfig:
    """The decoder that the key/values of a GGUF file describe.

    Raises ConfigError for another architecture and for keys that are missing.
    """
    family = metadata.get("general.architecture")
    if not isinstance(family, str) or family not in ARCHITECTURES:
        raise ConfigError(f"general.architecture is {family!r}; can be read: {', '.join(ARCHITECTURES)}")

    def key(suffix: str, *default: Any, kinds: tuple[type, ...] = (int,)) -> Any:
        if f"{family}.{suffix}" not in metadata:
            if not default:
                raise ConfigError(f"the GGUF metadata has no {family}.{suffix}")
            return default[0]
        value = metadata[f"{family}.{suffix}"]
        if isinstance(value, bool) or not isinstance(value, kinds):
            wanted = "a whole number" if kinds == (int,) else "a number"
            raise ConfigError(f"{family}.{suffix} is {value!r} in the GGUF metadata; wanted {wanted}")
        return value

    base = "gemma3" if family in ("gemma-embedding", gguf_3n.FAMILY) else family
    real = functools.partial(key, kinds=(int, float))
    width, num_layers, num_heads = key("embedding_length"), key("block_count"), key("attention.head_count")
    if not 1 <= num_layers <= MAX_LAYERS or num_heads < 1:
        raise ConfigError(
            f"{family}.block_count is {num_layers} and {family}.attention.head_count {num_heads}; wanted 1 to "
            f"{MAX_LAYERS} layers with at least one head"
        )
    head_dim, turn = key("attention.key_length"), {"gemma3": PERIOD, "gemma2": 2, "gemma": 1}[base]
    theta = real("rope.freq_base", 1_000_000.0 if base == "gemma3" else LOCAL_THETA)
    is_by_width = (family, num_layers) in SCALED_BY_WIDTH
    config = DecoderConfig(
        name=name,
        vocab_size=_vocab_size(metadata, family),
        width=width,
        context=key("context_length"),
        attention=AttentionConfig(
            num_heads=num_heads,
            num_kv_heads=key("attention.head_count_kv", num_heads),
            head_dim=head_dim,
            query_pre_attn_scalar=width / num_heads if is_by_width else float(head_dim),
            local=AttentionKind(
                window=key("attention.sliding_window", 4096 if family == "gemma2" else None),
                rope_theta=real("rope.freq_base_swa", LOCAL_THETA),
            ),
            global_=AttentionKind(window=None, rope_theta=theta, rope_scale=_rope_scale(metadata, family)),
            has_qk_norm=base == "gemma3",
            softcap=real("attn_logit_softcapping", 50.0) if family == "gemma2" else None,
            is_causal=family != "gemma-embedding",
        ),
        layers=_layers(num_layers, key("feed_forward_length", kinds=(int, list, np.ndarray)), turn),
        period=turn,
        norm=NormConfig(epsilon=_short(real("attention.layer_norm_rms_epsilon")), has_post_norms=family != "gemma"),
        final_softcap=real("final_logit_softcapping", 30.0 if family == "gemma2" else None),
        vision=_vision(metadata),
        dense_widths=tuple(key(name) for name in DENSE if f"{family}.{name}" in metadata),
    )
    return gguf_3n.extended(config, key) if family == gguf_3n.FAMILY else config


_VISION = {  # ours: theirs
    "num_layers": "block_count",
    "width": "embedding_length",
    "num_heads": "attention.head_count",
    "ffw_width": "feed_forward_length",
    "patch_size": "patch_size",
    "image_size": "image_size",
}


def _vision(metadata: Mapping[str, Any]) -> VisionConfig | None:
    """The tower that a second file describes (llama.cpp's mmproj); see `gemma_checkpoints.GGUFFolderReader`."""
    if "clip.projector_type" not in metadata:
        return None
    if metadata["clip.projector_type"] != PROJECTOR:
        raise ConfigError(f"clip.projector_type is {metadata['clip.projector_type']!r}; can be read: {PROJECTOR}")
    values: dict[str, Any] = {ours: metadata.get(f"clip.vision.{theirs}") for ours, theirs in _VISION.items()}
    wrong = [f"{_VISION[key]} is {value!r}" for key, value in values.items() if type(value) is not int or value < 1]
    if wrong or values["num_layers"] > MAX_LAYERS:
        raise ConfigError(f"of the tower {', '.join(wrong) or 'block_count is too large'}; wanted whole numbers")
    scale = metadata.get("clip.vision.projector.scale_factor", POOLING)
    if type(scale) is not int or scale < 1:
        raise ConfigError(f"clip.vision.projector.scale_factor is {scale!r}; wanted a positive whole number")
    side = values["image_size"] // values["patch_size"] // scale
    return VisionConfig(**values, num_soft_tokens=side * side)


def tower_to_gguf(config: DecoderConfig) -> dict[str, Any]:
    """The keys of the second file, of a Gemma 3's vision tower; to be written beside `to_gguf`'s."""
    vision = config.vision
    assert isinstance(vision, VisionConfig)
    keys: dict[str, Any] = {f"clip.vision.{theirs}": getattr(vision, ours) for ours, theirs in _VISION.items()}
    side = vision.image_size // vision.patch_size
    keys |= {
        "general.architecture": "clip",
        "general.type": "mmproj",
        "general.name": config.name,
        "clip.has_vision_encoder": True,
        "clip.projector_type": PROJECTOR,
        "clip.use_gelu": True,
        "clip.vision.attention.layer_norm_epsilon": 1e-6,
        "clip.vision.image_mean": np.full(3, 0.5, np.float32),
        "clip.vision.image_std": np.full(3, 0.5, np.float32),
        "clip.vision.projection_dim": config.width,
        "clip.vision.projector.scale_factor": side // math.isqrt(vision.num_soft_tokens),
    }
    if _vision(keys) != vision:
        raise ConfigError(f"the tower of config {config.name!r} would be read as {_vision(keys)}")
    return keys


def _vocab_size(metadata: Mapping[str, Any], family: str) -> int:
    tokens = metadata.get("tokenizer.ggml.tokens")
    size = len(tokens) if isinstance(tokens, list) else metadata.get(f"{family}.vocab_size")
    if not isinstance(size, int):
        raise ConfigError(f"the GGUF metadata has neither tokenizer.ggml.tokens nor {family}.vocab_size")
    return VOCAB_SIZE if size in (PADDED_VOCAB_SIZE, VOCAB_SIZE + NUM_SPARE_ROWS) else size


def _rope_scale(metadata: Mapping[str, Any], family: str) -> float:
    factor = metadata.get(f"{family}.rope.scaling.factor", 1.0)
    kind = metadata.get(f"{family}.rope.scaling.type", "linear")
    if not isinstance(factor, int | float) or kind not in ("linear", "none"):
        raise ConfigError(f"{family}.rope.scaling is {kind!r} with factor {factor!r}; Gemma uses linear and none")
    return factor if kind == "linear" else 1.0


def _layers(num_layers: int, ffw_width: Any, turn: int) -> tuple[LayerSpec, ...]:
    widths = [ffw_width] * num_layers if isinstance(ffw_width, int) else np.asarray(ffw_width).tolist()
    if len(widths) != num_layers:
        raise ConfigError(f"feed_forward_length has {len(widths)} values for {num_layers} layers")
    return tuple(LayerSpec(is_local=(i + 1) % turn != 0, ffw_width=width) for i, width in enumerate(widths))


def _short(value: float) -> float:
    """A float32 written as the decimal number it was meant to be: 9.999999974752427e-07 is 1e-06."""
    return float(f"{value:.7g}")


def architecture(config: DecoderConfig) -> str:
    """The general.architecture of a decoder, one of `ARCHITECTURES`."""
    if config.altup is not None or config.per_layer_embedding is not None:
        return gguf_3n.FAMILY
    return ("gemma", "gemma2", "gemma3")[config.generation - 1] if config.attention.is_causal else "gemma-embedding"


def to_gguf(config: DecoderConfig) -> dict[str, Any]:
    """The architecture's keys of a GGUF file, as llama.cpp reads them; the vocabulary's are not among them.

    Raises ConfigError for a decoder that the format cannot describe: other bases of rope for local layers than 10,000,
    another pattern of local layers than the family's, other query scales than llama.cpp supplies.
    """
    attention = config.attention
    everywhere = attention.global_
    family = architecture(config)
    values: dict[str, Any] = {
        "context_length": config.context,
        "embedding_length": config.width,
        "block_count": config.num_layers,
        "feed_forward_length": config.layers[0].ffw_width,
        "attention.head_count": attention.num_heads,
        "attention.head_count_kv": attention.num_kv_heads,
        "attention.key_length": attention.head_dim,
        "attention.value_length": attention.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.norm.epsilon),
        "rope.freq_base": float(everywhere.rope_theta),
    }
    if attention.local.window is not None:
        values["attention.sliding_window"] = attention.local.window
    if everywhere.rope_scale != 1.0:
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(everywhere.rope_scale)}
    for key, value in (
        ("attn_logit_softcapping", attention.softcap),
        ("final_logit_softcapping", config.final_softcap),
    ):
        if value is not None:
            values[key] = float(value)
    if not attention.is_causal:
        values |= {"attention.causal": False, "pooling_type": POOLING_MEAN}
    if family == gguf_3n.FAMILY:
        values |= gguf_3n.metadata(config)
    width = config.width
    for name, out in zip(DENSE, config.dense_widths, strict=False):
        values |= {name.replace("out", "in"): width, name: out}
        width = out
    keys = {"general.architecture": family, "general.name": config.name}
    keys |= {f"{family}.{key}": value for key, value in values.items()}
    described = from_gguf({**keys, f"{family}.vocab_size": config.vocab_size}, config.name)
    check_same(dataclasses.replace(config, vision=None), described, "a GGUF file")
    return keys
