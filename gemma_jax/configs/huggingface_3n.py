"""Gemma 3n's config from Hugging Face's config.json (model types gemma3n and gemma3n_text), and back."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from gemma_jax.configs.config import (
    MAX_LAYERS,
    AltUpConfig,
    AttentionConfig,
    AttentionKind,
    ConfigError,
    DecoderConfig,
    NormConfig,
    PerLayerEmbeddingConfig,
)
from gemma_jax.configs.gemma3n import (
    NUM_SPARE_ROWS,
    NUM_SPARSE,
    PERIOD,
    SPARSITY,
    VOCAB_SIZE,
    layer_specs,
)
from gemma_jax.configs.towers import MOBILENET_V5_300M, AudioConfig, MobileNetConfig

# What files leave out: defaults of transformers' Gemma3nTextConfig.
DEFAULTS: Mapping[str, Any] = {
    "vocab_size": VOCAB_SIZE + NUM_SPARE_ROWS,
    "hidden_size": 2048,
    "intermediate_size": 16_384,
    "num_hidden_layers": 35,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "sliding_window": 512,
    "final_logit_softcapping": 30.0,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "hidden_size_per_layer_input": 256,
    "altup_active_idx": 0,
    "altup_coef_clip": 120.0,
    "altup_correct_scale": True,
    "altup_num_inputs": 4,
    "num_kv_shared_layers": 15,
    "laurel_rank": 64,
}
_AUDIO = {  # ours: theirs
    "num_layers": "conf_num_hidden_layers",
    "width": "hidden_size",
    "num_heads": "conf_num_attention_heads",
    "channels": "sscp_conv_channel_size",
    "num_bins": "input_feat_size",
    "kernel": "conf_conv_kernel_size",
    "past": "conf_attention_context_left",
    "chunk": "conf_attention_chunk_size",
    "softcap": "conf_attention_logit_cap",
    "reduction": "conf_reduction_factor",
    "residual_weight": "conf_residual_weight",
    "group_norm_epsilon": "sscp_conv_group_norm_eps",
    "num_hard_tokens": "vocab_size",
    "first_token": "vocab_offset",
}
# ours: theirs, at the top of the file
_IMAGE_TOKENS = {"begin_token": "boi_token_id", "end_token": "eoi_token_id", "soft_token": "image_token_id"}
_AUDIO_TOKENS = {"begin_token": "boa_token_id", "end_token": "eoa_token_id", "soft_token": "audio_token_id"}
ARCHITECTURE = "mobilenetv5_300m_enc"


def from_text(
    data: Mapping[str, Any], name: str, is_local: list[bool], ropes: list[tuple[float, float]]
) -> DecoderConfig:
    """The decoder of a text config with `DEFAULTS` filled in; `ropes` are base and scale of local and global layers.

    Raises ConfigError for settings that are impossible.
    """
    count = data["num_hidden_layers"]
    if data.get("attention_bias"):
        raise ConfigError("attention_bias is true; Gemma's decoders have no biases")
    if data.get("hidden_activation", "gelu_pytorch_tanh") != "gelu_pytorch_tanh":
        raise ConfigError(f"hidden_activation is {data['hidden_activation']!r}; Gemma 3n has gelu_pytorch_tanh")
    shared = data["num_kv_shared_layers"]
    if type(shared) is not int or not 0 <= shared < count:
        raise ConfigError(f"num_kv_shared_layers is {shared!r}; wanted 0 to {count - 1}")
    has_spare = data["vocab_size"] == VOCAB_SIZE + NUM_SPARE_ROWS
    sparsity = data.get("activation_sparsity_pattern")
    if sparsity is None:
        sparsity = [SPARSITY if i < NUM_SPARSE < count else 0.0 for i in range(count)]
    (local_theta, local_scale), (theta, scale) = ropes
    return DecoderConfig(
        name=name,
        vocab_size=VOCAB_SIZE if has_spare else data["vocab_size"],
        width=data["hidden_size"],
        context=data["max_position_embeddings"],
        attention=AttentionConfig(
            num_heads=data["num_attention_heads"],
            num_kv_heads=data["num_key_value_heads"],
            head_dim=data["head_dim"],
            query_pre_attn_scalar=1.0,
            local=AttentionKind(window=data["sliding_window"], rope_theta=local_theta, rope_scale=local_scale),
            global_=AttentionKind(window=None, rope_theta=theta, rope_scale=scale),
            has_v_norm=True,
        ),
        layers=layer_specs(
            is_local,
            _each(data["intermediate_size"], count, "intermediate_size", (int,)),
            _each(sparsity, count, "activation_sparsity_pattern", (int, float)),
            shared,
        ),
        period=next(n for n in range(1, count + 1) if all(is_local[i] == is_local[i % n] for i in range(count))),
        norm=NormConfig(epsilon=data["rms_norm_eps"], is_zero_centred=False),
        has_tied_head=data.get("tie_word_embeddings", True),
        final_softcap=data["final_logit_softcapping"],
        altup=AltUpConfig(
            num_streams=data["altup_num_inputs"],
            active_stream=data["altup_active_idx"],
            coefficient_clip=data["altup_coef_clip"],
            has_corrected_scale=data["altup_correct_scale"],
        ),
        laurel_rank=data["laurel_rank"],
        per_layer_embedding=PerLayerEmbeddingConfig(
            num_rows=data["vocab_size_per_layer_input"], width=data["hidden_size_per_layer_input"]
        ),
    )


def pattern(count: int) -> list[bool]:
    """Which layers are local where a file does not say."""
    return [(i + 1) % PERIOD != 0 for i in range(count)]


def _each(value: Any, count: int, key: str, kinds: tuple[type, ...]) -> list[Any]:
    """A value for each layer."""
    values = value if isinstance(value, list) else [value] * count
    if len(values) != count or not all(isinstance(one, kinds) and not isinstance(one, bool) for one in values):
        raise ConfigError(f"{key} is {value!r}; wanted a number, or one for each of {count} layers")
    return values


def towers(data: Mapping[str, Any], vision: Mapping[str, Any], audio: Mapping[str, Any]) -> dict[str, Any]:
    """The towers of a whole config, as fields of a DecoderConfig; none where the file has no part for them."""
    found: dict[str, Any] = {}
    if vision:
        if (architecture := vision.get("architecture", ARCHITECTURE)) != ARCHITECTURE:
            raise ConfigError(f"vision_config.architecture is {architecture!r}; Gemma 3n has {ARCHITECTURE}")
        found["vision"] = dataclasses.replace(
            MOBILENET_V5_300M,
            width=vision.get("hidden_size", MOBILENET_V5_300M.width),
            num_soft_tokens=data.get("vision_soft_tokens_per_image", MOBILENET_V5_300M.num_soft_tokens),
            num_hard_tokens=vision.get("vocab_size", MOBILENET_V5_300M.num_hard_tokens),
            first_token=vision.get("vocab_offset", MOBILENET_V5_300M.first_token),
            **{ours: data[theirs] for ours, theirs in _IMAGE_TOKENS.items() if theirs in data},
        )
    if audio:
        values = {ours: audio[theirs] for ours, theirs in _AUDIO.items() if theirs in audio}
        values |= {ours: data[theirs] for ours, theirs in _AUDIO_TOKENS.items() if theirs in data}
        if not isinstance(values.setdefault("channels", [128, 32]), list):
            raise ConfigError(f"sscp_conv_channel_size is {values['channels']!r}; wanted two numbers")
        values["channels"] = tuple(values["channels"])
        values["num_soft_tokens"] = data.get("audio_soft_tokens_per_image", AudioConfig.num_soft_tokens)
        if type(values.get("num_layers", 1)) is not int or values.get("num_layers", 1) > MAX_LAYERS:
            raise ConfigError(f"conf_num_hidden_layers is {values['num_layers']!r}; wanted at most {MAX_LAYERS}")
        found["audio"] = AudioConfig(**values)
    return found


def to_text(config: DecoderConfig, dtype: str) -> dict[str, Any]:
    """The text config of a decoder; what it cannot say shows when it is read back."""
    attention, altup, table = config.attention, config.altup, config.per_layer_embedding
    shared = sum(spec.kv_source is not None for spec in config.layers)
    return {
        "architectures": ["Gemma3nForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "activation_sparsity_pattern": [spec.activation_sparsity for spec in config.layers],
        "altup_active_idx": altup.active_stream if altup else 0,
        "altup_coef_clip": altup.coefficient_clip if altup else None,
        "altup_correct_scale": bool(altup and altup.has_corrected_scale),
        "altup_num_inputs": altup.num_streams if altup else 1,
        "bos_token_id": 2,
        "eos_token_id": [1, 106],
        "final_logit_softcapping": config.final_softcap,
        "head_dim": attention.head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": config.width,
        "hidden_size_per_layer_input": table.width if table else 0,
        "initializer_range": 0.02,
        "intermediate_size": [spec.ffw_width for spec in config.layers],
        "laurel_rank": config.laurel_rank,
        "layer_types": ["sliding_attention" if spec.is_local else "full_attention" for spec in config.layers],
        "max_position_embeddings": config.context,
        "model_type": "gemma3n_text",
        "num_attention_heads": attention.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": attention.num_kv_heads,
        "num_kv_shared_layers": shared,
        "pad_token_id": 0,
        "rms_norm_eps": config.norm.epsilon,
        "rope_local_base_freq": attention.local.rope_theta,
        "rope_scaling": None,
        "rope_theta": attention.global_.rope_theta,
        "sliding_window": attention.local.window,
        "tie_word_embeddings": config.has_tied_head,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": config.vocab_size + (NUM_SPARE_ROWS if config.vocab_size == VOCAB_SIZE else 0),
        "vocab_size_per_layer_input": table.num_rows if table else 0,
    }


def to_multimodal(text: Mapping[str, Any], config: DecoderConfig) -> dict[str, Any]:
    """The whole config.json around that of the text part."""
    data: dict[str, Any] = {
        "architectures": ["Gemma3nForConditionalGeneration"],
        "model_type": "gemma3n",
        "text_config": {key: value for key, value in text.items() if key != "architectures"},
        **{key: text[key] for key in ("eos_token_id", "initializer_range", "torch_dtype", "tie_word_embeddings")},
    }
    for names, part in ((_IMAGE_TOKENS, config.vision or MOBILENET_V5_300M), (_AUDIO_TOKENS, config.audio)):
        data |= {theirs: getattr(part or AudioConfig(), ours) for ours, theirs in names.items()}
    vision, audio = config.vision, config.audio
    if isinstance(vision, MobileNetConfig):
        data["vision_soft_tokens_per_image"] = vision.num_soft_tokens
        data["vision_config"] = {
            "architecture": ARCHITECTURE,
            "do_pooling": False,
            "hidden_size": vision.width,
            "model_type": "gemma3n_vision",
            "rms_norm_eps": 1e-6,
            "vocab_offset": vision.first_token,
            "vocab_size": vision.num_hard_tokens,
        }
    if audio is not None:
        values = {theirs: getattr(audio, ours) for ours, theirs in _AUDIO.items()}
        values |= {"model_type": "gemma3n_audio", "conf_attention_context_right": 0}
        data["audio_config"] = {**values, "rms_norm_eps": 1e-6, "sscp_conv_channel_size": list(audio.channels)}
        data["audio_soft_tokens_per_image"] = audio.num_soft_tokens
    return data
