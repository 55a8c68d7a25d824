import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_jax import configs
from gemma_jax.configs.config import ConfigError
from gemma_jax.configs.huggingface import from_huggingface

# What the released files say. Those of the 4B, 12B and 27B leave most to the defaults of transformers (gemma3.md, 1.3).
SIGLIP = {
    "hidden_size": 1152,
    "image_size": 896,
    "intermediate_size": 4304,
    "model_type": "siglip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
    "vision_use_head": False,
}
RELEASED: dict[str, dict[str, Any]] = {
    "gemma-3-270m": {
        "model_type": "gemma3_text",
        "vocab_size": 262_144,
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_hidden_layers": 18,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "sliding_window": 512,
        "max_position_embeddings": 32_768,
        "rope_scaling": None,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rms_norm_eps": 1e-6,
        "query_pre_attn_scalar": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "use_bidirectional_attention": False,
        "layer_types": [*["sliding_attention"] * 5, "full_attention"] * 3,
    },
    "gemma-3-1b": {
        "model_type": "gemma3_text",
        "vocab_size": 262_144,
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "num_hidden_layers": 26,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "max_position_embeddings": 32_768,
        "rope_scaling": None,
        "rope_theta": 1_000_000,
        "rope_local_base_freq": 10_000,
    },
    "gemma-3-4b": {
        "model_type": "gemma3",
        "image_token_index": 262_144,
        "text_config": {
            "model_type": "gemma3_text",
            "hidden_size": 2560,
            "intermediate_size": 10_240,
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "vision_config": SIGLIP,
    },
    "gemma-3-12b": {
        "model_type": "gemma3",
        "text_config": {
            "model_type": "gemma3_text",
            "hidden_size": 3840,
            "intermediate_size": 15_360,
            "num_attention_heads": 16,
            "num_hidden_layers": 48,
            "num_key_value_heads": 8,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "vision_config": SIGLIP,
    },
    "gemma-3-27b": {
        "model_type": "gemma3",
        "text_config": {
            "model_type": "gemma3_text",
            "head_dim": 128,
            "hidden_size": 5376,
            "intermediate_size": 21_504,
            "num_attention_heads": 32,
            "num_hidden_layers": 62,
            "num_key_value_heads": 16,
            "query_pre_attn_scalar": 168,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "vision_config": SIGLIP,
    },
    "gemma-2-2b": {"model_type": "gemma2"},
    "gemma-2-27b": {
        "model_type": "gemma2",
        "head_dim": 128,
        "hidden_size": 4608,
        "intermediate_size": 36_864,
        "num_attention_heads": 32,
        "num_hidden_layers": 46,
        "num_key_value_heads": 16,
        "query_pre_attn_scalar": 144,
        "hidden_act": "gelu_pytorch_tanh",
    },
    "gemma-7b": {"model_type": "gemma", "hidden_act": "gelu", "hidden_activation": None},
    "gemma-2b": {
        "model_type": "gemma",
        "hidden_act": "gelu",
        "hidden_size": 2048,
        "intermediate_size": 16_384,
        "num_attention_heads": 8,
        "num_hidden_layers": 18,
        "num_key_value_heads": 1,
        "rope_theta": 10_000.0,
    },
}
SMALL: dict[str, Any] = {
    "model_type": "gemma3_text",
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 8,
}


def kinds(config) -> str:
    return "".join("l" if spec.is_local else "G" for spec in config.layers)


@pytest.mark.parametrize("name", RELEASED)
def test_the_released_files_give_the_registered_models(name):
    assert from_huggingface(RELEASED[name], name=name) == configs.get(name)


def test_the_dialect_of_transformers_5_says_the_same():
    old = {
        **SMALL,
        "rope_theta": 5e5,
        "rope_local_base_freq": 2e4,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    }
    new = {
        **SMALL,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
        },
    }
    got = from_huggingface(new)
    assert got == from_huggingface(old)
    assert (got.attention.global_.rope_theta, got.attention.global_.rope_scale) == (5e5, 4.0)
    assert (got.attention.local.rope_theta, got.attention.local.rope_scale) == (2e4, 1.0)  # only global layers scale


def test_ropes_that_are_not_said_are_those_of_gemma_3():
    for ropes in (
        {},
        {"rope_parameters": None},
        {"rope_parameters": {"full_attention": None, "sliding_attention": {}}},
    ):
        attention = from_huggingface({**SMALL, **ropes}).attention
        assert (attention.global_.rope_theta, attention.global_.rope_scale) == (1e6, 1.0)
        assert (attention.local.rope_theta, attention.local.rope_scale) == (1e4, 1.0)


@pytest.mark.parametrize("family", ["gemma2", "gemma"])
def test_earlier_gemmas_have_one_rope_for_all_layers(family):
    data = {**SMALL, "model_type": family, "rope_parameters": {"rope_type": "default", "rope_theta": 7e4}}
    attention = from_huggingface(data).attention
    assert attention.global_.rope_theta == attention.local.rope_theta == 7e4
    assert from_huggingface({**SMALL, "model_type": family, "rope_theta": 7e4}).attention == attention


def test_older_files_name_the_kind_of_scaling_type():
    data = {**SMALL, "rope_scaling": {"type": "linear", "factor": 8.0}}
    assert from_huggingface(data).attention.global_.rope_scale == 8.0


def test_a_multimodal_file_gives_its_text_part():
    text = {key: value for key, value in SMALL.items() if key != "model_type"}
    data = {"model_type": "gemma3", "hidden_size": 99, "text_config": text}
    assert from_huggingface(data) == from_huggingface(SMALL)
    seeing = from_huggingface({**data, "vision_config": SIGLIP, "mm_tokens_per_image": 64})
    assert seeing.replace("vision", None) == from_huggingface(SMALL)
    assert (seeing.vision.width, seeing.vision.num_soft_tokens) == (1152, 64)


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("hidden_size", "wide", "width is 'wide'"),
        ("num_hidden_layers", 10**6, "1000000 layers"),
        ("patch_size", 0, "0"),
    ],
)
def test_an_impossible_vision_tower_is_refused_by_field(key, value, problem):
    with pytest.raises(ConfigError, match=f"vision tower.*{problem}"):
        from_huggingface({"model_type": "gemma3", "vision_config": {**SIGLIP, key: value}})


