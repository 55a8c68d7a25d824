"""Checkpoints of Gemma 3n: names, shapes and transforms against independent sources; round trips bit for bit."""

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import gemma_checkpoints
import gemma_jax as gj
from gemma_checkpoints import CheckpointError
from gemma_checkpoints.names import Weights
from gemma_checkpoints.safetensors import SafetensorsReader
from gemma_jax import configs, export
from gemma_jax.configs import huggingface_3n
from gemma_jax.configs.config import ConfigError
from gemma_jax.configs.gguf import from_gguf, to_gguf
from gemma_jax.configs.huggingface import from_huggingface, to_huggingface
from gemma_jax.configs.towers import AudioConfig, ConvBlock, MobileNetConfig
from gemma_jax.loading import read_config

FIXTURES = Path(__file__).parent / "fixtures"
NO_TOWERS = [("vision", None), ("audio", None)]


def fixture(name: str) -> tuple[dict, dict[str, np.ndarray]]:
    """The config and the weights of a fixture under the reference library's names."""
    with np.load(FIXTURES / f"{name}.npz") as file:
        weights = {key[2:]: file[key] for key in file if key.startswith("w:")}
        return json.loads(bytes(file["config_json"])), weights


def tiny_tower() -> MobileNetConfig:
    """The architecture of the timm fixture, from its own strings: kind_r1_a(start)_k(mid)_s(stride)_e(xpansion)_c."""
    data, _ = fixture("mobilenetv5_tiny")

    def block(text: str) -> ConvBlock:
        kind, *parts = text.split("_")
        values = {part[0]: int(part[1:]) for part in parts}
        common = {"width": values["c"], "stride": values["s"]}
        if kind == "mqa":
            shrinks = values.get("v", 1) == 2
            heads = {"num_heads": values["h"], "head_dim": values["d"], "key_kernel": values.get("k", 0) * shrinks}
            return ConvBlock(kind="attention", **common, **heads)
        if kind == "er":
            return ConvBlock(kind="edge", **common, kernel=values["k"], expansion=values["e"])
        return ConvBlock(kind="inverted", **common, start_kernel=values["a"], kernel=values["k"], expansion=values["e"])

    stages = tuple(tuple(block(text) for text in stage) for stage in data["arch"])
    return MobileNetConfig(stages=stages, stem_width=data["stem"], width=data["msfa_out"], num_hard_tokens=8)


@pytest.fixture
def small_tower(monkeypatch):
    """The published tower has 294 million parameters; here files mean the fixture's."""
    tower = tiny_tower()
    monkeypatch.setattr(huggingface_3n, "MOBILENET_V5_300M", tower)
    return tower


@pytest.fixture
def folder(tmp_path, small_tower):
    """A whole random 3n as a Hugging Face folder: transformers' weights, timm's tower, the keys that nobody reads."""
    data, weights = fixture("gemma3n_multimodal")
    _, tower = fixture("mobilenetv5_tiny")
    weights |= {f"model.vision_tower.timm_model.{name}": array for name, array in tower.items()}
    random = np.random.default_rng(0)
    wide = {  # the two fixtures' widths differ
        "embed_vision.embedding.weight": (8, 2048),
        "embed_vision.hard_embedding_norm.weight": (2048,),
        "embed_vision.soft_embedding_norm.weight": (2048,),
        "embed_vision.embedding_projection.weight": (48, 2048),
    }
    weights |= {f"model.{name}": random.normal(size=shape).astype(np.float32) for name, shape in wide.items()}
    path = tmp_path / "3n"
    path.mkdir()
    save_file(weights, path / "model.safetensors")
    config = {
        "model_type": "gemma3n",
        "text_config": {**data["text"], "model_type": "gemma3n_text"},
        "vision_config": {**data["vision"], "hidden_size": 2048},
        "audio_config": data["audio"],
    }
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture
def text_folder(tmp_path):
    """Only the text part, as its own model type; with widths that GGUF can say."""
    data, weights = fixture("gemma3n_multimodal")
    path = tmp_path / "text"
    path.mkdir()
    prefix = "model.language_model."
    text = {name.replace(prefix, "model."): array for name, array in weights.items() if name.startswith(prefix)}
    random = np.random.default_rng(1)
    for name in [name for name in text if ".laurel.linear_" in name]:
        rank, width = 64, 48
        shape = (rank, width) if name.endswith("left.weight") else (width, rank)
        text[name] = random.normal(size=shape).astype(np.float32)
    table = "model.embed_tokens_per_layer.weight"
    text[table] = random.normal(size=(106, text[table].shape[1])).astype(np.float32)
    save_file(text, path / "model.safetensors")
    config = {**data["text"], "model_type": "gemma3n_text", "laurel_rank": 64, "vocab_size_per_layer_input": 106}
    (path / "config.json").write_text(json.dumps(config))
    return path


