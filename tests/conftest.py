"""Tiny random models and their plain forward, built once for all tests."""

import dataclasses
import gc
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from gemma_jax.configs.config import (
    AltUpConfig,
    AttentionConfig,
    AttentionKind,
    DecoderConfig,
    LayerSpec,
    PerLayerEmbeddingConfig,
)
from gemma_jax.configs.gemma3n import layer_specs
from gemma_jax.nn.decoder import Decoder, Stem
from gemma_jax.nn.masks import Places
from gemma_jax.nn.paths import parameters
from tests.quick import compile_quickly
from tests.vocabulary import PIECES, huggingface_data

compile_quickly()
os.environ["HF_HUB_OFFLINE"] = "1"  # before any library reads it: tests never ask the real hub
FIXTURES = Path(__file__).parent / "fixtures"
PLAIN_LENGTH = 64  # one compiled shape serves every sequence up to this length
_HUGGINGFACE_NAMES = {
    "pre_attention_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "pre_ffw_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    **{f"attn/{n}": f"self_attn.{n}_proj" for n in "qkvo"},
    **{f"attn/{n}_norm": f"self_attn.{n}_norm" for n in "qk"},
    **{f"mlp/{n}": f"mlp.{n}_proj" for n in ("gate", "up", "down")},
}


def _tiny_config(name: str = "tiny", vocab_size: int = 128, num_layers: int = 5, window: int = 8) -> DecoderConfig:
    """All that Gemma 3 is made of: GQA, local and global layers, rope scale, a query scale that is not H ** -0.5."""
    return DecoderConfig(
        name=name,
        vocab_size=vocab_size,
        width=32,
        context=320,
        attention=AttentionConfig(
            num_heads=4,
            num_kv_heads=2,
            head_dim=8,
            query_pre_attn_scalar=12.0,
            local=AttentionKind(window=window, rope_theta=10_000.0),
            global_=AttentionKind(window=None, rope_theta=1_000_000.0, rope_scale=8.0),
        ),
        layers=tuple(LayerSpec(is_local=i % 2 == 0, ffw_width=48) for i in range(num_layers)),
        period=2,
    )


def _tiny_3n(num_layers: int = 8, num_shared: int = 3) -> DecoderConfig:
    """All that Gemma 3n adds, on `_tiny_config`: 3:1 layers, the last of them without keys, widths that differ."""
    config = _tiny_config("tiny-3n", num_layers=num_layers, window=6)
    layers = layer_specs(
        [(i + 1) % 4 != 0 for i in range(num_layers)],
        [48 if i % 3 else 64 for i in range(num_layers)],
        [0.95 if i < 2 else 0.0 for i in range(num_layers)],
        num_shared,
    )
    return dataclasses.replace(
        config.replace_all(
            [
                ("norm.is_zero_centred", False),
                ("attention.has_v_norm", True),
                ("attention.query_pre_attn_scalar", 1.0),
                ("attention.global.rope_scale", 1.0),
            ]
        ),
        layers=layers,
        period=4,
        final_softcap=30.0,
        altup=AltUpConfig(num_streams=3),
        laurel_rank=4,
        per_layer_embedding=PerLayerEmbeddingConfig(num_rows=120, width=8),
    )


def _with_random_norms(model: Stem, seed: int = 1) -> Stem:
    """Norm scales away from their start: at 0 (or 1) a missing or doubled norm would not show."""
    generator = np.random.default_rng(seed)
    for path, param in parameters(model).items():
        if path.endswith("/scale"):
            value = param[...] + generator.normal(0.0, 0.3, param[...].shape)
            param.set_raw_value(jnp.asarray(value, param[...].dtype))
    return model


@pytest.fixture(autouse=True, scope="module")
def _few_programs() -> Iterator[None]:
    """Lets go of compiled programs before they use up the pieces of memory that Linux gives a process (65,530), or much
    of the memory.
    """
    yield
    maps, pages = Path("/proc/self/maps"), Path("/proc/self/statm")
    if not maps.exists():
        return
    resident = int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if maps.read_bytes().count(b"\n") > 20_000 or resident > 4 * 2**30:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def make_config() -> Callable[..., DecoderConfig]:
    return _tiny_config


