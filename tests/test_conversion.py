"""Conversions of a tiny Gemma 3: round trips are bit-exact, and nothing is lost silently."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from orbax.checkpoint.experimental import v1 as ocp
from safetensors.numpy import load_file, save_file

import gemma_checkpoints
import gemma_jax as gj
from benchmarks.prepare_deepmind import nested
from gemma_checkpoints import CheckpointError
from gemma_checkpoints.verification import verify
from gemma_jax import conversion
from gemma_jax.configs import registry
from gemma_jax.configs.config import ConfigError
from gemma_jax.configs.gemma3 import GEMMA3_270M, five_to_one
from gemma_jax.configs.serialise import to_data
from gemma_jax.generate import embedding as vectors
from gemma_jax.nn.decoder import Decoder
from gemma_jax.nn.layers import CPU_LAYOUT
from gemma_jax.text.tokenizer import Tokenizer
from tests.vocabulary import PIECES, huggingface_data

FIXTURES = Path(__file__).parent / "fixtures"
TOKENS = [[2, 300, 17, 340, 5, 9, 9, 120]]


@pytest.fixture(scope="module")
def gemma(with_random_norms):
    """A config that GGUF can describe, every matrix of a width that its quantisations want."""
    config = GEMMA3_270M.replace_all(
        [
            ("name", "tiny"),
            ("vocab_size", len(PIECES)),
            ("width", 32),
            ("context", 256),
            ("layers", five_to_one(6, 64)),
            ("attention.num_kv_heads", 2),
            ("attention.head_dim", 16),
            ("attention.query_pre_attn_scalar", 16.0),
            ("attention.local.window", 8),
        ]
    )
    model = with_random_norms(Decoder(config, rngs=nnx.Rngs(5), dtype="bfloat16"))
    return gj.Gemma(config, model, Tokenizer.from_huggingface(huggingface_data()))


@pytest.fixture(scope="module")
def folder(gemma, tmp_path_factory):
    """The model as a Hugging Face folder in bfloat16, with a tokenizer.json. Not to be changed by tests."""
    path = tmp_path_factory.mktemp("source") / "tiny"
    gemma.save(path, format="huggingface")
    (path / "tokenizer.json").write_text(json.dumps(huggingface_data()))
    return path


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    """A random Gemma 3 with its vision tower under transformers' own names (style C); see fixtures/README.md."""
    path = tmp_path_factory.mktemp("source") / "seeing"
    path.mkdir()
    with np.load(FIXTURES / "gemma3_multimodal.npz") as file:
        config = json.loads(bytes(file["config_json"]))
        save_file({name[2:]: file[name] for name in file if name.startswith("w:")}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({**config, "model_type": "gemma3"}))
    return path


def tensors(path: Path) -> dict[str, np.ndarray]:
    return {name: array for file in path.glob("*.safetensors") for name, array in load_file(file).items()}


def test_a_saved_model_is_loaded_with_the_same_weights(gemma, folder, tmp_path):
    np.testing.assert_array_equal(gj.load(folder, dtype="bfloat16").logits(TOKENS), gemma.logits(TOKENS))
    again = gj.load(folder, dtype="float32")  # on CPU in the fused layout
    again.save(tmp_path / "again", format="huggingface", dtype="bfloat16")
    first, second = tensors(folder), tensors(tmp_path / "again")
    assert first.keys() == second.keys()
    assert all((first[name].view(np.uint16) == second[name].view(np.uint16)).all() for name in first)
    assert again.tokenizer.encode("hello world") == gemma.tokenizer.encode("hello world")


def test_fused_and_separate_weights_are_saved_alike(gemma, tmp_path):
    fused = nnx.eval_shape(lambda: Decoder(gemma.config, rngs=nnx.Rngs(0), layout=CPU_LAYOUT))
    assert any("w_qkv" in str(path) for path, _ in nnx.iter_graph(fused))  # what `load` uses on CPU
    gemma.save(tmp_path / "a.gguf", format="gguf", dtype="float32")
    gj.load(tmp_path / "a.gguf").save(tmp_path / "b.gguf", format="gguf", dtype="float32")
    with gemma_checkpoints.open(tmp_path / "a.gguf") as a, gemma_checkpoints.open(tmp_path / "b.gguf") as b:
        assert {name: a.digest(name) for name in a.tensors} == {name: b.digest(name) for name in b.tensors}