def tensors(path: Path) -> dict[str, np.ndarray]:
    return {name: array for file in path.glob("*.safetensors") for name, array in load_file(file).items()}


def assert_same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name].view(np.uint32), array.view(np.uint32), err_msg=name)


@pytest.mark.parametrize(("name", "text"), [("gemma-3n-e4b", 6_866_696_688), ("gemma-3n-e2b", 4_456_156_768)])
def test_every_part_has_the_parameters_of_the_specification(name, text):
    """gemma3n.md, section 1: with the 256 spare rows, and without the unused keys of the layers that share."""
    config = configs.get(name)
    counts: Counter[str] = Counter()
    for entry in export.table("huggingface", config).entries:
        room = entry.path.split("/")[0]
        counts[room if room in ("vision", "mm", "audio", "audio_mm") else "text"] += math.prod(entry.written_shape)
    unused = sum(spec.kv_source is not None for spec in config.layers) * 2_097_408
    assert counts.pop("text") == text - unused
    assert counts == {"vision": 294_126_912, "mm": 4_460_544, "audio": 681_348_640, "audio_mm": 3_345_408}


def test_deepminds_library_has_the_same_tree():
    """Names and shapes of its Gemma3n_E2B, initialised (version 4.0.1): all but four layers left out."""
    listing = json.loads((FIXTURES / "deepmind_gemma3n_e2b.json").read_text())
    wanted = {name: tuple(shape) for name, shape in listing.items()}
    table = export.table("deepmind", configs.get("gemma-3n-e2b").replace_all(NO_TOWERS))
    found = {entry.source: entry.source_shape for entry in table.entries}
    layers = {name.split("/")[0] for name in wanted if name.startswith("layer_")}
    kept = [name for name in found if not name.startswith("layer_") or name.split("/")[0] in layers]
    assert {name: found[name] for name in kept} == wanted


def test_text_and_audio_have_transformers_names_and_shapes(small_tower):
    data, weights = fixture("gemma3n_multimodal")
    config = from_huggingface(
        {
            "model_type": "gemma3n",
            "text_config": data["text"],
            "vision_config": data["vision"],
            "audio_config": data["audio"],
        }
    )
    table = export.table("huggingface", config)
    ours = {table.written(entry.source): entry.source_shape for entry in table.entries}
    assert {name: shape for name, shape in ours.items() if "timm_model" not in name} == {
        name: array.shape for name, array in weights.items()
    }


def test_the_vision_tower_has_timms_names_and_shapes():
    config = configs.get("gemma-3n-e2b").replace_all([("vision", tiny_tower()), ("audio", None)])
    table = export.table("huggingface", config)
    prefix = "model.vision_tower.timm_model."
    entries = [entry for entry in table.entries if entry.path.startswith("vision/")]
    ours = {table.written(entry.source): entry.source_shape for entry in entries}
    assert ours == {prefix + name: array.shape for name, array in fixture("mobilenetv5_tiny")[1].items()}