@pytest.fixture(scope="session")
def make_3n() -> Callable[..., DecoderConfig]:
    return _tiny_3n


@pytest.fixture(scope="session")
def tiny_3n() -> Decoder:
    model = _with_random_norms(Decoder(_tiny_3n(), rngs=nnx.Rngs(3)))
    assert isinstance(model, Decoder)
    for i, layer in enumerate(model.layers):
        layer.altup.correct_scale.set_raw_value(jax.random.normal(jax.random.key(i), (32,)))
    return model


@pytest.fixture(scope="session")
def with_random_norms() -> Callable[..., Stem]:
    return _with_random_norms


@pytest.fixture(scope="session")
def tiny_config() -> DecoderConfig:
    return _tiny_config()


@pytest.fixture(scope="session")
def tiny_model(tiny_config: DecoderConfig) -> Decoder:
    model = _with_random_norms(Decoder(tiny_config, rngs=nnx.Rngs(7)))
    assert isinstance(model, Decoder)
    return model


@pytest.fixture(scope="session")
def forward() -> Callable[..., jax.Array]:
    """The plain forward of any decoder, compiled: (model, tokens [B, T], places) -> logits."""
    return jax.jit(lambda model, tokens, where: model(tokens, where))


@pytest.fixture(scope="session")
def hidden_states() -> Callable[..., jax.Array]:
    return jax.jit(lambda model, tokens, where: model.hidden_states(tokens, where))


@pytest.fixture(scope="session")
def plain_logits(tiny_model: Decoder, forward: Callable[..., jax.Array]) -> Callable[[Sequence[int]], np.ndarray]:
    """Logits [T, V] of one sequence by the whole forward, without cache, chunks or neighbours: the oracle."""

    def logits(tokens: Sequence[int]) -> np.ndarray:
        assert 0 < len(tokens) <= PLAIN_LENGTH
        row = np.zeros((1, PLAIN_LENGTH), np.int32)
        row[0, : len(tokens)] = tokens
        where = Places(jnp.where(jnp.arange(PLAIN_LENGTH) < len(tokens), jnp.arange(PLAIN_LENGTH), -1)[None])
        return np.asarray(forward(tiny_model, row, where))[0, : len(tokens)]

    return logits


@pytest.fixture(scope="session")
def plain_greedy(plain_logits: Callable[[Sequence[int]], np.ndarray]) -> Callable[[Sequence[int], int], list[int]]:
    """Greedy continuation by a whole forward for every token."""

    def greedy(prompt: Sequence[int], count: int) -> list[int]:
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(plain_logits(tokens)[-1].argmax()))
        return tokens[len(prompt) :]

    return greedy


@pytest.fixture(scope="session")
def text_fixture() -> dict[str, np.ndarray]:
    """Weights, inputs and outputs of Hugging Face's model; see fixtures/README.md."""
    with np.load(FIXTURES / "gemma3_text.npz") as file:
        return dict(file)


@pytest.fixture(scope="session")
def fixture_model(text_fixture: dict[str, np.ndarray]) -> Decoder:
    """Our decoder with the fixture's weights, put in place by hand from spec and not by our converters."""
    config = DecoderConfig(
        name="fixture",
        vocab_size=97,
        width=48,
        context=256,
        attention=AttentionConfig(
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            query_pre_attn_scalar=12.0,
            local=AttentionKind(window=5, rope_theta=10_000.0),
            global_=AttentionKind(window=None, rope_theta=1_000_000.0, rope_scale=8.0),
        ),
        layers=tuple(LayerSpec(is_local=(i + 1) % 6 != 0, ffw_width=80) for i in range(7)),
        period=6,
    )
    model = Decoder(config, rngs=nnx.Rngs(0))
    params = parameters(model)
    values = _canonical_weights(text_fixture, config)
    assert set(values) == set(params)
    for path, value in values.items():
        assert value.shape == params[path][...].shape, path
        params[path].set_raw_value(jnp.asarray(value))
    return model