def test_a_multimodal_file_without_text_config_is_all_defaults():
    defaults = from_huggingface({"model_type": "gemma3_text"})
    assert from_huggingface({"model_type": "gemma3"}) == from_huggingface({"model_type": "gemma3", "text_config": None})
    assert from_huggingface({"model_type": "gemma3"}) == defaults
    assert (defaults.width, defaults.num_layers, defaults.attention.num_heads) == (2304, 26, 8)


@pytest.mark.parametrize("where", ["top", "text"])
def test_a_multimodal_file_unties_its_head_on_either_level(where):
    top = {"tie_word_embeddings": False} if where == "top" else {}
    text = {**SMALL, "tie_word_embeddings": where == "top"}
    assert not from_huggingface({"model_type": "gemma3", **top, "text_config": text}).has_tied_head
    assert from_huggingface({"model_type": "gemma3", "text_config": SMALL}).has_tied_head


@pytest.mark.parametrize(("rows", "want"), [(262_208, 262_144), (262_144, 262_144), (262_209, 262_209), (97, 97)])
def test_rows_that_pad_the_vocabulary_are_not_counted(rows, want):
    assert from_huggingface({**SMALL, "vocab_size": rows}).vocab_size == want
    without = {key: value for key, value in SMALL.items() if key != "vocab_size"}
    assert from_huggingface(without).vocab_size == 262_144  # the default is 262,208


@pytest.mark.parametrize(
    ("said", "want", "period"),
    [
        ({}, "lllll" + "Gl", 6),
        ({"sliding_window_pattern": 3}, "llGllGl", 3),
        ({"_sliding_window_pattern": 2}, "lGlGlGl", 2),
        ({"sliding_window_pattern": 1}, "GGGGGGG", 1),
        ({"layer_types": ["full_attention"] + ["sliding_attention"] * 6}, "Gllllll", 7),
        ({"sliding_window_pattern": 2, "layer_types": ["sliding_attention"] * 7}, "lllllll", 1),
        ({"layer_types": (["sliding_attention"] * 2 + ["full_attention"]) * 2 + ["sliding_attention"]}, "llGllGl", 3),
    ],
)
def test_layer_types_win_over_the_pattern_and_that_over_five_to_one(said, want, period):
    got = from_huggingface({**SMALL, "num_hidden_layers": 7, **said})
    assert kinds(got) == want
    assert got.period == period


