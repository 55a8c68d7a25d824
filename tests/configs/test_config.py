import dataclasses
import math

import pytest

from gemma_jax.configs import gemma3
from gemma_jax.configs.config import AltUpConfig, ConfigError, LayerSpec, PerLayerEmbeddingConfig

SHARED = (
    LayerSpec(is_local=True, ffw_width=48),
    LayerSpec(is_local=False, ffw_width=48),
    LayerSpec(is_local=True, ffw_width=48, kv_source=0),
)


def with_sources(*sources: int | None) -> tuple[LayerSpec, ...]:
    return tuple(dataclasses.replace(spec, kv_source=source) for spec, source in zip(SHARED, sources, strict=True))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("vocab_size", 0, r"vocab_size is 0"),
        ("width", -32, r"width is -32"),
        ("context", 0, r"context is 0"),
        ("period", 0, r"period is 0"),
        ("attention.local.window", 2**31, r"attention.local.window is 2147483648; positions are int32"),
        ("activation", "swish", r"activation is 'swish'.*gelu_tanh"),
        ("final_softcap", 0.0, r"final_softcap is 0.0"),
        ("final_softcap", math.nan, r"final_softcap is nan"),
        ("laurel_rank", 0, r"laurel_rank is 0"),
        ("norm.epsilon", 0.0, r"norm.epsilon is 0.0"),
        ("attention.num_heads", 0, r"attention.num_heads is 0"),
        ("attention.num_kv_heads", 3, r"attention.num_heads 4 is not a multiple of attention.num_kv_heads 3"),
        ("attention.num_kv_heads", 0, r"attention.num_kv_heads is 0"),
        ("attention.head_dim", 7, r"attention.head_dim is 7.*even"),
        ("attention.head_dim", -8, r"attention.head_dim is -8"),
        ("attention.query_pre_attn_scalar", 0.0, r"attention.query_pre_attn_scalar is 0.0"),
        ("attention.softcap", -1.0, r"attention.softcap is -1.0"),
        ("attention.local.window", 0, r"attention.local.window is 0"),
        ("attention.local.window", None, r"attention.local.window is None, but layers has local layers"),
        ("attention.global.window", 8, r"attention.global.window is 8"),
        ("attention.global.rope_theta", 0.0, r"attention.global.rope_theta is 0.0"),
        ("attention.local.rope_theta", math.inf, r"attention.local.rope_theta is inf"),
        ("attention.global.rope_scale", -8.0, r"attention.global.rope_scale is -8.0"),
        ("layers", (), r"layers is empty"),
        ("layers.2.ffw_width", 0, r"layers.2.ffw_width is 0"),
        ("layers.0.activation_sparsity", 1.0, r"layers.0.activation_sparsity is 1.0"),
        ("layers.0.activation_sparsity", -0.1, r"layers.0.activation_sparsity is -0.1"),
        ("layers", with_sources(None, None, 2), r"layers.2.kv_source is 2; wanted an earlier layer"),
        ("layers", with_sources(None, None, 1), r"layers.2.kv_source is 1.*layers.1.is_local differs"),
        ("layers", (*SHARED, dataclasses.replace(SHARED[0], kv_source=2)), r"layers.3.kv_source is 2.*no keys of its"),
        ("altup", AltUpConfig(num_streams=4, active_stream=4), r"altup.active_stream is 4.*altup.num_streams is 4"),
        ("altup", AltUpConfig(coefficient_clip=0.0), r"altup.coefficient_clip is 0.0"),
        (
            "per_layer_embedding",
            PerLayerEmbeddingConfig(num_rows=129, width=4),
            r"per_layer_embedding.num_rows is 129.*vocab_size 128",
        ),
        ("per_layer_embedding", PerLayerEmbeddingConfig(num_rows=9, width=0), r"per_layer_embedding.width is 0"),
        ("vision", dataclasses.replace(gemma3.SIGLIP_SO400M, num_heads=7), r"vision.width 1152.*vision.num_heads 7"),
        ("vision", dataclasses.replace(gemma3.SIGLIP_SO400M, image_size=900), r"vision.image_size 900.*patch_size 14"),
        ("vision", dataclasses.replace(gemma3.SIGLIP_SO400M, num_layers=0), r"vision.num_layers is 0"),
    ],
)
def test_an_impossible_combination_is_refused_by_the_names_of_its_fields(tiny_config, path, value, message):
    with pytest.raises(ConfigError, match=rf"config 'tiny' is impossible:\n(?s:.*)  {message}"):
        tiny_config.replace(path, value)


def test_keys_may_be_shared_by_layers_of_one_kind(tiny_config):
    assert tiny_config.replace("layers", SHARED).layers[2].kv_source == 0