@pytest.mark.parity
def test_the_gguf_library_knows_every_name():
    gguf = pytest.importorskip("gguf", reason="the parity extra brings the oracle")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3N, 30).mapping
    config = configs.get("gemma-3n-e2b").replace_all(NO_TOWERS)
    theirs = {entry.path: entry.source for entry in export.table("huggingface", config).entries}
    stacked = {"altup_projections": "altup_proj.weight", "altup_unembed_projections": "altup_unembd_proj.weight"}
    for entry in export.table("gguf", config).entries:
        source = theirs[entry.path]
        stem, _, suffix = source.rpartition(".") if source.endswith(".weight") else (source, "", "weight")
        if stem.split(".")[0] in stacked:
            assert entry.source == stacked[stem.split(".")[0]]
            continue
        key = f"model.{stem}" if not stem.startswith("lm_head") else stem
        assert names[key][1] + f".{suffix}" == entry.source, source


def test_every_transform_is_that_of_the_specification(folder):
    """weight_names.md, sections 4 and 5, element by element; not by our own way back."""
    source = tensors(folder)
    with SafetensorsReader(folder) as reader:
        config = from_huggingface(reader.metadata)
        weights = Weights(reader, export.table("huggingface", config))

        def read(path: str) -> np.ndarray:
            out = np.full(weights.entries[path].shape, np.nan, np.float32)
            weights.read(path, out)
            return out

        text, tower, audio = "model.language_model.", "model.vision_tower.timm_model.", "model.audio_tower."
        width = 8
        per_layer = source[f"{text}embed_tokens_per_layer.weight"]
        for layer in (0, 7):
            columns = per_layer[:, layer * width : (layer + 1) * width]
            np.testing.assert_array_equal(read("embedder/ple")[:, layer], columns)
            rows = source[f"{text}per_layer_model_projection.weight"][layer * width : (layer + 1) * width]
            np.testing.assert_array_equal(read("ple_proj/kernel")[:, layer], rows.T)
        prediction = source[f"{text}layers.3.altup.prediction_coefs.weight"]  # [16, 4]
        for p in range(4):
            np.testing.assert_array_equal(read("layers_3/altup/prediction")[p], prediction[:, p].reshape(4, 4))
        np.testing.assert_array_equal(
            read("layers_3/altup/correction"), source[f"{text}layers.3.altup.correction_coefs.weight"].T
        )
        np.testing.assert_array_equal(read("altup_proj_1/kernel"), source[f"{text}altup_projections.1.weight"].T)
        kernel = source[f"{tower}blocks.0.0.conv_exp.weight"]
        np.testing.assert_array_equal(read("vision/blocks_0_0/expand/kernel"), kernel.transpose(2, 3, 1, 0))
        kernel = source[f"{tower}blocks.1.0.dw_start.conv.weight"]
        np.testing.assert_array_equal(read("vision/blocks_1_0/start/kernel"), kernel.transpose(2, 3, 1, 0))
        depthwise = source[f"{audio}conformer.1.lconv1d.depthwise_conv1d.weight"]
        np.testing.assert_array_equal(read("audio/conf_1/lconv/dw"), depthwise[:, 0, :].T)
        heads = source[f"{audio}conformer.2.attention.attn.relative_position_embedding.pos_proj.weight"]
        np.testing.assert_array_equal(read("audio/conf_2/attn/pos/kernel"), heads.T.reshape(32, 4, 8))
        post = source[f"{audio}conformer.2.attention.post.weight"]
        np.testing.assert_array_equal(read("audio/conf_2/attn/o/kernel"), post.T.reshape(4, 8, 32))


@pytest.mark.parametrize("between", ["orbax", "huggingface"])
def test_whole_models_come_back_bit_for_bit(folder, tmp_path, between):
    gj.convert(folder, tmp_path / "between", to=between)
    report = gj.convert(tmp_path / "between", tmp_path / "back", to="huggingface")
    assert_same(tensors(tmp_path / "back"), tensors(folder))
    assert report.left_out == ()
    assert gj.verify(tmp_path / "between").problems == ()
    files = (path / "config.json" for path in (folder, tmp_path / "back"))
    first, second = (from_huggingface(json.loads(file.read_text())) for file in files)
    assert first == second


