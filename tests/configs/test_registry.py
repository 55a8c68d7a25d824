import dataclasses
import math

import pytest

from gemma_jax import configs, hub
from gemma_jax.configs.config import ConfigError

# gemma3.md, 1.1: L, D, N, K, H, F, W, global layers, rope scale, query_pre_attn_scalar, context, vision
GEMMA3 = {
    "gemma-3-270m": (18, 640, 4, 1, 256, 2048, 512, (5, 11, 17), 1, 256, 32_768, False),
    "gemma-3-1b": (26, 1152, 4, 1, 256, 6912, 512, (5, 11, 17, 23), 1, 256, 32_768, False),
    "gemma-3-4b": (34, 2560, 8, 4, 256, 10_240, 1024, (5, 11, 17, 23, 29), 8, 256, 131_072, True),
    "gemma-3-12b": (48, 3840, 16, 8, 256, 15_360, 1024, tuple(range(5, 48, 6)), 8, 256, 131_072, True),
    "gemma-3-27b": (62, 5376, 32, 16, 128, 21_504, 1024, tuple(range(5, 60, 6)), 8, 168, 131_072, True),
}
# arXiv:2403.08295, table 1, and arXiv:2408.00118, table 1: L, D, N, K, H, F (there the sum of gate and up); the query
# scalar of the 27B is its width over its heads (arXiv:2408.00118, sec. 2, and Hugging Face's config.json)
EARLIER = {
    "gemma-2b": (18, 2048, 8, 1, 256, 32_768, 256),
    "gemma-7b": (28, 3072, 16, 16, 256, 49_152, 256),
    "gemma-2-2b": (26, 2304, 8, 4, 256, 18_432, 256),
    "gemma-2-9b": (42, 3584, 16, 8, 256, 28_672, 256),
    "gemma-2-27b": (46, 4608, 32, 16, 128, 73_728, 144),
}


DERIVED = {  # gemma3.md, 1.3
    "functiongemma-270m": "gemma-3-270m",
    "shieldgemma-2-4b": "gemma-3-4b",
    "medgemma-4b": "gemma-3-4b",
    "medgemma-1.5-4b": "gemma-3-4b",
    "medgemma-27b": "gemma-3-27b",
    "medgemma-27b-text": "gemma-3-27b",
    "translategemma-4b": "gemma-3-4b",
    "translategemma-12b": "gemma-3-12b",
    "translategemma-27b": "gemma-3-27b",
}
GEMMA3N = ("gemma-3n-e2b", "gemma-3n-e4b")  # tests/test_conversion_3n.py


def sizes(config):
    """L, D, N, K, H and F, which must be one for all layers."""
    (ffw_width,) = {spec.ffw_width for spec in config.layers}
    attention = config.attention
    return (
        config.num_layers,
        config.width,
        attention.num_heads,
        attention.num_kv_heads,
        attention.head_dim,
        ffw_width,
    )


def test_all_published_sizes_are_registered():
    assert set(configs.names()) == {*GEMMA3, *EARLIER, *GEMMA3N, *DERIVED, "embeddinggemma-300m"}


@pytest.mark.parametrize("name", GEMMA3)
def test_gemma_3_has_the_numbers_of_the_specification(name):
    config = configs.get(name)
    *shape, window, global_layers, rope_scale, query_scalar, context, has_vision = GEMMA3[name]
    attention = config.attention
    assert sizes(config) == tuple(shape)
    assert attention.local.window == window
    assert tuple(i for i, spec in enumerate(config.layers) if not spec.is_local) == global_layers
    assert (attention.local.rope_theta, attention.local.rope_scale) == (1e4, 1)
    assert (attention.global_.rope_theta, attention.global_.rope_scale) == (1e6, rope_scale)
    assert attention.query_pre_attn_scalar == query_scalar
    assert config.context == context
    assert (config.vision is not None) == has_vision


