import json
import shutil
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import gemma_checkpoints
import gemma_jax as gj
from gemma_checkpoints import CheckpointError, encodings
from gemma_jax.configs.config import ConfigError

TOKENS = np.array([[2, 300, 17, 340, 5, 9, 9, 120, 33, 200, 7, 8]])


@pytest.fixture
def folder(model_folder, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(model_folder, tmp_path / "copy")


@pytest.fixture(scope="module")
def wanted(saved_model, forward):
    return np.asarray(forward(saved_model, jnp.asarray(TOKENS), None))


def test_a_folder_gives_the_model_that_was_saved(model_folder, saved_model, wanted):
    gemma = gj.load(model_folder)
    assert gemma.config == saved_model.config.replace("name", "tiny-model")
    np.testing.assert_allclose(gemma.logits(TOKENS), wanted, atol=1e-5, rtol=0)
    assert gemma.generate("hello world", max_new_tokens=3).prompt_tokens == 3


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_part_of_a_multimodal_folder_in_shards(
    folder, saved_model, config_json, huggingface_tensors, wanted, prefix
):
    tensors = huggingface_tensors(saved_model, prefix)
    tensors |= {"vision_tower.vision_model.x": np.zeros(3, np.float32)}
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    for shard, part in (("a.safetensors", names[::2]), ("b.safetensors", names[1::2])):
        save_file({name: tensors[name] for name in part}, folder / shard)
    index = {name: ("a" if i % 2 == 0 else "b") + ".safetensors" for i, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    text = {**config_json, "model_type": "gemma3_text"}
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    np.testing.assert_allclose(gj.load(folder).logits(TOKENS), wanted, atol=1e-5, rtol=0)


def test_weights_take_the_dtype_and_sharding_asked_for(model_folder, wanted):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    seen = []

    def place(dims, shape):
        seen.append((dims, shape))
        return sharding

    gemma = gj.load(model_folder, dtype="bfloat16", sharding=place)
    leaves = jax.tree.leaves(gemma.model)
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("bfloat16")}
    assert len(seen) == len(leaves)
    assert np.abs(gemma.logits(TOKENS) - wanted).max() < 0.3  # 8 bits of mantissa, logits of order 3
    with pytest.raises(ValueError, match="'float16'; wanted 'auto'"):
        gj.load(model_folder, dtype="float16")


def test_overrides_change_the_model_and_bad_ones_are_refused(model_folder, wanted):
    gemma = gj.load(model_folder, overrides={"attention.local.window": 2})
    assert np.abs(gemma.logits(TOKENS) - wanted).max() > 1e-3
    with pytest.raises(ConfigError, match="windows"):
        gj.load(model_folder, overrides=["attention.local.windows=2"])
    with pytest.raises(CheckpointError, match=r"mlp.up_proj.weight' has shape"):
        gj.load(model_folder, overrides=["layers.1.ffw_width=50"])


def test_a_folder_without_tokenizer_files_works_on_ids(folder, wanted):
    (folder / "tokenizer.json").unlink()
    gemma = gj.load(folder)
    assert gemma.tokenizer is None
    assert gemma.generate([2, 5], max_new_tokens=2).text is None
    with pytest.raises(ValueError, match="without a tokenizer"):
        gemma.generate("text")


def test_a_missing_tensor_and_a_cut_file_are_named(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'layers\.1\.mlp\.up_proj\.weight' is missing"):
        gj.load(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cut off"):
        gj.load(folder)


def test_a_folder_without_config_or_of_another_family_is_refused(folder):
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match="'llama'"):
        gj.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        gj.load(folder)


def test_a_tokenizer_of_another_model_or_damaged_is_refused_by_file(folder):
    data = json.loads((folder / "tokenizer.json").read_text())
    vocab = data["model"]["vocab"]
    vocab["one more"] = len(vocab)
    (folder / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=rf"has {len(vocab)} pieces, but vocab_size is {len(vocab) - 1}"):
        gj.load(folder)
    (folder / "tokenizer.json").write_text("[]")
    with pytest.raises(ValueError, match=f"{folder}: tokenizer.json: the model is not a BPE"):
        gj.load(folder)


def gguf_of(architecture: str) -> bytes:
    key, value = b"general.architecture", architecture.encode()
    return b"".join(
        [
            b"GGUF" + struct.pack("<IQQ", 3, 0, 1),
            struct.pack("<Q", len(key)) + key + struct.pack("<IQ", 8, len(value)) + value,
            bytes(64),
        ]
    )


def test_a_gguf_of_another_architecture_and_a_text_named_gguf_are_refused(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf_of("llama"))
    with pytest.raises(ConfigError, match="'llama'"):
        gj.load(path)
    path.write_text("Once upon a time there was no model.")
    with pytest.raises(CheckpointError, match="not a GGUF"):
        gj.load(path)


@pytest.mark.parametrize(
    ("source", "error", "words"),
    [
        ("gemma-3-271m", ConfigError, "gemma-3-270m"),
        ("gemma-3-27b", FileNotFoundError, "google/gemma-3-27b-pt is not, or not wholly, in the local cache"),
        ("gemma-3-270m-it", FileNotFoundError, "google/gemma-3-270m-it is not"),
        ("google/gemma-3-1b-it", FileNotFoundError, "google/gemma-3-1b-it is not"),
        ("nowhere/model.gguf", FileNotFoundError, r"nowhere/model\.gguf does not exist"),
    ],
)
def test_what_is_not_there_is_refused_with_what_to_do(source, error, words):
    with pytest.raises(error, match=words):
        gj.load(source)


def test_a_folder_is_what_lies_in_it_and_not_what_lies_deeper(model_folder, tmp_path):
    """Training may keep its Orbax checkpoints in a Hugging Face folder."""
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    gj.convert(model_folder, folder / "checkpoint-7", to="orbax")
    with gemma_checkpoints.open(folder) as reader:
        assert reader.format == "huggingface"
    with gemma_checkpoints.open(folder / "checkpoint-7") as reader:
        assert reader.format == "orbax"
    outer = tmp_path / "download"  # as Kaggle has DeepMind's: a tokenizer beside the checkpoint's folder
    outer.mkdir()
    gj.convert(model_folder, outer / "gemma", to="deepmind")
    with gemma_checkpoints.open(outer) as reader:
        assert reader.format == "deepmind"


def test_rows_of_a_gguf_are_read_as_they_are_stored(saved_model, tmp_path):
    config = saved_model.config
    table = gemma_checkpoints.Layout((config.vocab_size, 64), encodings.Q8_0)
    values = np.random.default_rng(0).normal(size=table.shape).astype(np.float32)
    path = tmp_path / "rows.gguf"
    with gemma_checkpoints.GGUFWriter(path, {"table": table}, {"general.architecture": "gemma3"}) as writer:
        writer.put("table", values)
    with gemma_checkpoints.open(path) as reader:
        rows = np.empty((7, 2 * 34), np.uint8)
        reader.read_rows("table", rows, start=3)
        decoded = encodings.Q8_0.decode(rows.reshape(-1, 34)).reshape(7, 64)
        np.testing.assert_array_equal(decoded, reader.read("table")[3:10])
        with pytest.raises(ValueError, match=f"table has {config.vocab_size} rows of 68 bytes"):
            reader.read_rows("table", rows, start=config.vocab_size - 6)
        with pytest.raises(ValueError, match="of 68 bytes"):
            reader.read_rows("table", rows[:, :34])
        with pytest.raises(CheckpointError, match="no tensor 'chair'"):
            reader.read_rows("chair", rows)


def test_stored_weights_of_a_float32_folder_are_float32(model_folder, wanted):
    gemma = gj.load(model_folder, dtype="stored", progress=False)
    assert {leaf.dtype for leaf in jax.tree.leaves(gemma.model)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(gemma.logits(TOKENS), wanted, atol=1e-5, rtol=0)