@pytest.mark.parametrize("between", ["orbax", "huggingface", "deepmind", "gguf"])
def test_text_models_come_back_bit_for_bit_through_every_format(text_folder, tmp_path, between):
    gj.convert(text_folder, tmp_path / "between", to=between)
    report = gj.convert(tmp_path / "between", tmp_path / "back", to="huggingface")
    assert_same(tensors(tmp_path / "back"), tensors(text_folder))
    assert report.left_out == ()
    assert gj.verify(tmp_path / "between").problems == ()


def test_the_text_part_of_a_whole_model_is_taken_when_asked(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"deepmind has no place for vision/.*text_only"):
        gj.convert(folder, tmp_path / "out", to="deepmind")
    report = gj.convert(folder, tmp_path / "out", to="huggingface", text_only=True)
    towers = ("vision_tower", "audio_tower", "embed_vision", "embed_audio")
    assert set(report.left_out) == {name for name in tensors(folder) if name.split(".")[1] in towers}
    assert set(tensors(tmp_path / "out")) == {
        name.replace("language_model.", "") for name in tensors(folder) if name.split(".")[1] == "language_model"
    }


def test_keys_that_no_layer_reads_are_left_out_and_others_are_unknown(text_folder, tmp_path):
    """Released files hold keys and values of the layers that share others'."""
    whole = tensors(text_folder)
    names = [f"model.layers.{i}.self_attn.{part}.weight" for i in (8, 11) for part in ("k_proj", "v_proj", "k_norm")]
    unused = {name: np.ones((2, 2), np.float32) for name in names}
    save_file(whole | unused, text_folder / "model.safetensors")
    gj.convert(text_folder, tmp_path / "out", to="huggingface")
    assert_same(tensors(tmp_path / "out"), whole)
    save_file(whole | {"model.layers.12.self_attn.k_proj.weight": np.ones(2)}, text_folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'model.layers.12.self_attn.k_proj.weight' is unknown"):
        gj.convert(text_folder, tmp_path / "more", to="huggingface")


def test_gguf_files_hold_keys_that_nothing_reads_as_zeros(text_folder, tmp_path):
    """llama.cpp loads no file without them; other formats need none."""
    gj.convert(text_folder, tmp_path / "out.gguf", to="gguf", verify=True)
    with gemma_checkpoints.open(tmp_path / "out.gguf") as reader:
        config = read_config(reader, tmp_path / "out.gguf")
        for i, spec in enumerate(config.layers):
            for part in ("attn_k", "attn_v", "attn_k_norm"):
                info = reader.tensors[f"blk.{i}.{part}.weight"]
                assert info.shape == reader.tensors[f"blk.0.{part}.weight"].shape
                values = np.ones(info.shape, np.float32)
                reader.read(f"blk.{i}.{part}.weight", out=values)
                is_zero = not values.any()
                assert is_zero == (spec.kv_source is not None)


def test_small_matrices_stay_plain_in_quantised_files():
    """AltUp's coefficients have rows of 4 or 16; every tensor of the release can be written."""
    config = configs.get("gemma-3n-e2b").replace_all(NO_TOWERS)
    for quantize in ("q8_0", "q4_0"):
        precision = export.Precision("bfloat16", quantize)
        kinds = {e.source: export._encoding("gguf", e, precision).name for e in export.table("gguf", config).entries}
        assert kinds["blk.0.altup_predict_coef.weight"] == "BF16"
        assert kinds["blk.0.ffn_down.weight"] == quantize.upper()


def test_a_stem_without_bias_has_a_bias_of_zeros(folder, tmp_path):
    """The first files of the release have none."""
    name = "model.vision_tower.timm_model.conv_stem.conv.bias"
    save_file({n: a for n, a in tensors(folder).items() if n != name}, folder / "model.safetensors")
    gj.convert(folder, tmp_path / "out", to="huggingface")
    np.testing.assert_array_equal(tensors(tmp_path / "out")[name], np.zeros(8))


def test_spare_rows_are_cut_and_written_anew_as_copies_of_the_first():
    config = configs.get("gemma-3n-e2b").replace_all(NO_TOWERS)
    (entry,) = [entry for entry in export.table("huggingface", config).entries if entry.path == "embedder/embedding"]
    assert (entry.source_shape, entry.written_shape) == ((262_144, 2048), (262_400, 2048))
    small = dataclasses.replace(entry, shape=(3, 2), num_spare_rows=2)
    values = np.arange(6.0).reshape(3, 2)
    np.testing.assert_array_equal(small.stored(values), [[0, 1], [2, 3], [4, 5], [0, 1], [0, 1]])


@pytest.mark.parametrize("name", ["gemma-3n-e2b", "gemma-3n-e4b"])
def test_configs_survive_both_formats(name):
    config = configs.get(name)
    assert from_huggingface(to_huggingface(config, "bfloat16"), name) == config
    text = config.replace_all(NO_TOWERS)
    assert from_huggingface(to_huggingface(text, "bfloat16"), name) == text
    assert from_gguf({**to_gguf(text), "gemma3n.vocab_size": 262_144}, name) == text


def test_an_empty_config_is_the_e4b():
    """transformers' defaults are the E4B's (gemma3n.md, section 1)."""
    config = configs.get("gemma-3n-e4b")
    assert from_huggingface({"model_type": "gemma3n_text"}, "gemma-3n-e4b") == config.replace_all(NO_TOWERS)
    sources = [spec.kv_source for spec in config.layers]
    assert sources[:20] == [None] * 20
    assert sources[20:25] == [18, 18, 18, 18, 19]


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        ({"num_kv_shared_layers": 35}, "num_kv_shared_layers is 35; wanted 0 to 34"),
        ({"intermediate_size": [3, 4]}, r"intermediate_size is \[3, 4\]; wanted a number, or one for each of 35"),
        ({"activation_sparsity_pattern": ["a"] * 35}, "activation_sparsity_pattern is"),
        ({"hidden_activation": "silu"}, "hidden_activation is 'silu'"),
        ({"altup_active_idx": 4}, "altup.active_stream is 4"),
        ({"num_kv_shared_layers": 32}, "no global layer before layer 3 has its own"),
    ],
)
def test_impossible_settings_are_refused_by_name(said, problem):
    with pytest.raises(ConfigError, match=problem):
        from_huggingface({"model_type": "gemma3n_text", **said})


