"""A decoder's config from Hugging Face's config.json, in the dialects of transformers 4 and 5, and back."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from gemma_jax.configs import huggingface_3n, sentence_transformers
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

ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "silu": "silu", "relu": "relu"}

# What files leave out: defaults of transformers' config classes (gemma3.md, 1.3).
_COMMON = {"head_dim": 256, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "query_pre_attn_scalar": 256}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma3_text": {
        **_COMMON,
        "vocab_size": PADDED_VOCAB_SIZE,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131_072,
        "sliding_window": 4096,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
    },
    "gemma3n_text": {**huggingface_3n.DEFAULTS},
    "gemma2": {
        **_COMMON,
        "vocab_size": 256_000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 8192,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma": {
        **_COMMON,
        "vocab_size": 256_000,
        "hidden_size": 3072,
        "intermediate_size": 24_576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "max_position_embeddings": 8192,
    },
}

_SIZES = [key for key, value in _DEFAULTS["gemma"].items() if isinstance(value, int) and key != "query_pre_attn_scalar"]


def from_huggingface(data: Mapping[str, Any], name: str = "huggingface") -> DecoderConfig:
    """The model that a parsed config.json describes: its decoder, and its towers if the file has parts for them.

    Raises ConfigError for another model_type, or settings that this decoder does not have.
    """
    family = data.get("model_type")
    family = "gemma3" if family == "shieldgemma2" else family  # the same graph around it
    towers: dict[str, Any] = {}
    if family in ("gemma3", "gemma3n"):
        text = _object(data, "text_config")
        if family == "gemma3":
            towers = {"vision": _vision(data)}
        else:
            towers = huggingface_3n.towers(data, _object(data, "vision_config"), _object(data, "audio_config"))
        is_tied = data.get("tie_word_embeddings", True) and text.get("tie_word_embeddings", True)
        data, family = {**data, **text, "tie_word_embeddings": is_tied}, f"{family}_text"
    if not isinstance(family, str) or family not in _DEFAULTS:
        raise ConfigError(
            f"model_type is {family!r}; can be read: gemma3, gemma3n, shieldgemma2, {', '.join(_DEFAULTS)}"
        )
    values = {**_DEFAULTS[family], **data}
    _check_sizes(values, family)
    is_local = _pattern(values, family)
    if family == "gemma3n_text":
        config = huggingface_3n.from_text(values, name, is_local, _ropes(values, family))
    else:
        config = _decoder(values, family, name, is_local)
    return dataclasses.replace(config, **towers) if towers else config


def _check_sizes(values: Mapping[str, Any], family: str) -> None:
    if values.get("attention_bias"):
        raise ConfigError("attention_bias is true; Gemma's decoders have no biases")
    sizes = [key for key in _SIZES if key != "intermediate_size" or family != "gemma3n_text"]
    wrong = [f"{key} is {values[key]!r}" for key in sizes if type(values[key]) is not int or values[key] < 1]
    if wrong:
        raise ConfigError(f"{', '.join(wrong)}; wanted positive whole numbers")
    if values["num_hidden_layers"] > MAX_LAYERS:
        raise ConfigError(f"num_hidden_layers is {values['num_hidden_layers']}; wanted at most {MAX_LAYERS}")
    if not isinstance(is_tied := values.get("tie_word_embeddings", True), bool):
        raise ConfigError(f"tie_word_embeddings is {is_tied!r}; wanted true or false")


def _decoder(values: Mapping[str, Any], family: str, name: str, is_local: list[bool]) -> DecoderConfig:
    vocab_size = VOCAB_SIZE if values["vocab_size"] == PADDED_VOCAB_SIZE else values["vocab_size"]
    return DecoderConfig(
        name=name,
        vocab_size=vocab_size,
        width=values["hidden_size"],
        context=values["max_position_embeddings"],
        attention=_attention(values, family),
        layers=tuple(LayerSpec(is_local=local, ffw_width=values["intermediate_size"]) for local in is_local),
        period=_period(is_local),
        norm=NormConfig(epsilon=values["rms_norm_eps"], has_post_norms=family != "gemma"),
        activation=_activation(values, family),
        has_tied_head=values.get("tie_word_embeddings", True),
        final_softcap=values.get("final_logit_softcapping"),
        dense_widths=sentence_transformers.dense_widths(values),
    )


_VISION = {  # ours: (theirs, the default of transformers' SiglipVisionConfig)
    "num_layers": ("num_hidden_layers", 12),
    "width": ("hidden_size", 768),
    "num_heads": ("num_attention_heads", 12),
    "ffw_width": ("intermediate_size", 3072),
    "patch_size": ("patch_size", 16),
    "image_size": ("image_size", 224),
}


_IMAGE_TOKENS = (  # ours, theirs (with _index or _id behind), default
    ("soft_token", "image_token", 262_144),
    ("begin_token", "boi_token", 255_999),
    ("end_token", "eoi_token", 256_000),
)


def _vision(data: Mapping[str, Any]) -> VisionConfig | None:
    values = _object(data, "vision_config")
    if not values:
        return None
    found = {ours: values.get(theirs, default) for ours, (theirs, default) in _VISION.items()}
    found["num_soft_tokens"] = data.get("mm_tokens_per_image", 256)
    for name, theirs, default in _IMAGE_TOKENS:
        found[name] = data.get(f"{theirs}_index", data.get(f"{theirs}_id", default))
    wrong = [f"{key} is {value!r}" for key, value in found.items() if type(value) is not int or value < 1]
    if wrong:
        raise ConfigError(f"of the vision tower {', '.join(wrong)}; wanted positive whole numbers")
    if found["num_layers"] > MAX_LAYERS:
        raise ConfigError(f"the vision tower has {found['num_layers']} layers; wanted at most {MAX_LAYERS}")
    return VisionConfig(**found)


def _activation(values: Mapping[str, Any], family: str) -> str:
    name = values.get("hidden_activation")
    if family == "gemma":
        # Gemma 1's files say "gelu" in the older key and mean the tanh form, which the newer key names
        old = values.get("hidden_act")
        name = name or (None if old == "gelu" else old)
    name = name or "gelu_pytorch_tanh"
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ConfigError(f"hidden_activation is {name!r}; can be read: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _pattern(values: Mapping[str, Any], family: str) -> list[bool]:
    """For each layer whether it is local."""
    count = values["num_hidden_layers"]
    if family == "gemma":
        return [False] * count
    kinds = values.get("layer_types")
    if kinds is None:
        turn = values.get("sliding_window_pattern") or values.get("_sliding_window_pattern")
        turn = turn or {"gemma3_text": PERIOD, "gemma3n_text": huggingface_3n.PERIOD}.get(family, 2)
        if type(turn) is not int or turn < 1:
            raise ConfigError(f"sliding_window_pattern is {turn!r}; wanted a positive whole number")
        return [(i + 1) % turn != 0 for i in range(count)]
    is_known = isinstance(kinds, list) and all(kind in ("sliding_attention", "full_attention") for kind in kinds)
    if not is_known or len(kinds) != count:
        raise ConfigError(f"layer_types is {kinds!r}; wanted sliding_attention or full_attention for {count} layers")
    return [kind == "sliding_attention" for kind in kinds]


def _period(is_local: list[bool]) -> int:
    """The shortest turn that repeats through all layers."""
    count = len(is_local)
    return next(n for n in range(1, count + 1) if all(is_local[i] == is_local[i % n] for i in range(count)))


def _attention(values: Mapping[str, Any], family: str) -> AttentionConfig:
    (local_theta, local_scale), (global_theta, global_scale) = _ropes(values, family)
    return AttentionConfig(
        num_heads=values["num_attention_heads"],
        num_kv_heads=values["num_key_value_heads"],
        head_dim=values["head_dim"],
        query_pre_attn_scalar=values["head_dim"] if family == "gemma" else values["query_pre_attn_scalar"],
        local=AttentionKind(window=values.get("sliding_window"), rope_theta=local_theta, rope_scale=local_scale),
        global_=AttentionKind(window=None, rope_theta=global_theta, rope_scale=global_scale),
        has_qk_norm=family == "gemma3_text",
        softcap=values.get("attn_logit_softcapping"),
        is_causal=not values.get("use_bidirectional_attention"),
    )


def _ropes(values: Mapping[str, Any], family: str) -> list[tuple[float, float]]:
    """Base and scale of the local layers, and of the global ones."""
    local_base = values.get("rope_local_base_freq", values["rope_theta"])
    old, ropes = _object(values, "rope_scaling"), _object(values, "rope_parameters")
    flat = {} if {"full_attention", "sliding_attention"} & set(ropes) else ropes
    # Gemma 3 scales its global layers only (gemma3.md, 1.3)
    is_third = family in ("gemma3_text", "gemma3n_text")
    local_rope = _object(ropes, "sliding_attention") or ({} if is_third else flat or old)
    return [
        _rope(local_rope, local_base),
        _rope(_object(ropes, "full_attention") or flat or old, values["rope_theta"]),
    ]


def _object(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The object at a key; empty where there is none."""
    found = values.get(key)
    if found is not None and not isinstance(found, Mapping):
        raise ConfigError(f"{key} is {found!r}; wanted an object")
    return found or {}


