import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from gemma_checkpoints import CheckpointError, names
from gemma_checkpoints.names import huggingface_name
from gemma_checkpoints.safetensors import SafetensorsReader

D, N, K, H, F, V = 6, 4, 2, 3, 5, 11
SHAPES = {
    "embedder/embedding": (V, D),
    "final_norm/scale": (D,),
    "layers_0/attn/q/kernel": (D, N, H),
    "layers_0/attn/k/kernel": (D, K, H),
    "layers_0/attn/v/kernel": (D, K, H),
    "layers_0/attn/o/kernel": (N, H, D),
    "layers_0/attn/q_norm/scale": (H,),
    "layers_0/attn/k_norm/scale": (H,),
    "layers_0/mlp/gate/kernel": (D, F),
    "layers_0/mlp/up/kernel": (D, F),
    "layers_0/mlp/down/kernel": (F, D),
    **{f"layers_0/{place}_norm/scale": (D,) for place in ("pre_attention", "post_attention", "pre_ffw", "post_ffw")},
}
HUGGINGFACE = {  # of weight_names.md, section 1: path -> (name, shape in the file)
    "embedder/embedding": ("embed_tokens.weight", (V, D)),
    "final_norm/scale": ("norm.weight", (D,)),
    "layers_0/attn/q/kernel": ("layers.0.self_attn.q_proj.weight", (N * H, D)),
    "layers_0/attn/k/kernel": ("layers.0.self_attn.k_proj.weight", (K * H, D)),
    "layers_0/attn/v/kernel": ("layers.0.self_attn.v_proj.weight", (K * H, D)),
    "layers_0/attn/o/kernel": ("layers.0.self_attn.o_proj.weight", (D, N * H)),
    "layers_0/attn/q_norm/scale": ("layers.0.self_attn.q_norm.weight", (H,)),
    "layers_0/attn/k_norm/scale": ("layers.0.self_attn.k_norm.weight", (H,)),
    "layers_0/mlp/gate/kernel": ("layers.0.mlp.gate_proj.weight", (F, D)),
    "layers_0/mlp/up/kernel": ("layers.0.mlp.up_proj.weight", (F, D)),
    "layers_0/mlp/down/kernel": ("layers.0.mlp.down_proj.weight", (D, F)),
    "layers_0/pre_attention_norm/scale": ("layers.0.input_layernorm.weight", (D,)),
    "layers_0/post_attention_norm/scale": ("layers.0.post_attention_layernorm.weight", (D,)),
    "layers_0/pre_ffw_norm/scale": ("layers.0.pre_feedforward_layernorm.weight", (D,)),
    "layers_0/post_ffw_norm/scale": ("layers.0.post_feedforward_layernorm.weight", (D,)),
}


def stored(prefix: str = "model.") -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {prefix + name: generator.normal(size=shape).astype(np.float32) for name, shape in HUGGINGFACE.values()}


def read(folder: Path, tensors: dict[str, np.ndarray], shapes=SHAPES, **options) -> dict[str, np.ndarray]:
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({}))
    out = {path: np.full(shape, np.nan, np.float32) for path, shape in shapes.items()}
    with SafetensorsReader(folder) as reader:
        table = names.decoder("huggingface", 1, **options)
        assert set(names.stream(reader, table, shapes, out.__getitem__)) == set(shapes)
    return out


def test_each_weight_computes_what_the_files_matrix_does(tmp_path):
    """A kernel of ours times x is the file's matrix [out, in] times x, heads one after another."""
    tensors = stored()
    got = read(tmp_path, tensors)
    x, a, f = (np.random.default_rng(1).normal(size=n) for n in (D, N * H, F))
    for path, (name, _) in HUGGINGFACE.items():
        matrix, ours = tensors["model." + name], got[path]
        inputs = {"o": a, "down": f}.get(path.split("/")[-2], x)
        if path.endswith("kernel"):
            flat = ours.reshape(inputs.size, -1)
            np.testing.assert_allclose(inputs @ flat, matrix @ inputs, rtol=1e-6)
        else:
            np.testing.assert_array_equal(ours, matrix)


