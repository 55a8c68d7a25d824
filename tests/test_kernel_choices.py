"""Which kernels a model's programs use, by tracing them."""

import pytest

import gemma_kernels
from gemma_jax import configs
from gemma_jax.kernel_choices import kernel_choices

OPERATIONS = {
    "training, 512 tokens": {"band_attention", "linear_cross_entropy"},
    "a prompt's first 512 tokens": {"band_attention"},
    "its next 512": {"band_attention"},
    "decoding": {"decode_attention"},
}


@pytest.fixture(scope="module")
def config(make_config):
    """Local layers and a global one, of a head width that kernels serve."""
    return make_config(num_layers=3, window=256).replace_all([("attention.head_dim", 128), ("context", 512)])


@pytest.mark.parametrize("generation", ["v5e", "v6e"])
def test_on_a_tpu_every_operation_of_every_program_has_a_kernel_and_its_blocks(config, generation):
    found = kernel_choices(config, generation, context=512)
    assert {name: {choice.operation for choice in choices} for name, choices in found.items()} == OPERATIONS
    for choice in (choice for choices in found.values() for choice in choices):
        assert choice.kernel == "tpu"
        assert choice.blocks
        assert str(choice).startswith(f"{choice.operation}: tpu {{")
        assert f"({generation}, the table's entry nearest to" in str(choice)


def test_streams_are_mixed_by_kernels_where_tokens_are_many(make_3n):
    config = make_3n(num_layers=2, num_shared=0).replace_all([("width", 128), ("context", 512)])
    found = kernel_choices(config, "v5e", context=512)
    mixtures = {name: [str(c) for c in choices if c.operation == "mix_streams"] for name, choices in found.items()}
    decoding = mixtures.pop("decoding")
    assert decoding == ["mix_streams: XLA (1 tokens are too few to fill a block)"]
    for choices in mixtures.values():
        assert len(choices) == 2  # the prediction of one stream, the correction of all
        assert all(choice.startswith("mix_streams: tpu {") for choice in choices)


def test_window_and_global_layers_are_told_apart_and_each_choice_is_told_once(config):
    choices = kernel_choices(config, "v6e", context=512)["training, 512 tokens"]
    attentions = [choice for choice in choices if choice.operation == "band_attention"]
    assert len(choices) == len(set(map(str, choices))) == 3
    for choice, window in zip(attentions, (256, 0), strict=True):
        assert f"'window': {window}" in choice.reason


@pytest.mark.parametrize("is_argument", [True, False])
def test_forcing_the_reference_shows_xla_everywhere(config, is_argument):
    if is_argument:
        found = kernel_choices(config, "reference", context=512)
    else:
        with gemma_kernels.using("reference"):
            found = kernel_choices(config, context=512)
    printed = {name: [str(choice) for choice in choices] for name, choices in found.items()}
    assert printed == {
        name: [f"{operation}: XLA (no kernel for reference)" for operation in sorted(operations)]
        for name, operations in OPERATIONS.items()
    }


def test_a_target_wins_over_what_is_forced_around_it(config):
    with gemma_kernels.using("reference"):
        found = kernel_choices(config, "v6e", context=512)
    assert all(choice.kernel == "tpu" for choices in found.values() for choice in choices)


def test_why_no_kernel_serves_is_said(config):
    narrow = config.replace_all([("attention.head_dim", 64)])
    (choice,) = kernel_choices(narrow, "v6e", context=512)["its next 512"]
    assert str(choice) == "band_attention: XLA (head width 64 is no multiple of 128)"
    choices = kernel_choices(config, "gpu", context=512)["its next 512"]
    assert [choice.reason for choice in choices] == ["the queries' columns are known only when it runs"]


def test_a_model_without_a_cache_has_one_program():
    config = configs.get("embeddinggemma-300m")
    found = kernel_choices(config, "v6e", context=512)
    assert list(found) == ["training, 512 tokens"]


def test_another_target_is_refused_by_name(config):
    with pytest.raises(ValueError, match="the kernels' target is 'v4'; wanted one of reference"):
        kernel_choices(config, "v4", context=512)