def test_gemma_2_alternates_and_begins_local():
    assert kinds(from_huggingface({**SMALL, "model_type": "gemma2"})) == "lGlG"


def test_gemma_1_is_all_global():
    assert kinds(from_huggingface({**SMALL, "model_type": "gemma"})) == "GGGG"


@pytest.mark.parametrize(
    ("family", "said", "want"),
    [
        ("gemma3_text", {}, "gelu_tanh"),
        ("gemma3_text", {"hidden_activation": "gelu"}, "gelu"),
        ("gemma2", {"hidden_activation": "silu", "hidden_act": "gelu"}, "silu"),
        ("gemma", {"hidden_act": "gelu"}, "gelu_tanh"),  # a slip of the released files
        ("gemma", {"hidden_act": "gelu_pytorch_tanh"}, "gelu_tanh"),
        ("gemma", {"hidden_act": "relu"}, "relu"),
        ("gemma", {"hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"}, "gelu_tanh"),
    ],
)
def test_activations(family, said, want):
    assert from_huggingface({**SMALL, "model_type": family, **said}).activation == want


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (
            {"model_type": "llama"},
            r"model_type is 'llama'; can be read: gemma3, gemma3n, shieldgemma2, gemma3_text, gemma3n_text, gemma2, ",
        ),
        ({"model_type": "gemma4"}, r"model_type is 'gemma4'"),
        ({"model_type": None}, r"model_type is None"),
        ({"attention_bias": True}, r"attention_bias is true"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, r"rope_type is 'yarn'.*default and linear"),
        ({"rope_parameters": {"sliding_attention": {"rope_type": "llama3"}}}, r"rope_type is 'llama3'"),
        ({"layer_types": ["full_attention"] * 3}, r"layer_types is .* for 4 layers"),
        ({"layer_types": ["full_attention"] * 3 + ["chunked_attention"]}, r"layer_types is .*chunked_attention"),
        ({"hidden_activation": "quick_gelu"}, r"hidden_activation is 'quick_gelu'; can be read: gelu_pytorch_tanh"),
        ({"num_attention_heads": 3}, r"attention.num_heads 3 is not a multiple of attention.num_kv_heads 2"),
        ({"sliding_window": None}, r"attention.local.window is None"),
        ({"num_hidden_layers": 0}, r"num_hidden_layers is 0; wanted positive whole numbers"),
        (
            {"num_hidden_layers": "4", "head_dim": None},
            r"head_dim is None, num_hidden_layers is '4'",
        ),
        ({"hidden_size": 32.0}, r"hidden_size is 32.0"),
    ],
)
def test_what_the_decoder_has_not_is_refused_by_name(said, message):
    with pytest.raises(ConfigError, match=message):
        from_huggingface({**SMALL, **said})


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'; wanted an object"),
        ({"rope_parameters": [1]}, r"rope_parameters is \[1\]; wanted an object"),
        ({"rope_parameters": {"full_attention": 5}}, "full_attention is 5; wanted an object"),
        ({"model_type": "gemma3", "text_config": [1]}, r"text_config is \[1\]; wanted an object"),
        ({"model_type": ["gemma"]}, r"model_type is \['gemma'\]"),
        ({"layer_types": 5}, "layer_types is 5"),
        ({"layer_types": [{}]}, r"layer_types is \[{}\]"),
        ({"hidden_activation": ["x"]}, r"hidden_activation is \['x'\]"),
        ({"sliding_window_pattern": "a"}, "sliding_window_pattern is 'a'"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'; wanted true or false"),
        ({"num_hidden_layers": 10_000_000}, "num_hidden_layers is 10000000; wanted at most 1024"),
    ],
)
def test_settings_of_the_wrong_kind_are_refused_by_name(said, message):
    with pytest.raises(ConfigError, match=message):
        from_huggingface({**SMALL, **said})


