import pytest

from gemma_jax.configs import overrides
from gemma_jax.configs.config import ConfigError


@pytest.mark.parametrize(
    ("change", "read", "want"),
    [
        ("attention.local.window=256", lambda c: c.attention.local.window, 256),
        ("attention.global.rope_theta=5e5", lambda c: c.attention.global_.rope_theta, 500_000.0),
        ("attention.global.rope_scale=4", lambda c: c.attention.global_.rope_scale, 4),
        ("attention.softcap=50.0", lambda c: c.attention.softcap, 50.0),
        ("final_softcap=none", lambda c: c.final_softcap, None),
        ("final_softcap=null", lambda c: c.final_softcap, None),
        ("has_tied_head=false", lambda c: c.has_tied_head, False),
        ("attention.is_causal=False", lambda c: c.attention.is_causal, False),
        ("norm.is_zero_centred=true", lambda c: c.norm.is_zero_centred, True),
        ("activation=silu", lambda c: c.activation, "silu"),
        (" width = 64 ", lambda c: c.width, 64),
        ("layers.3.ffw_width=64", lambda c: [spec.ffw_width for spec in c.layers], [48, 48, 48, 64, 48]),
        ("layers.*.ffw_width=64", lambda c: [spec.ffw_width for spec in c.layers], [64] * 5),
        ("name=a=b", lambda c: c.name, "a=b"),
    ],
)
def test_a_text_sets_a_field_to_a_value_of_its_type(tiny_config, change, read, want):
    got = read(overrides.apply(tiny_config.replace("final_softcap", 30.0), [change]))
    assert got == want
    assert type(got) is type(want)


def test_a_mapping_says_the_same_as_texts(tiny_config):
    values = {"attention.local.window": 4, "layers.*.ffw_width": 64, "final_softcap": None, "has_tied_head": False}
    texts = ["attention.local.window=4", "layers.*.ffw_width=64", "final_softcap=none", "has_tied_head=false"]
    changed = overrides.apply(tiny_config, values)
    assert changed == overrides.apply(tiny_config, texts)
    assert changed != tiny_config


def test_no_changes_change_nothing(tiny_config):
    assert overrides.apply(tiny_config, []) == overrides.apply(tiny_config, {}) == tiny_config


def test_later_changes_win(tiny_config):
    changes = ["layers.*.ffw_width=64", "layers.0.ffw_width=80", "width=64", "width=96"]
    changed = overrides.apply(tiny_config, changes)
    assert [spec.ffw_width for spec in changed.layers] == [80, 64, 64, 64, 64]
    assert changed.width == 96


def test_changes_that_are_possible_only_together_may_stand_in_any_order(tiny_config):
    changes = ["attention.num_heads=9", "attention.num_kv_heads=3"]
    for texts in (changes, changes[::-1]):
        attention = overrides.apply(tiny_config, texts).attention
        assert (attention.num_heads, attention.num_kv_heads) == (9, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("attention.local.window", r"override 'attention.local.window' is not of the form dotted.path=value"),
        ("=5", r"override '=5' is not of the form"),
        ("", r"override '' is not of the form"),
        ("attention.local.windw=5", r"AttentionKind has no field 'windw'"),
        ("width=wide", r"'width' is set to 'wide', str; wanted int"),
        ("width=64.5", r"'width' is set to 64.5, float; wanted int"),
        ("width=", r"'width' is set to '', str; wanted int"),
        ("has_tied_head=1", r"'has_tied_head' is set to 1, int; wanted bool"),
        ("width=-64", r"width is -64; wanted a positive whole number"),
        ("final_softcap=nan", r"final_softcap is nan"),
        ("activation=swish", r"activation is 'swish'"),
        ("layers.9.ffw_width=64", r"'9' is no layer; wanted 0 to 4"),
    ],
)
def test_a_bad_change_is_refused_by_name(tiny_config, change, message):
    with pytest.raises(ConfigError, match=message):
        overrides.apply(tiny_config, [change])
