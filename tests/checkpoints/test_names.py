import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from gemma_checkpoints import CheckpointError, families
from gemma_checkpoints.families import DecoderSizes, SiglipSizes, deepmind_name, huggingface_name
from gemma_checkpoints.names import Assembly, Entry, Weights
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


def table(format="huggingface", tower=None, style=None, **options):
    return families.gemma(format, DecoderSizes(V, D, N, K, H, (F,), **options), tower, style=style)


def read(folder: Path, tensors: dict[str, np.ndarray], shapes=SHAPES, **options) -> dict[str, np.ndarray]:
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({}))
    out = {path: np.full(shape, np.nan, np.float32) for path, shape in shapes.items()}
    with SafetensorsReader(folder) as reader:
        weights = Weights(reader, table(**options))
        assert set(weights.paths()) == set(shapes)
        for path in weights.paths():
            weights.read(path, out[path])
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
        weights = Weights(reader, table())
        for path, array in out.items():
            weights.read(path, array)
    stacked = np.concatenate([tensors[f"model.layers.0.self_attn.{n}_proj.weight"] for n in "qkv"])
    np.testing.assert_array_equal(fused.reshape(D, -1), stacked.T)


@pytest.mark.parametrize(
    ("path", "region"),
    [
        ("layers_0/attn/q/kernel", (slice(1, 5), slice(2, 4), slice(0, H))),  # heads: rows of the file
        ("layers_0/attn/q/kernel", (slice(0, D), slice(1, 3), slice(1, 2))),  # parts of heads: not one region there
        ("layers_0/attn/o/kernel", (slice(3, 4), slice(0, H), slice(2, 5))),
        ("layers_0/mlp/down/kernel", (slice(2, 4), slice(0, D))),
        ("embedder/embedding", (slice(7, 11), slice(3, 6))),
        ("final_norm/scale", (slice(2, 5),)),
    ],
)
def test_a_region_is_what_the_whole_has_there(tmp_path, path, region):
    whole = read(tmp_path, stored())[path]
    out = np.full([part.stop - part.start for part in region], np.nan, np.float32)
    with SafetensorsReader(tmp_path) as reader:
        Weights(reader, table()).read(path, out, region)
    np.testing.assert_array_equal(out, whole[region])


def test_a_sharded_read_touches_only_its_own_rows(tmp_path, monkeypatch):
    save_file(stored(), tmp_path / "model.safetensors")
    with SafetensorsReader(tmp_path) as reader:
        weights, real, read_bytes = Weights(reader, table()), reader._bytes, []
        monkeypatch.setattr(reader, "_bytes", lambda info, at, count: read_bytes.append(count) or real(info, at, count))
        weights.read("layers_0/attn/q/kernel", np.empty((D, 1, H)), (slice(0, D), slice(2, 3), slice(0, H)))
    assert sum(read_bytes) == H * D * 4


@given(st.data())
def test_any_region_of_any_arrangement_is_read_right(data):
    """Against numpy's own transpose and reshape."""
    ours = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    letters = [f"d{i}" for i in range(len(ours))]
    cuts = sorted(data.draw(st.sets(st.integers(1, len(ours) - 1)))) if len(ours) > 1 else []
    groups = data.draw(st.permutations([letters[a:b] for a, b in zip([0, *cuts], [*cuts, len(ours)], strict=True)]))
    order = [name for group in groups for name in group]
    axes = f"{' '.join(letters)} -> {' '.join('(' + ' '.join(group) + ')' for group in groups)}"
    entry = Entry("x", ours, "x", axes)
    array = np.arange(np.prod(ours)).reshape(ours)
    file = array.transpose([letters.index(name) for name in order]).reshape(
        [int(np.prod([ours[letters.index(name)] for name in group])) for group in groups]
    )
    assert entry.source_shape == file.shape
    np.testing.assert_array_equal(entry.source_view(array), file)
    region = tuple(slice(a, data.draw(st.integers(a + 1, n))) for n in ours for a in [data.draw(st.integers(0, n - 1))])
    around, start = entry.source_region(region)
    assert all(a.start <= r.start and r.stop <= a.stop for a, r in zip(around, region, strict=True))
    got = np.empty([part.stop - part.start for part in around], array.dtype)
    view = entry.source_view(got)
    view[...] = file[tuple(slice(first, first + size) for first, size in zip(start, view.shape, strict=True))]
    np.testing.assert_array_equal(got, array[around])