EVERY_FORMAT = ("orbax", "huggingface", "deepmind", "gguf")


def assert_same_tensors(found: Path, wanted: Path, renamed=str):
    first, second = tensors(found), {renamed(name): array for name, array in tensors(wanted).items()}
    assert first.keys() == second.keys()
    for name, array in second.items():
        assert first[name].dtype == array.dtype, name
        np.testing.assert_array_equal(first[name].view(np.uint8), array.view(np.uint8), err_msg=name)


@pytest.mark.parametrize("between", EVERY_FORMAT)
def test_text_models_come_back_bit_for_bit_through_every_format(folder, tmp_path, between):
    """The config, too: DeepMind's format has none of its own, so ours lies beside the weights."""
    dtype = "float32" if between == "gguf" else "bfloat16"  # norms are 1 + scale there
    gj.convert(folder, tmp_path / "between", to=between, dtype=dtype, verify=True)
    report = gj.convert(tmp_path / "between", tmp_path / "back", to="huggingface", dtype="bfloat16", verify=True)
    assert_same_tensors(tmp_path / "back", folder)
    assert report.left_out == ()
    assert report.logit_difference < 1e-5
    assert gj.load(tmp_path / "between").config == gj.load(folder).config.replace("name", "between")
    assert verify(tmp_path / "between").problems == ()
    assert verify(tmp_path / "between").is_sealed
    assert gj.load(tmp_path / "back").tokenizer.encode("hello world") == gj.load(folder).tokenizer.encode("hello world")


@pytest.mark.parametrize("first", EVERY_FORMAT)
@pytest.mark.parametrize("second", EVERY_FORMAT)
def test_any_two_formats_hold_the_same_weights(folder, tmp_path, first, second):
    gj.convert(folder, tmp_path / "first", to=first, dtype="float32")
    gj.convert(tmp_path / "first", tmp_path / "second", to=second, dtype="float32")
    gj.convert(tmp_path / "second", tmp_path / "back", to="huggingface", dtype="bfloat16")
    assert_same_tensors(tmp_path / "back", folder)


@pytest.mark.parametrize("between", ["orbax", "huggingface", "deepmind"])
@pytest.mark.parametrize("style", ["A", "B", "C"])
def test_multimodal_models_come_back_bit_for_bit_in_every_style(seeing, tmp_path, between, style):
    gj.convert(seeing, tmp_path / "between", to=between)
    report = gj.convert(tmp_path / "between", tmp_path / "back", to="huggingface", style=style)
    assert report.num_tensors == len(tensors(seeing))
    assert report.left_out == ()
    places = {
        "A": ("language_model.model.", "vision_tower.vision_model.", "multi_modal_projector."),
        "B": ("model.language_model.", "model.vision_tower.vision_model.", "model.multi_modal_projector."),
        "C": ("model.language_model.", "model.vision_tower.", "model.multi_modal_projector."),
    }

    def renamed(name: str) -> str:
        for old, new in zip(places["C"], places[style], strict=True):
            if name.startswith(old):
                return new + name.removeprefix(old)
        raise AssertionError(name)

    assert_same_tensors(tmp_path / "back", seeing, renamed)
    text = gj.load(tmp_path / "between")  # the decoder alone
    assert text.config == gj.load(seeing).config.replace("name", "between")
    assert conversion.verify(tmp_path / "between").problems == ()