def _rope(rope: Mapping[str, Any], theta: float) -> tuple[float, float]:
    """Base and divisor of positions."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear"):
        raise ConfigError(f"rope_type is {kind!r}; Gemma uses default and linear")
    return rope.get("rope_theta", theta), rope.get("factor", 1.0) if kind == "linear" else 1.0


_NAMES = {"gemma3_text": "Gemma3ForCausalLM", "gemma2": "Gemma2ForCausalLM", "gemma": "GemmaForCausalLM"}
_END_OF_TURN = {"gemma3_text": 106, "gemma2": 107, "gemma": 107}


def to_huggingface(config: DecoderConfig, dtype: str) -> dict[str, Any]:
    """The config.json of a text decoder, in the dialect of the releases, which transformers 4 and 5 read.

    `dtype` is that of the weights. Raises ConfigError for a decoder that the format cannot describe.
    """
    if config.altup is not None or config.per_layer_embedding is not None:
        data = huggingface_3n.to_text(config, dtype)
        data = huggingface_3n.to_multimodal(data, config) if config.vision or config.audio else data
    else:
        data = _to_text(config, dtype)
        if isinstance(config.vision, VisionConfig):
            data = _multimodal(data, config.vision, dtype)
    modules = sentence_transformers.to_modules(config)
    described = from_huggingface({**data, sentence_transformers.KEY: modules}, config.name)
    check_same(config, described, "config.json")
    return data


def _to_text(config: DecoderConfig, dtype: str) -> dict[str, Any]:
    attention = config.attention
    local, everywhere = attention.local, attention.global_
    family = ("gemma", "gemma2", "gemma3_text")[config.generation - 1]
    data: dict[str, Any] = {
        "architectures": ["Gemma3TextModel" if config.dense_widths else _NAMES[family]],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 2,
        "eos_token_id": [1, _END_OF_TURN[family]],
        "head_dim": attention.head_dim,
        "hidden_activation": {ours: theirs for theirs, ours in ACTIVATIONS.items()}[config.activation],
        "hidden_size": config.width,
        "initializer_range": 0.02,
        "intermediate_size": config.layers[0].ffw_width,
        "max_position_embeddings": config.context,
        "model_type": family,
        "num_attention_heads": attention.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": attention.num_kv_heads,
        "pad_token_id": 0,
        "rms_norm_eps": config.norm.epsilon,
        "rope_theta": everywhere.rope_theta,
        "tie_word_embeddings": config.has_tied_head,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }
    if family != "gemma":
        data |= {
            "attn_logit_softcapping": attention.softcap,
            "final_logit_softcapping": config.final_softcap,
            "layer_types": ["sliding_attention" if spec.is_local else "full_attention" for spec in config.layers],
            "query_pre_attn_scalar": int(scalar) if (scalar := attention.query_pre_attn_scalar) % 1 == 0 else scalar,
            "sliding_window": local.window,
        }
    if family == "gemma3_text":
        scale = everywhere.rope_scale
        data["rope_local_base_freq"] = local.rope_theta
        data["rope_scaling"] = None if scale == 1.0 else {"factor": scale, "rope_type": "linear"}
        data["use_bidirectional_attention"] = not attention.is_causal
    return data


def _multimodal(text: dict[str, Any], vision: VisionConfig, dtype: str) -> dict[str, Any]:
    """The config.json of a Gemma 3 with its vision tower, around that of its text part."""
    tower = {theirs: getattr(vision, ours) for ours, (theirs, _) in _VISION.items()}
    tower |= {
        "model_type": "siglip_vision_model",
        "vision_use_head": False,
        "layer_norm_eps": 1e-6,
        "torch_dtype": dtype,
    }
    outer = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "torch_dtype", "tie_word_embeddings")
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": {key: value for key, value in text.items() if key != "architectures"},
        "vision_config": tower,
        "mm_tokens_per_image": vision.num_soft_tokens,
        **{f"{theirs}_index": getattr(vision, ours) for ours, theirs, _ in _IMAGE_TOKENS},
        **{key: text[key] for key in outer},
    }
