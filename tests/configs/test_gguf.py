import dataclasses
from typing import Any

import numpy as np
import pytest

from gemma_jax import configs
from gemma_jax.configs.config import ConfigError
from gemma_jax.configs.gguf import from_gguf

FLOAT32_EPSILON = float(np.float32(1e-6))  # what a file holds: 9.999999974752427e-07


def gemma3_metadata(name: str) -> dict[str, Any]:
    """The keys of weight_names.md, section 7, with the values of gemma3.md, 1.1."""
    layers, width, heads, kv_heads, head_dim, ffw_width, window, context = {
        "gemma-3-270m": (18, 640, 4, 1, 256, 2048, 512, 32_768),
        "gemma-3-1b": (26, 1152, 4, 1, 256, 6912, 512, 32_768),
        "gemma-3-4b": (34, 2560, 8, 4, 256, 10_240, 1024, 131_072),
        "gemma-3-12b": (48, 3840, 16, 8, 256, 15_360, 1024, 131_072),
        "gemma-3-27b": (62, 5376, 32, 16, 128, 21_504, 1024, 131_072),
    }[name]
    scaling = {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0}
    return {
        "general.architecture": "gemma3",
        "gemma3.block_count": layers,
        "gemma3.embedding_length": width,
        "gemma3.attention.head_count": heads,
        "gemma3.attention.head_count_kv": kv_heads,
        "gemma3.attention.key_length": head_dim,
        "gemma3.feed_forward_length": ffw_width,
        "gemma3.attention.sliding_window": window,
        "gemma3.attention.layer_norm_rms_epsilon": FLOAT32_EPSILON,
        "gemma3.context_length": context,
        "gemma3.rope.freq_base": 1e6,
        "gemma3.vocab_size": 262_144,
        **(scaling if width > 2000 else {}),
    }


def gemma2_metadata(layers: int, width: int, heads: int, kv_heads: int, head_dim: int, ffw_width: int):
    return {
        "general.architecture": "gemma2",
        "gemma2.block_count": layers,
        "gemma2.embedding_length": width,
        "gemma2.attention.head_count": heads,
        "gemma2.attention.head_count_kv": kv_heads,
        "gemma2.attention.key_length": head_dim,
        "gemma2.feed_forward_length": ffw_width,
        "gemma2.attention.sliding_window": 4096,
        "gemma2.attention.layer_norm_rms_epsilon": FLOAT32_EPSILON,
        "gemma2.context_length": 8192,
        "gemma2.attn_logit_softcapping": 50.0,
        "gemma2.final_logit_softcapping": 30.0,
        "gemma2.vocab_size": 256_000,
    }


@pytest.mark.parametrize("name", [name for name in configs.names() if name.startswith("gemma-3-")])
def test_metadata_of_gemma_3_give_the_registered_model(name):
    """Also what files do not say: the local base, the pattern and the query scale of the 27B."""
    want = dataclasses.replace(configs.get(name), vision=None)
    assert from_gguf(gemma3_metadata(name), name=name) == want


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("gemma-2-2b", (26, 2304, 8, 4, 256, 9216)),
        ("gemma-2-9b", (42, 3584, 16, 8, 256, 14_336)),
        ("gemma-2-27b", (46, 4608, 32, 16, 128, 36_864)),
    ],
)
def test_metadata_of_gemma_2_give_the_registered_model(name, sizes):
    assert from_gguf(gemma2_metadata(*sizes), name=name) == configs.get(name)


def test_metadata_of_gemma_1_give_the_registered_model():
    metadata = {
        "general.architecture": "gemma",
        "gemma.block_count": 18,
        "gemma.embedding_length": 2048,
        "gemma.attention.head_count": 8,
        "gemma.attention.head_count_kv": 1,
        "gemma.attention.key_length": 256,
        "gemma.feed_forward_length": 16_384,
        "gemma.attention.layer_norm_rms_epsilon": FLOAT32_EPSILON,
        "gemma.context_length": 8192,
        "tokenizer.ggml.tokens": ["piece"] * 256_000,
    }
    assert from_gguf(metadata, name="gemma-2b") == configs.get("gemma-2b")


@pytest.mark.parametrize(
    "key",
    [
        "block_count",
        "embedding_length",
        "attention.head_count",
        "attention.key_length",
        "feed_forward_length",
        "attention.layer_norm_rms_epsilon",
        "context_length",
    ],
)
def test_a_missing_key_is_named(key):
    metadata = gemma3_metadata("gemma-3-270m")
    del metadata[f"gemma3.{key}"]
    with pytest.raises(ConfigError, match=rf"has no gemma3\.{key}"):
        from_gguf(metadata)