@st.composite
def text_settings(draw) -> dict[str, Any]:
    kv_heads, groups, layers = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 8))
    scale = draw(st.sampled_from([1.0, 8.0]))
    return {
        "vocab_size": draw(st.integers(8, 300)),
        "hidden_size": kv_heads * groups * draw(st.integers(1, 9)),
        "intermediate_size": draw(st.integers(1, 99)),
        "num_hidden_layers": layers,
        "num_attention_heads": kv_heads * groups,
        "num_key_value_heads": kv_heads,
        "head_dim": 2 * draw(st.integers(1, 9)),
        "max_position_embeddings": draw(st.integers(1, 9999)),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5])),
        "query_pre_attn_scalar": draw(st.integers(1, 300)),
        "sliding_window": 2 * draw(st.integers(1, 49)),  # transformers halves and doubles it if bidirectional
        "hidden_activation": draw(st.sampled_from(["gelu_pytorch_tanh", "gelu", "silu"])),
        "tie_word_embeddings": draw(st.booleans()),
        "final_logit_softcapping": draw(st.sampled_from([None, 30.0])),
        "use_bidirectional_attention": draw(st.booleans()),
        "layer_types": draw(
            st.lists(st.sampled_from(["sliding_attention", "full_attention"]), min_size=layers, max_size=layers)
        ),
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": draw(st.sampled_from([1e4, 2e4]))},
            "full_attention": {
                "rope_theta": draw(st.sampled_from([1e6, 5e5])),
                **({"rope_type": "default"} if scale == 1.0 else {"rope_type": "linear", "factor": scale}),
            },
        },
    }


def expected(chosen: dict[str, Any]) -> dict[str, Any]:
    """The field of ours that each setting of transformers is, by dotted path."""
    ropes = chosen["rope_parameters"]
    return {
        "vocab_size": chosen["vocab_size"],
        "width": chosen["hidden_size"],
        "context": chosen["max_position_embeddings"],
        "attention.num_heads": chosen["num_attention_heads"],
        "attention.num_kv_heads": chosen["num_key_value_heads"],
        "attention.head_dim": chosen["head_dim"],
        "attention.query_pre_attn_scalar": chosen["query_pre_attn_scalar"],
        "attention.local.rope_theta": ropes["sliding_attention"]["rope_theta"],
        "attention.local.rope_scale": 1.0,
        "attention.local.window": chosen["sliding_window"],
        "attention.global_.rope_theta": ropes["full_attention"]["rope_theta"],
        "attention.global_.rope_scale": ropes["full_attention"].get("factor", 1.0),
        "attention.has_qk_norm": True,
        "attention.is_causal": not chosen["use_bidirectional_attention"],
        "norm.epsilon": chosen["rms_norm_eps"],
        "norm.has_post_norms": True,
        "activation": {"gelu_pytorch_tanh": "gelu_tanh"}.get(chosen["hidden_activation"], chosen["hidden_activation"]),
        "has_tied_head": chosen["tie_word_embeddings"],
        "final_softcap": chosen["final_logit_softcapping"],
    }


def at(node: Any, path: str) -> Any:
    for name in path.split("."):
        node = getattr(node, name)
    return node


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


@pytest.mark.parity
@given(chosen=text_settings())
@settings(deadline=None, max_examples=60)
def test_every_setting_of_transformers_arrives(transformers, chosen):
    got = from_huggingface(transformers.Gemma3TextConfig(**chosen).to_dict())
    want = expected(chosen)
    assert {path: at(got, path) for path in want} == want
    assert [spec.is_local for spec in got.layers] == [kind == "sliding_attention" for kind in chosen["layer_types"]]
    assert {spec.ffw_width for spec in got.layers} == {chosen["intermediate_size"]}


@pytest.mark.parity
@pytest.mark.parametrize("name", ["gemma-3-1b", "gemma-3-4b", "gemma-3-27b", "gemma-2-27b", "gemma-2b"])
def test_a_file_that_transformers_has_read_and_saved_again_says_the_same(transformers, tmp_path, name):
    data = RELEASED[name]
    family = {"gemma3_text": "Gemma3TextConfig", "gemma3": "Gemma3Config", "gemma2": "Gemma2Config"}
    config = getattr(transformers, family.get(data["model_type"], "GemmaConfig")).from_dict(data)
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert from_huggingface(saved, name=name) == from_huggingface(data, name=name)
