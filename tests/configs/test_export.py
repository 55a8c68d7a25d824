"""Configs written for other libraries are read back as the same decoder, or refused by the field that would be lost."""

import pytest

from gemma_jax import configs
from gemma_jax.configs.config import ConfigError
from gemma_jax.configs.gguf import from_gguf, to_gguf
from gemma_jax.configs.huggingface import from_huggingface, to_huggingface


@pytest.mark.parametrize("name", configs.names())
def test_every_published_decoder_survives_both_formats(name):
    config = configs.get(name)
    described = config.replace_all([("dense_widths", ())])  # sentence-transformers has folders of their own for these
    assert from_huggingface(to_huggingface(config, "bfloat16"), name) == described
    config = config.replace_all([("vision", None), ("audio", None)])  # GGUF keeps towers in files of their own
    metadata = to_gguf(config)
    assert from_gguf({**metadata, f"{metadata['general.architecture']}.vocab_size": config.vocab_size}, name) == config


def test_the_270m_is_described_as_its_release_describes_it():
    """Values of google/gemma-3-270m's config.json (gemma3.md, 1.2)."""
    data = to_huggingface(configs.get("gemma-3-270m"), "bfloat16")
    wanted = {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_hidden_layers": 18,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "sliding_window": 512,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "rope_scaling": None,
        "query_pre_attn_scalar": 256,
        "vocab_size": 262_144,
        "max_position_embeddings": 32_768,
    }
    assert {key: data[key] for key in wanted} == wanted
    assert [i for i, kind in enumerate(data["layer_types"]) if kind == "full_attention"] == [5, 11, 17]


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        ("layers.1.ffw_width", 1024, r"layers.1.ffw_width is 1024; it would be read as 2048"),
        ("norm.is_zero_centred", False, "norm.is_zero_centred is False"),
        ("attention.local.rope_scale", 2.0, "attention.local.rope_scale is 2.0"),
    ],
)
def test_what_neither_format_can_say_is_refused_by_field(path, value, problem):
    config = configs.get("gemma-3-270m").replace(path, value)
    with pytest.raises(ConfigError, match=rf"config.json cannot describe config 'gemma-3-270m'(.|\n)*{problem}"):
        to_huggingface(config, "float32")
    with pytest.raises(ConfigError, match=rf"a GGUF file cannot describe(.|\n)*{problem}"):
        to_gguf(config)


def test_gguf_has_no_key_for_the_pattern_or_the_query_scale():
    config = configs.get("gemma-3-270m")
    with pytest.raises(ConfigError, match=r"layers.0.is_local is False; it would be read as True"):
        to_gguf(config.replace("layers.0.is_local", False))
    with pytest.raises(ConfigError, match=r"query_pre_attn_scalar is 128.0; it would be read as 256.0"):
        to_gguf(config.replace("attention.query_pre_attn_scalar", 128.0))
    assert to_huggingface(config.replace("layers.0.is_local", False), "float32")["layer_types"][0] == "full_attention"