@pytest.mark.parametrize("name", GEMMA3)
def test_what_all_of_gemma_3_share(name):
    config = configs.get(name)
    assert (config.name, config.vocab_size, config.period) == (name, 262_144, 6)
    assert (config.activation, config.final_softcap, config.attention.softcap) == ("gelu_tanh", None, None)
    assert config.norm.epsilon == 1e-6
    assert config.norm.is_zero_centred
    assert config.norm.has_post_norms
    assert config.attention.has_qk_norm
    assert not config.attention.has_v_norm
    assert config.attention.is_causal
    assert config.has_tied_head
    assert config.has_embedding_scale


@pytest.mark.parametrize(("name", "base"), DERIVED.items())
def test_derived_models_have_the_architecture_of_their_base(name, base):
    config, wanted = configs.get(f"google/{name}-it"), configs.get(base)
    vision = None if name.endswith("-text") else wanted.vision
    assert config == dataclasses.replace(wanted, name=name, vision=vision)
    assert hub.repository(name) == hub.repository(f"{name}-it") == f"google/{name}-it"


def test_embeddinggemma_has_the_numbers_of_the_specification():
    config = configs.get("google/embeddinggemma-300m")
    assert sizes(config) == (24, 768, 3, 1, 256, 1152)
    assert [i for i, spec in enumerate(config.layers) if not spec.is_local] == [5, 11, 17, 23]
    assert (config.attention.is_causal, config.attention.local.window, config.context) == (False, 512, 2048)
    assert config.dense_widths == (3072, 768)
    assert config.attention.query_scale == 0.0625
    assert hub.repository("embeddinggemma-300m") == "google/embeddinggemma-300m"


def test_the_largest_scales_queries_by_its_width_per_head():
    """gemma3.md, 1.1, and trap 1: 0.0771516750, not 128 ** -0.5."""
    assert math.isclose(configs.get("gemma-3-27b").attention.query_scale, 0.0771516750, rel_tol=1e-8)
    assert configs.get("gemma-3-12b").attention.query_scale == 0.0625


@pytest.mark.parametrize("name", EARLIER)
def test_gemma_1_and_2_have_the_numbers_of_their_reports(name):
    config = configs.get(name)
    *shape, both_ffw_halves, query_scalar = EARLIER[name]
    is_second, attention = name.startswith("gemma-2-"), config.attention
    assert sizes(config) == (*shape, both_ffw_halves // 2)
    assert attention.query_pre_attn_scalar == query_scalar
    assert (config.vocab_size, config.context) == (256_000, 8192)
    assert (attention.softcap, config.final_softcap) == ((50.0, 30.0) if is_second else (None, None))
    assert [spec.is_local for spec in config.layers[:4]] == ([True, False] * 2 if is_second else [False] * 4)
    assert attention.local.window == (4096 if is_second else None)
    assert {attention.local.rope_theta, attention.global_.rope_theta} == {10_000.0}
    assert config.norm.has_post_norms == is_second
    assert not attention.has_qk_norm
    assert config.has_tied_head


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("google/gemma-3-270m", "gemma-3-270m"),
        ("google/gemma-3-1b-it", "gemma-3-1b"),
        ("google/gemma-3-4b-pt", "gemma-3-4b"),
        ("gemma-3-27b-it", "gemma-3-27b"),
        ("Gemma-3-12B-IT", "gemma-3-12b"),
        ("google/gemma-2-9b-it", "gemma-2-9b"),
        ("google/gemma-2b", "gemma-2b"),
    ],
)
def test_names_of_the_hub_mean_the_same_architecture(alias, name):
    assert configs.get(alias) is configs.get(name)


@pytest.mark.parametrize(
    ("name", "close"),
    [("gemma-3-270", "gemma-3-270m"), ("gemma3-12b", "gemma-3-12b"), ("google/gemma-3-2b-it", "gemma-3-27b")],
)
def test_an_unknown_name_is_answered_with_close_ones(name, close):
    with pytest.raises(ConfigError, match=rf"no model '{name}'; did you mean .*\b{close}\b"):
        configs.get(name)


def test_a_name_like_no_other_is_answered_with_all():
    with pytest.raises(ConfigError) as error:
        configs.get("zzz")
    assert all(name in str(error.value) for name in configs.names())