def test_a_part_of_a_larger_array_is_filled_in_place(tmp_path):
    tensors = stored()
    save_file(tensors, tmp_path / "model.safetensors")
    fused = np.zeros((D, N + 2 * K, H), np.float32)
    places = {"q": fused[:, :N], "k": fused[:, N : N + K], "v": fused[:, N + K :]}
    out = {path: np.zeros(shape, np.float32) for path, shape in SHAPES.items()}
    out |= {f"layers_0/attn/{name}/kernel": view for name, view in places.items()}
    with SafetensorsReader(tmp_path) as reader:
        list(names.stream(reader, names.decoder("huggingface", 1), SHAPES, out.__getitem__))
    stacked = np.concatenate([tensors[f"model.layers.0.self_attn.{n}_proj.weight"] for n in "qkv"])
    np.testing.assert_array_equal(fused.reshape(D, -1), stacked.T)


def test_gguf_stores_one_plus_the_scale_under_its_own_names():
    entries = {entry.path: entry for entry in names.decoder("gguf", 1).entries}
    assert set(entries) == set(SHAPES)
    assert {path for path, entry in entries.items() if entry.offset == -1} == {p for p in SHAPES if "norm" in p}
    assert entries["layers_0/attn/o/kernel"].source == "blk.0.attn_output.weight"
    assert entries["layers_0/post_ffw_norm/scale"].source == "blk.0.post_ffw_norm.weight"


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("model.layers.3.mlp.up_proj.weight", "layers.3.mlp.up_proj.weight"),
        ("layers.3.mlp.up_proj.weight", "layers.3.mlp.up_proj.weight"),
        ("language_model.model.layers.3.mlp.up_proj.weight", "layers.3.mlp.up_proj.weight"),
        ("model.language_model.layers.3.mlp.up_proj.weight", "layers.3.mlp.up_proj.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("vision_tower.vision_model.post_layernorm.weight", "vision_tower.post_layernorm.weight"),
    ],
)
def test_prefixes_of_all_releases_are_one_name(name, want):
    assert huggingface_name(name) == want


@pytest.mark.parametrize("prefix", ["", "model.", "language_model.model.", "model.language_model."])
def test_every_style_of_prefix_loads_beside_a_vision_tower(tmp_path, prefix):
    got = read(tmp_path, stored(prefix) | {"vision_tower.x": np.zeros(3, np.float32)})
    np.testing.assert_array_equal(got["final_norm/scale"], stored(prefix)[prefix + "norm.weight"])


def test_padding_rows_of_the_vocabulary_are_left_out(tmp_path):
    tensors = stored()
    padded = np.concatenate([tensors["model.embed_tokens.weight"], np.ones((64, D), np.float32)])
    got = read(tmp_path, tensors | {"model.embed_tokens.weight": padded})
    np.testing.assert_array_equal(got["embedder/embedding"], padded[:V])


def test_a_head_beside_a_tied_table_is_ignored_and_an_own_one_read(tmp_path):
    head = np.ones((V, D), np.float32)
    assert "head/embedding" not in read(tmp_path, stored() | {"lm_head.weight": head})
    shapes = SHAPES | {"head/embedding": (V, D)}
    got = read(tmp_path, stored() | {"lm_head.weight": head}, shapes, has_tied_head=False)
    np.testing.assert_array_equal(got["head/embedding"], head)


def test_all_that_does_not_fit_is_listed_at_once_before_anything_is_read(tmp_path):
    tensors = stored()
    del tensors["model.norm.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((F, D + 1), np.float32)
    tensors["model.layers.7.mlp.up_proj.weight"] = np.zeros((F, D), np.float32)
    with pytest.raises(CheckpointError) as error:
        read(tmp_path, tensors)
    text = str(error.value)
    assert "'norm.weight' is missing" in text
    assert "'model.layers.0.mlp.up_proj.weight' has shape [5, 7], but the config says [5, 6]" in text
    assert "'model.layers.7.mlp.up_proj.weight' is unknown" in text
    assert str(tmp_path) in text


def test_one_weight_under_two_names_is_refused(tmp_path):
    tensors = stored() | {"norm.weight": np.zeros(D, np.float32)}
    with pytest.raises(CheckpointError, match="the same weight"):
        read(tmp_path, tensors)