def test_all_problems_are_listed_at_once(tiny_config):
    with pytest.raises(ConfigError) as error:
        dataclasses.replace(
            tiny_config,
            vocab_size=0,
            activation="swish",
            attention=dataclasses.replace(tiny_config.attention, num_kv_heads=3),
            layers=(LayerSpec(is_local=True, ffw_width=-1),),
        )
    lines = str(error.value).splitlines()
    assert lines[0] == "config 'tiny' is impossible:"
    assert [line.split()[0] for line in lines[1:]] == [
        "vocab_size",
        "activation",
        "attention.num_heads",
        "layers.0.ffw_width",
    ]


def test_replace_changes_one_field_and_nothing_else(tiny_config):
    changed = tiny_config.replace("attention.local.window", 3)
    local = dataclasses.replace(tiny_config.attention.local, window=3)
    assert changed == dataclasses.replace(
        tiny_config, attention=dataclasses.replace(tiny_config.attention, local=local)
    )
    assert tiny_config.attention.local.window == 8  # the original stays


def test_replace_reaches_one_layer_or_all(tiny_config):
    assert [spec.ffw_width for spec in tiny_config.replace("layers.3.ffw_width", 64).layers] == [48, 48, 48, 64, 48]
    assert [spec.ffw_width for spec in tiny_config.replace("layers.*.ffw_width", 64).layers] == [64] * 5
    assert [spec.is_local for spec in tiny_config.replace("layers.*.ffw_width", 64).layers] == [
        spec.is_local for spec in tiny_config.layers
    ]


@pytest.mark.parametrize("path", ["attention.global.rope_theta", "attention.global_.rope_theta"])
def test_global_may_be_written_without_underscore(tiny_config, path):
    changed = tiny_config.replace(path, 5e5)
    assert changed.attention.global_.rope_theta == 5e5
    assert changed.attention.local == tiny_config.attention.local


def test_a_whole_number_is_a_number_but_not_the_other_way_round(tiny_config):
    assert tiny_config.replace("attention.query_pre_attn_scalar", 8).attention.query_scale == 8**-0.5
    with pytest.raises(ConfigError, match=r"'attention.head_dim' is set to 8.0, float; wanted int"):
        tiny_config.replace("attention.head_dim", 8.0)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("attention.local.window", "256", r"'attention.local.window' is set to '256', str; wanted int or None"),
        ("width", True, r"'width' is set to True, bool; wanted int"),
        ("has_tied_head", 1, r"'has_tied_head' is set to 1, int; wanted bool"),
        ("width", None, r"'width' is set to None, NoneType; wanted int"),
        ("layers", [], r"'layers' is set to \[\], list; wanted tuple"),
        ("layers", (48,), r"'layers' is set to 48, int; wanted LayerSpec"),
        ("layers.0", 48, r"'layers.0' is set to 48, int; wanted LayerSpec"),
        ("layers.*", 48, r"'layers.\*' is set to 48, int; wanted LayerSpec"),
        ("attention", 4, r"'attention' is set to 4, int; wanted AttentionConfig"),
        ("layers.1.is_local", 0, r"'layers.1.is_local' is set to 0, int; wanted bool"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(tiny_config, path, value, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config.replace(path, value)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("widht", r"'widht': DecoderConfig has no field 'widht'; it has .*\bwidth\b"),
        ("attention.local.windows", r"'attention.local.windows': AttentionKind has no field 'windows'.*window"),
        ("attention.local.window.x", r"no field 'x' below a int"),
        ("vision.width", r"no field 'width' below a NoneType"),
        ("layers.5.ffw_width", r"'5' is no layer; wanted 0 to 4, or \*"),
        ("layers.-1.ffw_width", r"'-1' is no layer"),
        ("layers.ffw_width", r"'ffw_width' is no layer"),
        ("layers.*.ffw", r"LayerSpec has no field 'ffw'.*ffw_width"),
        ("", r"has no field ''"),
        ("num_layers", r"DecoderConfig has no field 'num_layers'.*layers"),
    ],
)
def test_a_path_that_names_no_field_is_refused_and_those_there_are_are_listed(tiny_config, path, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config.replace(path, 4)


def test_changes_possible_only_together_can_be_made_in_any_order(tiny_config):
    changes = [("attention.num_heads", 3), ("attention.num_kv_heads", 3)]
    for pairs in (changes, changes[::-1]):
        assert tiny_config.replace_all(pairs).attention.num_kv_heads == 3
    with pytest.raises(ConfigError, match="num_heads 3 is not a multiple"):
        tiny_config.replace_all(changes[:1])


def test_configs_are_frozen_and_equal_ones_hash_equally(make_config):
    first, second = make_config(), make_config()
    assert first is not second
    assert hash(first) == hash(second)
    assert {first: 1}[second] == 1
    assert hash(first) != hash(first.replace("layers.3.ffw_width", 64))
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.width = 64


def test_each_layer_has_the_attention_of_its_kind(tiny_config):
    kinds = [tiny_config.kind(spec) for spec in tiny_config.layers]
    attention = tiny_config.attention
    assert kinds == [attention.local, attention.global_, attention.local, attention.global_, attention.local]
    assert tiny_config.num_layers == 5