def test_a_missing_window_is_refused_for_gemma_3():
    metadata = gemma3_metadata("gemma-3-270m")
    del metadata["gemma3.attention.sliding_window"]
    with pytest.raises(ConfigError, match=r"attention.local.window is None"):
        from_gguf(metadata)


def test_the_vocabulary_counts_the_tokens_and_needs_no_other_key():
    metadata = gemma3_metadata("gemma-3-270m")
    del metadata["gemma3.vocab_size"]
    with pytest.raises(ConfigError, match=r"neither tokenizer.ggml.tokens nor gemma3.vocab_size"):
        from_gguf(metadata)
    assert from_gguf({**metadata, "tokenizer.ggml.tokens": ["x"] * 77}).vocab_size == 77
    assert from_gguf({**metadata, "gemma3.vocab_size": 262_208}).vocab_size == 262_144  # 64 rows are padding


@pytest.mark.parametrize("family", ["t5", "llama", None, 3])
def test_another_architecture_is_refused_and_named(family):
    with pytest.raises(ConfigError, match=rf"general.architecture is {family!r}; can be read: gemma3, gemma2, gemma"):
        from_gguf({"general.architecture": family})


@pytest.mark.parametrize("value", ["18", True])
def test_a_value_that_is_no_number_is_named(value):
    with pytest.raises(ConfigError, match=rf"gemma3.block_count is {value!r} in the GGUF metadata; wanted a whole"):
        from_gguf({**gemma3_metadata("gemma-3-270m"), "gemma3.block_count": value})


def test_each_layer_may_have_its_own_ffw_width():
    metadata = {**gemma3_metadata("gemma-3-270m"), "gemma3.feed_forward_length": np.arange(1, 19, dtype=np.int32) * 64}
    config = from_gguf(metadata)
    assert [spec.ffw_width for spec in config.layers] == [64 * i for i in range(1, 19)]
    assert all(type(spec.ffw_width) is int for spec in config.layers)  # numpy's would not be hashable as JSON
    metadata["gemma3.feed_forward_length"] = np.full(17, 64)
    with pytest.raises(ConfigError, match=r"feed_forward_length has 17 values for 18 layers"):
        from_gguf(metadata)


def test_other_position_scalings_than_linear_are_refused():
    metadata = gemma3_metadata("gemma-3-4b")
    with pytest.raises(ConfigError, match=r"gemma3.rope.scaling is 'yarn'"):
        from_gguf({**metadata, "gemma3.rope.scaling.type": "yarn"})
    unscaled = from_gguf({**metadata, "gemma3.rope.scaling.type": "none"})
    assert unscaled.attention.global_.rope_scale == 1.0


@pytest.mark.slow
def test_the_demo_file_gives_the_registered_270m():
    import gemma_checkpoints
    from gemma_jax.loading import find

    with gemma_checkpoints.open(find("gemma-3-270m")) as reader:
        assert from_gguf(reader.metadata, name="gemma-3-270m") == configs.get("gemma-3-270m")


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("block_count", 10**15, r"block_count is 1000000000000000 .*wanted 1 to 1024"),
        ("block_count", 3.0, r"block_count is 3.0 in the GGUF metadata; wanted a whole number"),
        ("block_count", -1, r"block_count is -1"),
        ("attention.head_count", 0, r"attention.head_count 0; wanted"),
        ("feed_forward_length", 32.0, r"feed_forward_length is 32.0"),
        ("feed_forward_length", ["a"], r"feed_forward_length has 1 values for 18 layers"),
        ("feed_forward_length", ["a"] * 18, r"layers.0.ffw_width is 'a'"),
        ("attention.layer_norm_rms_epsilon", [1], r"rms_epsilon is \[1\] in the GGUF metadata; wanted a number"),
        ("rope.scaling.factor", "8", r"rope.scaling is 'linear' with factor '8'"),
    ],
)
def test_values_of_the_wrong_kind_or_size_are_refused_by_name(key, value, problem):
    with pytest.raises(ConfigError, match=problem):
        from_gguf({**gemma3_metadata("gemma-3-270m"), f"gemma3.{key}": value})


def test_an_architecture_or_vocabulary_of_the_wrong_kind_is_refused():
    metadata = gemma3_metadata("gemma-3-270m")
    with pytest.raises(ConfigError, match=r"general.architecture is array"):
        from_gguf({**metadata, "general.architecture": np.array([1, 2])})
    for key in ("tokenizer.ggml.tokens", "gemma3.vocab_size"):
        metadata.pop(key, None)
    with pytest.raises(ConfigError, match="has neither"):
        from_gguf({**metadata, "tokenizer.ggml.tokens": 5})