@pytest.mark.parametrize(
    ("vision", "audio", "problem"),
    [
        ({"architecture": "resnet50"}, {}, "vision_config.architecture is 'resnet50'"),
        ({}, {"conf_num_hidden_layers": 10**9}, "conf_num_hidden_layers is 1000000000"),
        ({}, {"sscp_conv_channel_size": 3}, "sscp_conv_channel_size is 3"),
        ({}, {"sscp_conv_channel_size": [1, 2, 3]}, "audio.channels"),
        ({}, {"hidden_size": "wide"}, "audio.width is 'wide'"),
    ],
)
def test_impossible_towers_are_refused_by_name(vision, audio, problem):
    with pytest.raises(ConfigError, match=problem):
        from_huggingface({"model_type": "gemma3n", "vision_config": vision, "audio_config": audio})


def test_the_model_itself_runs(text_folder):
    gemma = gj.load(text_folder)
    assert len(gemma.generate([2, 5, 9], max_new_tokens=4, ignore_eos=True).tokens) == 4


@pytest.mark.parity
def test_transformers_finds_every_weight_of_our_export(text_folder, tmp_path):
    torch = pytest.importorskip("torch", reason="the parity extra brings the reference")
    transformers = pytest.importorskip("transformers")
    gj.convert(text_folder, tmp_path / "out", to="huggingface")
    load = transformers.Gemma3nForCausalLM.from_pretrained
    ours, info = load(tmp_path / "out", output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    theirs = load(text_folder, dtype=torch.float32)
    tokens = torch.tensor([[2, 5, 9, 80, 33]])
    with torch.no_grad():
        assert torch.equal(ours(tokens).logits, theirs(tokens).logits)


def test_audio_bins_after_the_convolutions():
    assert (AudioConfig().bins_left, AudioConfig(num_bins=16).bins_left) == (32, 4)
