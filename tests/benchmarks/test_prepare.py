"""The same weights in every peer's layout."""

import numpy as np
import pytest

from benchmarks.prepare import HF_NAMES, huggingface_config, huggingface_name, huggingface_weight
from benchmarks.prepare_deepmind import nested

HEADS, KV_HEADS, WIDTH, HEAD, FFW = 4, 2, 6, 3, 5


def test_gguf_names_become_huggingface_names():
    assert huggingface_name("blk.3.ffn_norm.weight") == "model.layers.3.pre_feedforward_layernorm.weight"
    assert huggingface_name("token_embd.weight") == "model.embed_tokens.weight"


@pytest.mark.parametrize("name", ["blk.0.attn_sinks.weight", "blk.0.attn_q.bias", "v.blk.0.weight"])
def test_unknown_tensors_are_refused_by_name(name):
    with pytest.raises(ValueError, match=f"{name} is no tensor"):
        huggingface_name(name)


def test_norms_lose_the_one_that_gguf_adds_and_nothing_else_changes():
    ones = np.ones(3, np.float32)
    assert np.all(huggingface_weight("blk.0.attn_q_norm.weight", ones) == 0)
    assert np.all(huggingface_weight("blk.0.attn_q.weight", ones) == 1)


def test_the_config_has_a_global_layer_after_every_five_local_ones():
    numbers = {
        "block_count": 18, "embedding_length": 640, "feed_forward_length": 2048, "attention.head_count": 4,
        "attention.head_count_kv": 1, "attention.key_length": 256, "context_length": 32768,
        "attention.sliding_window": 512, "attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 1e6,
    }  # fmt: skip
    config = huggingface_config({f"gemma3.{key}": value for key, value in numbers.items()}, 262144)
    assert [i for i, kind in enumerate(config["layer_types"]) if kind == "full_attention"] == [5, 11, 17]
    assert (config["hidden_size"], config["head_dim"], config["sliding_window"]) == (640, 256, 512)


def test_deepminds_tree_gives_the_same_products_as_huggingfaces_matrices():
    random = np.random.default_rng(0)
    shapes = {"self_attn.q_proj": (HEADS * HEAD, WIDTH), "self_attn.o_proj": (WIDTH, HEADS * HEAD)}
    shapes |= {f"self_attn.{name}_proj": (KV_HEADS * HEAD, WIDTH) for name in "kv"}
    shapes |= {"mlp.gate_proj": (FFW, WIDTH), "mlp.up_proj": (FFW, WIDTH), "mlp.down_proj": (WIDTH, FFW)}
    names = {f"model.layers.0.{name}.weight": shapes.get(name, (WIDTH,)) for name in HF_NAMES.values()}
    names |= {"model.embed_tokens.weight": (7, WIDTH), "model.norm.weight": (WIDTH,)}
    weights = {name: random.normal(size=shape) for name, shape in names.items()}
    layer = nested(weights, HEADS, KV_HEADS, 1)["layer_0"]
    x, z = random.normal(size=WIDTH), random.normal(size=(HEADS, HEAD))

    def matrix(name: str) -> np.ndarray:
        return weights[f"model.layers.0.{name}.weight"]

    attn, mlp = layer["attn"], layer["mlp"]
    queries = np.einsum("d,ndh->nh", x, attn["q_einsum"]["w"])
    keys, values = np.einsum("d,ckdh->ckh", x, attn["kv_einsum"]["w"])
    np.testing.assert_allclose(queries.ravel(), matrix("self_attn.q_proj") @ x)
    np.testing.assert_allclose(keys.ravel(), matrix("self_attn.k_proj") @ x)
    np.testing.assert_allclose(values.ravel(), matrix("self_attn.v_proj") @ x)
    out = np.einsum("nh,nhd->d", z, attn["attn_vec_einsum"]["w"])
    np.testing.assert_allclose(out, matrix("self_attn.o_proj") @ z.ravel())
    gate, up = np.einsum("d,cfd->cf", x, mlp["gating_einsum"])
    np.testing.assert_allclose(gate, matrix("mlp.gate_proj") @ x)
    np.testing.assert_allclose(up, matrix("mlp.up_proj") @ x)
    np.testing.assert_allclose(gate @ mlp["linear"], matrix("mlp.down_proj") @ gate)