def _canonical_weights(fixture: dict[str, np.ndarray], config: DecoderConfig) -> dict[str, np.ndarray]:
    width, attention = config.width, config.attention
    values = {
        "embedder/embedding": fixture["w:model.embed_tokens.weight"],
        "final_norm/scale": fixture["w:model.norm.weight"],
    }
    for i in range(config.num_layers):
        prefix, ours = f"w:model.layers.{i}.", f"layers_{i}/"
        for our_name, name in _HUGGINGFACE_NAMES.items():
            if "norm" not in our_name:
                continue
            values[f"{ours}{our_name}/scale"] = fixture[f"{prefix}{name}.weight"]
        for letter, heads in (("q", attention.num_heads), ("k", attention.num_kv_heads), ("v", attention.num_kv_heads)):
            kernel = fixture[f"{prefix}self_attn.{letter}_proj.weight"].T
            values[f"{ours}attn/{letter}/kernel"] = kernel.reshape(width, heads, attention.head_dim)
        kernel = fixture[f"{prefix}self_attn.o_proj.weight"].T
        values[f"{ours}attn/o/kernel"] = kernel.reshape(attention.num_heads, attention.head_dim, width)
        for name in ("gate", "up", "down"):
            values[f"{ours}mlp/{name}/kernel"] = fixture[f"{prefix}mlp.{name}_proj.weight"].T
    return values


def _huggingface_tensors(model: Decoder, prefix: str) -> dict[str, np.ndarray]:
    """A decoder's weights as transformers stores them: kernels as [out, in]."""
    tensors = {}
    for path, param in parameters(model).items():
        value, parts = np.asarray(param[...]), path.split("/")
        if parts[0] in ("embedder", "final_norm"):
            tensors[prefix + {"embedder": "embed_tokens", "final_norm": "norm"}[parts[0]] + ".weight"] = value
            continue
        name = "/".join(parts[1:-1])
        if parts[-1] == "kernel":
            value = value.reshape(-1, value.shape[-1]) if name == "attn/o" else value.reshape(value.shape[0], -1)
            value = np.ascontiguousarray(value.T)
        layer = parts[0].removeprefix("layers_")
        tensors[f"{prefix}layers.{layer}.{_HUGGINGFACE_NAMES[name]}.weight"] = value
    return tensors


@pytest.fixture(scope="session")
def huggingface_tensors() -> Callable[[Decoder, str], dict[str, np.ndarray]]:
    return _huggingface_tensors


@pytest.fixture(scope="session")
def saved_model() -> Decoder:
    """The weights in `model_folder`."""
    config = _tiny_config("saved", vocab_size=len(PIECES), num_layers=3)
    model = _with_random_norms(Decoder(config, rngs=nnx.Rngs(3)))
    assert isinstance(model, Decoder)
    return model


@pytest.fixture(scope="session")
def config_json(saved_model: Decoder) -> dict[str, Any]:
    """What transformers would write for `saved_model`."""
    config = saved_model.config
    return {
        "model_type": "gemma3_text",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "query_pre_attn_scalar": 12,
        "sliding_window": 8,
        "max_position_embeddings": 320,
        "rms_norm_eps": 1e-6,
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    }


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, saved_model: Decoder, config_json: dict[str, Any]) -> Path:
    """A tiny model with its tokenizer, as a Hugging Face folder. Not to be changed by tests."""
    folder = tmp_path_factory.mktemp("models") / "tiny-model"
    folder.mkdir()
    save_file(_huggingface_tensors(saved_model, "model."), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config_json))
    (folder / "tokenizer.json").write_text(json.dumps(huggingface_data()))
    return folder