def test_gguf_stores_one_plus_the_scale_under_its_own_names():
    entries = {entry.path: entry for entry in table("gguf").entries}
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
    assert huggingface_name("model." * 200_000 + name) == want  # at once, however often
    assert huggingface_name(name) == want


@pytest.mark.parametrize(
    ("style", "embedding", "patch", "projection", "head"),
    [  # weight_names.md, section 3
        ("A", "language_model.model.embed_tokens.weight", "vision_tower.vision_model.embeddings.patch_embedding.bias",
         "multi_modal_projector.mm_input_projection_weight", "language_model.lm_head.weight"),
        ("B", "model.language_model.embed_tokens.weight",
         "model.vision_tower.vision_model.embeddings.patch_embedding.bias",
         "model.multi_modal_projector.mm_input_projection_weight", "lm_head.weight"),
        ("C", "model.language_model.embed_tokens.weight", "model.vision_tower.embeddings.patch_embedding.bias",
         "model.multi_modal_projector.mm_input_projection_weight", "lm_head.weight"),
    ],
)  # fmt: skip
def test_each_style_writes_the_prefixes_of_its_releases(style, embedding, patch, projection, head):
    made = table(tower=SiglipSizes(1, 4, 2, 5, 7, 9), style=style, has_tied_head=False)
    written = {entry.path: made.written(entry.source) for entry in made.entries}
    assert written["embedder/embedding"] == embedding
    assert written["vision/patch/bias"] == patch
    assert written["mm/proj/kernel"] == projection
    assert written["head/embedding"] == head
    assert all(made.normalised(made.written(entry.source)) == entry.source for entry in made.entries)


def test_an_unknown_style_is_refused():
    with pytest.raises(ValueError, match="style of prefixes is 'D'; wanted text, bare, A, B, C"):
        table(style="D")


@pytest.mark.parametrize(
    ("name", "want"),
    [  # weight_names.md, section 6
        ("transformer/layer_0/mlp/gating_einsum/w", "layer_0/mlp/gating_einsum"),
        ("layer_0/mlp/linear", "layer_0/mlp/linear"),
        ("transformer/layer_0/attn/q_einsum/w", "layer_0/attn/q_einsum/w"),
        ("rlx_networks/policy_network/transformer/final_norm/scale", "final_norm/scale"),
        ("params/embedder/input_embedding", "embedder/input_embedding"),
        ("SigLiPFromPatches_0/siglip_encoder/pos_embedding", "vision_encoder/siglip_encoder/pos_embedding"),
    ],
)
def test_all_layouts_of_deepmind_are_one_name(name, want):
    assert deepmind_name(name) == want


def test_weights_that_share_a_tensor_are_put_together_in_any_order():
    assembly = Assembly(table("deepmind"))
    k, v = np.random.default_rng(0).normal(size=(2, D, K, H))
    assert list(assembly.add("layers_0/attn/v/kernel", v)) == []
    ((name, whole),) = assembly.add("layers_0/attn/k/kernel", k)
    assert name == "layer_0/attn/kv_einsum/w"
    np.testing.assert_array_equal(whole, np.stack([k.transpose(1, 0, 2), v.transpose(1, 0, 2)]))


def test_stacked_layers_are_rows_of_their_attention_type():
    sizes = DecoderSizes(V, D, N, K, H, (F,) * 5)
    made = families.stacked(families.gemma("deepmind", sizes), 2)
    entries = {entry.path: entry for entry in made.entries}
    assert entries["final_norm/scale"].stack == ()
    v = entries["layers_3/attn/v/kernel"]
    assert v.source == "stacked_layers/attention_type_1/attn/kv_einsum/w"
    assert (v.index, v.stack, v.source_shape) == ((1, 1), (2, 2), (2, 2, K, D, H))
    assert entries["layers_4/mlp/down/kernel"].stack == (3,)


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
