"""Conversions of a tiny Gemma 3: round trips are bit-exact, and nothing is lost silently."""

import json
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import gemma_checkpoints
import gemma_jax as gj
from gemma_checkpoints import CheckpointError
from gemma_jax.configs.config import ConfigError
from gemma_jax.configs.gemma3 import GEMMA3_270M, five_to_one
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


def test_hugging_face_to_gguf_and_back_gives_every_tensor_bit_for_bit(folder, tmp_path):
    there = gj.convert(folder, tmp_path / "m.gguf", to="gguf", dtype="float32", verify=True)
    back = gj.convert(tmp_path / "m.gguf", tmp_path / "back", to="huggingface", dtype="bfloat16", verify=True)
    first, second = tensors(folder), tensors(tmp_path / "back")
    assert there.num_tensors == back.num_tensors == len(first) == 6 * 13 + 2
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name].view(np.uint16), second[name].view(np.uint16), err_msg=name)
    assert there.logit_difference < 1e-5
    assert back.logit_difference < 1e-5
    assert there.is_verified
    assert gj.load(tmp_path / "back").config == gj.load(folder).config.replace("name", "back")


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


def test_a_vision_tower_is_never_dropped_silently(seeing, tmp_path):
    with pytest.raises(ConfigError, match=r"gguf has no place for vision/.*text_only"):
        gj.convert(seeing, tmp_path / "out.gguf", to="gguf")
    assert not list(tmp_path.iterdir())
    report = gj.convert(seeing, tmp_path / "out", to="huggingface", text_only=True)
    source = tensors(seeing)
    assert set(report.left_out) == {name for name in source if "vision" in name or "multi_modal" in name}
    assert len(tensors(tmp_path / "out")) == len(source) - len(report.left_out)


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