@pytest.fixture
def seeing_as_gguf_can(seeing, tmp_path):
    """With the window's pattern and query scale that llama.cpp supplies, and a tower of whole poolings; bfloat16."""
    config = json.loads((seeing / "config.json").read_text())
    config["text_config"]["query_pre_attn_scalar"] = config["text_config"]["head_dim"]
    for key in ("image_token_index", "boi_token_index", "eoi_token_index"):
        del config[key]  # GGUF does not say them
    path = tmp_path / "plain"
    path.mkdir()
    save_file(tensors(seeing), path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    gj.convert(path, tmp_path / "half", to="huggingface", dtype="bfloat16", style="C")
    return tmp_path / "half"


def test_multimodal_models_come_back_bit_for_bit_through_two_gguf_files(seeing_as_gguf_can, tmp_path):
    gj.convert(seeing_as_gguf_can, tmp_path / "between", to="gguf", dtype="float32")
    files = {path.name for path in (tmp_path / "between").iterdir()}
    assert files == {"model.gguf", "mmproj.gguf", "gemma_jax.manifest.json"}
    assert gj.verify(tmp_path / "between").problems == ()
    report = gj.convert(tmp_path / "between", tmp_path / "back", to="huggingface", dtype="bfloat16", style="C")
    assert report.left_out == ()
    assert_same_tensors(tmp_path / "back", seeing_as_gguf_can)
    for path in ("between", "between/model.gguf"):
        text = gj.load(tmp_path / path)
        tokens = [[2, 30, 17, 40, 5, 9]]
        np.testing.assert_allclose(text.logits(tokens), gj.load(seeing_as_gguf_can).logits(tokens), atol=2e-5)


def test_a_gguf_tower_is_quantised_never_and_stands_in_its_own_file(seeing_as_gguf_can, tmp_path):
    with pytest.raises(CheckpointError, match="multiples of 32"):
        gj.convert(seeing_as_gguf_can, tmp_path / "q", to="gguf", quantize="q8_0")  # rows of 48
    gj.convert(seeing_as_gguf_can, tmp_path / "out", to="gguf")
    with gemma_checkpoints.GGUFReader(tmp_path / "out" / "mmproj.gguf") as reader:
        assert reader.metadata["general.architecture"] == "clip"
        assert reader.metadata["clip.projector_type"] == "gemma3"
        kinds = {name: info.dtype for name, info in reader.tensors.items()}
    assert {name.split(".")[0] for name in kinds} == {"v", "mm"}
    assert kinds["v.patch_embd.weight"] == kinds["mm.input_projection.weight"] == "F32"
    assert kinds["v.blk.0.attn_q.weight"] == "BF16"


def test_folders_with_other_gguf_files_are_refused(seeing_as_gguf_can, tmp_path):
    gj.convert(seeing_as_gguf_can, tmp_path / "out", to="gguf")
    shutil.copy(tmp_path / "out" / "model.gguf", tmp_path / "out" / "other.gguf")
    with pytest.raises(CheckpointError, match="2 GGUF files of models and 1 of towers"):
        gj.load(tmp_path / "out")
    for name in ("model.gguf", "other.gguf"):
        (tmp_path / "out" / name).unlink()
    with pytest.raises(CheckpointError, match="0 GGUF files of models"):
        gj.load(tmp_path / "out")


@pytest.mark.parity
def test_the_gguf_library_knows_every_name_of_the_tower(seeing_as_gguf_can, tmp_path):
    gguf = pytest.importorskip("gguf", reason="the parity extra brings the oracle")
    gj.convert(seeing_as_gguf_can, tmp_path / "out", to="gguf")
    patterns = [gguf.TENSOR_NAMES[kind] for kind in gguf.MODEL_TENSORS[gguf.MODEL_ARCH.MMPROJ]]
    known = {name.format(bid=layer) for name in patterns for layer in (0, 1)}
    with gemma_checkpoints.GGUFReader(tmp_path / "out" / "mmproj.gguf") as reader:
        assert {name.rsplit(".", 1)[0] for name in reader.tensors} <= known


@pytest.fixture(scope="module")
def embedding(tmp_path_factory):
    """A random EmbeddingGemma as sentence-transformers keeps it, under transformers' names without prefix."""
    path = tmp_path_factory.mktemp("source") / "embedding"
    path.mkdir()
    with np.load(FIXTURES / "embeddinggemma.npz") as file:
        config = json.loads(bytes(file["config_json"]))
        save_file({name[2:]: file[name] for name in file if name.startswith("w:")}, path / "model.safetensors")
        dense = [file["x:dense2"], file["x:dense3"]]
    (path / "config.json").write_text(json.dumps({**config, "model_type": "gemma3_text"}))
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense"), ("3_Dense", "Dense")]
    kinds = [{"path": room, "type": f"sentence_transformers.models.{kind}"} for room, kind in modules]
    (path / "modules.json").write_text(json.dumps(kinds))
    for room in ("1_Pooling", "2_Dense", "3_Dense"):
        (path / room).mkdir()
    (path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    for room, weight in zip(("2_Dense", "3_Dense"), dense, strict=True):
        save_file({"linear.weight": weight}, path / room / "model.safetensors")
        values = {"in_features": weight.shape[1], "out_features": weight.shape[0], "bias": False}
        (path / room / "config.json").write_text(json.dumps(values))
    return path


def with_modules(path: Path) -> dict[str, np.ndarray]:
    files = sorted(path.rglob("*.safetensors"))
    return {
        f"{file.parent.name if file.parent != path else ''}/{n}": a
        for file in files
        for n, a in load_file(file).items()
    }


@pytest.mark.parametrize("between", ["orbax", "huggingface", "gguf"])
def test_embedding_models_come_back_bit_for_bit_with_their_dense_layers(embedding, tmp_path, between):
    gj.convert(embedding, tmp_path / "between", to=between)
    report = gj.convert(tmp_path / "between", tmp_path / "back", to="huggingface", verify=True)
    found, wanted = with_modules(tmp_path / "back"), with_modules(embedding)
    assert found.keys() == wanted.keys()
    assert report.num_tensors == len(wanted) == 7 * 13 + 2 + 2
    for name, array in wanted.items():
        if between == "gguf" and array.ndim == 1:  # 1 + scale in float32
            np.testing.assert_allclose(found[name], array, atol=2e-7)
        else:
            np.testing.assert_array_equal(found[name], array, err_msg=name)
    modules = json.loads((tmp_path / "back" / "modules.json").read_text())
    assert [module["path"] for module in modules][:4] == ["", "1_Pooling", "2_Dense", "3_Dense"]
    assert json.loads((tmp_path / "back" / "2_Dense" / "config.json").read_text())["out_features"] == 64
    assert verify(tmp_path / "back").problems == ()


def test_the_decoder_of_an_embedding_model_computes_what_transformers_does(embedding):
    with np.load(FIXTURES / "embeddinggemma.npz") as file:
        tokens, mask, wanted = file["x:input_ids"], file["x:mask"].astype(bool), file["x:last_hidden"]
    gemma = gj.load(embedding)
    assert not gemma.config.attention.is_causal
    found = np.asarray(gemma.hidden_states(tokens, mask=mask))[-1]
    np.testing.assert_allclose(found[mask], wanted[mask], atol=5e-5)


def test_embeddings_are_transformers(embedding):
    with np.load(FIXTURES / "embeddinggemma.npz") as file:
        tokens, mask, wanted = file["x:input_ids"], file["x:mask"].astype(bool), file["x:embedding"]
    gemma = gj.load(embedding)
    rows = [row[real].tolist() for row, real in zip(tokens, mask, strict=True)]
    found = vectors.embed(gemma.model, rows, 48)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    np.testing.assert_allclose(vectors.embed(gemma.model, rows[:1], 48)[0], found[0], atol=1e-5)
    short = vectors.embed(gemma.model, rows, 8)
    np.testing.assert_allclose(np.linalg.norm(short, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(short, wanted[:, :8] / np.linalg.norm(wanted[:, :8], axis=1, keepdims=True), atol=1e-5)
    with pytest.raises(ValueError, match="so it continues no text; it makes embeddings"):
        gemma.generate([2, 5])


def test_deepmind_has_no_place_for_dense_layers(embedding, tmp_path):
    with pytest.raises(ConfigError, match="deepmind has no place for dense_0/kernel"):
        gj.convert(embedding, tmp_path / "out", to="deepmind")


@pytest.mark.parametrize(
    ("file", "change", "error"),
    [
        ("modules.json", '[{"path": "../outside", "type": "x"}]', "'../outside', which is not a folder"),
        ("modules.json", '{"path": 3}', "no list of modules"),
        ("modules.json", "[", "no list of modules"),
        ("2_Dense/config.json", '{"out_features": 64, "bias": true}', "has a bias or an activation"),
        ("2_Dense/config.json", '{"out_features": "64"}', "out_features '64'"),
        (
            "2_Dense/config.json",
            '{"out_features": 63}',
            r"'2_Dense/linear.weight' has shape \[64, 48\], but the config",
        ),
        ("1_Pooling/config.json", '{"pooling_mode_mean_tokens": false}', "does not pool by the mean"),
    ],
)
def test_modules_that_are_not_embeddinggemmas_are_refused(embedding, tmp_path, file, change, error):
    shutil.copytree(embedding, tmp_path / "hurt")
    (tmp_path / "hurt" / file).write_text(change)
    with pytest.raises((CheckpointError, ConfigError), match=error):
        gj.convert(tmp_path / "hurt", tmp_path / "out", to="orbax")


@pytest.mark.parametrize("style", ["A", "B"])
def test_shieldgemma_wraps_all_names_once_more(seeing, tmp_path, style):
    gj.convert(seeing, tmp_path / "plain", to="huggingface", style=style)
    wrapped = tmp_path / "wrapped"
    wrapped.mkdir()
    save_file(
        {f"model.{name}": array for name, array in tensors(tmp_path / "plain").items()}, wrapped / "a.safetensors"
    )
    (wrapped / "config.json").write_bytes((tmp_path / "plain" / "config.json").read_bytes())
    gj.convert(wrapped, tmp_path / "back", to="huggingface", style="C")
    assert_same_tensors(tmp_path / "back", seeing)


@pytest.mark.parametrize("layout", ["nested", "flat", "stacked", "training"])
@pytest.mark.parametrize("has_config", [True, False])
def test_every_layout_of_deepmind_is_read(gemma, folder, tmp_path, monkeypatch, layout, has_config):
    """The trees are made from Hugging Face's matrices by code that is not the converter's."""
    source = {name: array.astype(np.float32) for name, array in tensors(folder).items()}
    attention = gemma.config.attention
    tree = nested(source, attention.num_heads, attention.num_kv_heads, gemma.config.num_layers)
    if layout in ("flat", "stacked"):
        tree = flat(tree)
    if layout == "stacked":
        tree = stacked(tree, period=6)
    if layout == "training":
        tree = {"params": tree, "step": np.array(3), "opt_state": {"m": np.zeros(2, np.float32)}, "collections": {}}
    ocp.save(str(tmp_path / "theirs"), tree)
    if has_config:
        (tmp_path / "theirs" / "gemma_jax.json").write_text(json.dumps(to_data(gemma.config)))
    else:  # it is known by its shapes
        monkeypatch.setitem(registry._MODELS, "tiny", gemma.config)
    loaded = gj.load(tmp_path / "theirs")
    assert loaded.config.replace("name", "tiny") == gemma.config
    wanted = gj.load(folder).logits(TOKENS)
    np.testing.assert_array_equal(np.asarray(loaded.logits(TOKENS)), np.asarray(wanted))


def flat(tree: dict) -> dict:
    """weight_names.md, section 6: slash paths, each with a small dict; ffw leaves get a "w"."""
    out: dict = {}

    def walk(node: dict, path: str) -> None:
        for key, value in node.items():
            if isinstance(value, dict):
                walk(value, f"{path}/{key}")
            elif path.endswith("/mlp"):
                out[f"{path}/{key}"] = {"w": value}
            else:
                out.setdefault(path, {})[key] = value

    walk(tree, "transformer")
    return out


def stacked(tree: dict, period: int) -> dict:
    out: dict = {}
    layers: dict = {}
    for path, leaves in tree.items():
        parts = path.split("/")
        if not parts[1].startswith("layer_"):
            out[path] = leaves
            continue
        row, kind = divmod(int(parts[1].removeprefix("layer_")), period)
        key = "/".join(["transformer", "stacked_layers", f"attention_type_{kind}", *parts[2:]])
        for leaf, value in leaves.items():
            layers.setdefault(key, {}).setdefault(leaf, {})[row] = value
    for key, leaves in layers.items():
        out[key] = {leaf: np.stack([rows[row] for row in sorted(rows)]) for leaf, rows in leaves.items()}
    return out


def test_a_checkpoint_of_deepminds_that_is_no_published_model_says_what_to_do(folder, tmp_path):
    gj.convert(folder, tmp_path / "theirs", to="deepmind")
    (tmp_path / "theirs" / "gemma_jax.json").unlink()
    (tmp_path / "theirs" / "gemma_jax.manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds no config.*no published model.*gemma_jax.json"):
        gj.load(tmp_path / "theirs")


def test_an_ablation_that_no_other_format_describes_survives_in_orbax(gemma, tmp_path):
    config = gemma.config.replace_all(
        [("layers.1.is_local", False), ("layers.2.ffw_width", 96), ("attention.has_qk_norm", False), ("period", 6)]
    )
    odd = gj.Gemma(config, Decoder(config, rngs=nnx.Rngs(0)), gemma.tokenizer)
    odd.save(tmp_path / "odd")
    again = gj.load(tmp_path / "odd")
    assert again.config == config.replace("name", "odd")
    np.testing.assert_allclose(again.logits(TOKENS), odd.logits(jnp.asarray(TOKENS)), atol=1e-5)
    with pytest.raises(ConfigError, match="ffw_width"):
        gj.convert(tmp_path / "odd", tmp_path / "out.gguf", to="gguf")


def test_a_tensor_that_no_table_knows_is_an_error(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "more")
    (tmp_path / "more" / "gemma_jax.manifest.json").unlink()
    save_file(tensors(folder) | {"model.layers.0.adapter.weight": np.ones(3)}, tmp_path / "more" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'model.layers.0.adapter.weight' is unknown"):
        gj.convert(tmp_path / "more", tmp_path / "out", to="orbax")
    found = conversion.verify(tmp_path / "more")
    assert "'model.layers.0.adapter.weight' is unknown" in found.problems[0]


def test_the_dtype_is_the_sources_unless_told(folder, tmp_path):
    gj.convert(folder, tmp_path / "same", to="huggingface")
    assert {array.dtype for array in tensors(tmp_path / "same").values()} == {np.dtype(ml_dtypes.bfloat16)}
    gj.convert(folder, tmp_path / "wide", to="huggingface", dtype="float32")
    assert {array.dtype for array in tensors(tmp_path / "wide").values()} == {np.dtype(np.float32)}
    gj.convert(folder, tmp_path / "m.gguf", to="gguf")
    with gemma_checkpoints.open(tmp_path / "m.gguf") as reader:
        assert {info.dtype for info in reader.tensors.values() if len(info.shape) == 2} == {"BF16"}
        assert {info.dtype for info in reader.tensors.values() if len(info.shape) == 1} == {"F32"}
    assert (tmp_path / "same" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(("quantize", "step"), [("q8_0", 0.5 / 127), ("q4_0", 1 / 8)])
def test_quantised_weights_are_within_a_step_and_say_so(folder, tmp_path, quantize, step):
    """Half a step of Q8_0; a whole one of Q4_0, whose largest positive value has no code of its own."""
    report = gj.convert(folder, tmp_path / "m.gguf", to="gguf", quantize=quantize, verify=True)
    assert report.logit_difference > 0
    with gemma_checkpoints.open(tmp_path / "m.gguf") as reader, gemma_checkpoints.open(folder) as source:
        kinds = {name: info.dtype for name, info in reader.tensors.items()}
        found = reader.read("blk.0.attn_q.weight")
        wanted = source.read("model.layers.0.self_attn.q_proj.weight")
    assert kinds["blk.0.attn_q.weight"] == quantize.upper()
    assert kinds["token_embd.weight"] == "Q8_0"
    assert kinds["output_norm.weight"] == "F32"
    largest = np.abs(wanted.reshape(-1, 32)).max(axis=1, keepdims=True)
    error = np.abs(found - wanted).reshape(-1, 32)
    assert (error <= 1.001 * (step + 2**-11) * largest).all()  # the scale is rounded to 11 bits
    assert error.max() > 0.1 * step * largest.max()


def test_a_vision_tower_is_never_dropped_silently(seeing_as_gguf_can, tmp_path):
    with pytest.raises(CheckpointError, match="two GGUF files, a model and its tower: name a folder"):
        gj.convert(seeing_as_gguf_can, tmp_path / "out.gguf", to="gguf")
    assert not (tmp_path / "out.gguf").exists()
    report = gj.convert(seeing_as_gguf_can, tmp_path / "out", to="huggingface", text_only=True)
    source = tensors(seeing_as_gguf_can)
    assert set(report.left_out) == {name for name in source if "vision" in name or "multi_modal" in name}
    assert len(tensors(tmp_path / "out")) == len(source) - len(report.left_out)
    gj.convert(seeing_as_gguf_can, tmp_path / "out.gguf", to="gguf", text_only=True)


def test_verification_finds_a_flipped_bit(folder, tmp_path, monkeypatch):
    real_exit = gemma_checkpoints.GGUFWriter.__exit__

    def exit_and_damage(self, *error):
        real_exit(self, *error)
        data = bytearray(self.destination.read_bytes())
        data[-100] ^= 16
        self.destination.write_bytes(data)

    monkeypatch.setattr(gemma_checkpoints.GGUFWriter, "__exit__", exit_and_damage)
    with pytest.raises(CheckpointError, match="does not hold what was written"):
        gj.convert(folder, tmp_path / "m.gguf", to="gguf", verify=True)


def test_bad_requests_are_refused_before_anything_is_written(gemma, folder, tmp_path):
    target = tmp_path / "out"
    with pytest.raises(ValueError, match=r"dtype is 'float16'.*65504"):
        gj.convert(folder, target, to="gguf", dtype="float16")
    with pytest.raises(ValueError, match="quantize is 'q2_k'"):
        gj.convert(folder, target, to="gguf", quantize="q2_k")
    with pytest.raises(ValueError, match="only GGUF holds quantised"):
        gj.convert(folder, target, to="huggingface", quantize="q8_0")
    with pytest.raises(ValueError, match="the format is 'onnx'; wanted 'orbax' or 'huggingface' or"):
        gj.convert(folder, target, to="onnx")
    with pytest.raises(FileExistsError):
        gj.convert(folder, tmp_path, to="gguf")
    with pytest.raises(FileNotFoundError):
        gj.convert(tmp_path / "nowhere", target, to="gguf")
    mixed = gemma.config.replace("layers.3.ffw_width", 96)
    with pytest.raises(ConfigError, match=r"layers.3.ffw_width is 96; it would be read as 64"):
        gj.Gemma(mixed, Decoder(mixed, rngs=nnx.Rngs(0))).save(target, format="gguf")
    small = gemma.config.replace("vocab_size", 100)
    with pytest.raises(ConfigError, match=f"vocab_size is 100, but the tokenizer has {len(PIECES)} pieces"):
        gj.Gemma(small, Decoder(small, rngs=nnx.Rngs(0)), gemma.tokenizer).save(target, format="gguf")
    assert not list(tmp_path.iterdir())


def test_a_model_without_tokenizer_is_saved_without_one(gemma, tmp_path):
    bare = gj.Gemma(gemma.config, gemma.model)
    for kind, name in (("gguf", "m.gguf"), ("huggingface", "m")):
        bare.save(tmp_path / name, format=kind)
        again = gj.load(tmp_path / name, dtype="bfloat16")
        assert again.tokenizer is None
        np.testing.assert_allclose(again.logits(TOKENS), gemma.logits(jnp.asarray(TOKENS)), atol=0.05)
