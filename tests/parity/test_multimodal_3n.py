"""Gemma 3n with images and sound against transformers: fixtures, and live models."""

import copy
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import gemma_jax as gj
from gemma_jax.configs import huggingface_3n
from gemma_jax.configs.huggingface import from_huggingface
from gemma_jax.configs.towers import ConvBlock, MobileNetConfig
from gemma_jax.generate.engine import Session, Soft
from gemma_jax.generate.request import see
from gemma_jax.generate.sampling import SamplingParams
from gemma_jax.media import places
from gemma_jax.nn.decoder import Decoder, Inserted
from gemma_jax.nn.masks import Places
from tests.conftest import FIXTURES

TOKENS = {"boi_token_id": "boi", "eoi_token_id": "eoi", "image_token_id": "image"}
TOKENS |= {"boa_token_id": "boa", "eoa_token_id": "eoa", "audio_token_id": "audio_tok"}

forward = jax.jit(lambda model, tokens, where, inserted: model(tokens, where, inserted))
look = jax.jit(lambda tower, pixels: tower(pixels))
hear = jax.jit(lambda model, features, is_valid: model.hear(features, is_valid))


def tiny_tower(width: int = 20) -> MobileNetConfig:
    """All kinds of blocks, 2 x 2 soft tokens of an image of 64 pixels."""
    edge = ConvBlock(kind="edge", width=8, kernel=3, stride=2, expansion=2)
    first = ConvBlock(kind="inverted", width=8, start_kernel=3, kernel=5, stride=2, expansion=2)
    second = ConvBlock(kind="inverted", width=12, start_kernel=5, kernel=5, stride=2, expansion=2)
    small = ConvBlock(kind="attention", width=12, num_heads=2, head_dim=6, key_kernel=3)
    third = ConvBlock(kind="inverted", width=16, start_kernel=5, kernel=5, stride=2, expansion=2)
    large = ConvBlock(kind="attention", width=16, num_heads=2, head_dim=8)
    stages = ((edge,), (first,), (second, small), (third, large))
    return MobileNetConfig(
        stages=stages, stem_width=6, width=width, image_size=64, num_soft_tokens=4, num_hard_tokens=8,
        first_token=90, begin_token=80, end_token=90, soft_token=91,
    )  # fmt: skip


@pytest.fixture(scope="module")
def fixture():
    with np.load(FIXTURES / "gemma3n_multimodal.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def gemma(fixture, tmp_path_factory):
    """The fixture's weights, read as a Hugging Face folder; its tower, which the fixture has not, is random."""
    data = json.loads(bytes(fixture["config_json"]).decode())
    whole = {
        "model_type": "gemma3n", "text_config": {**data["text"], "model_type": "gemma3n_text"},
        "vision_config": data["vision"], "audio_config": data["audio"],
        "vision_soft_tokens_per_image": data["vision_soft_tokens"],
        "audio_soft_tokens_per_image": data["audio_soft_tokens"],
        **{theirs: data[ours] for theirs, ours in TOKENS.items()},
    }  # fmt: skip
    patch = pytest.MonkeyPatch()
    patch.setattr(huggingface_3n, "MOBILENET_V5_300M", tiny_tower())
    config = from_huggingface(whole, "fixture")
    folder = tmp_path_factory.mktemp("fixture") / "3n"
    gj.Gemma(config, Decoder(config, rngs=nnx.Rngs(0))).save(folder, format="huggingface")
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    theirs = {name.removeprefix("w:"): array for name, array in fixture.items() if name.startswith("w:")}
    ours = {name for name in tensors if "vision_tower" not in name}
    assert ours <= set(theirs)
    plain = folder.parent / "plain"  # without the digests of a folder of ours
    plain.mkdir()
    save_file({**tensors, **{name: theirs[name] for name in ours}}, plain / "model.safetensors")
    (plain / "config.json").write_text((folder / "config.json").read_text())
    yield gj.load(plain, dtype="float32", progress=False)
    patch.undo()


def test_logits_of_text_image_and_sound_are_those_of_transformers(gemma, fixture):
    ids, model = fixture["x:input_ids"], gemma.model
    (index,) = places.soft_indices(ids, gemma.config, 1, 1)
    image = model.mm.soft(jnp.asarray(fixture["x:vision_features"]) * 20**0.5)
    heard = hear(model, fixture["x:mel"], fixture["x:mel_valid"])
    vectors = jnp.concatenate([image[0], heard[0]])
    tokens = jnp.asarray(np.where(index >= 0, 0, ids))
    found = forward(model, tokens, Places.plain(*ids.shape), Inserted(vectors, jnp.asarray(index[None])))
    np.testing.assert_allclose(found[..., : gemma.config.vocab_size], fixture["x:logits"], atol=1e-3)


class Eyes:
    """Our tower in transformers' place for timm's, which has tests of its own (tests/nn/test_mobilenet_v5.py)."""

    def __init__(self, torch, model):
        class Tower(torch.nn.Module):
            def forward(self, pixel_values, **_):
                pixels = pixel_values.numpy().astype(np.float32).transpose(0, 2, 3, 1)
                seen = np.array(look(model.vision, pixels)).transpose(0, 2, 1).reshape(len(pixels), -1, 2, 2)
                return types.SimpleNamespace(last_hidden_state=torch.from_numpy(seen).to(pixel_values.dtype))

        self.tower = Tower()


@pytest.fixture(scope="module")
def theirs(gemma, fixture):
    """transformers' whole model with the same weights."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from transformers.models.gemma3n import modeling_gemma3n as code

    data, real = json.loads(bytes(fixture["config_json"]).decode()), code.AutoModel
    eyes = Eyes(torch, gemma.model).tower

    class Models:
        @staticmethod
        def from_config(config):
            is_eye = config.model_type == "gemma3n_vision"
            return eyes if is_eye else real.from_config(config, attn_implementation="eager")

    tokens = {theirs: data[ours] for theirs, ours in TOKENS.items()}
    config = transformers.Gemma3nConfig(
        text_config=data["text"], vision_config=data["vision"], audio_config=data["audio"],
        vision_soft_tokens_per_image=4, audio_soft_tokens_per_image=6, **tokens,
    )  # fmt: skip
    patch = pytest.MonkeyPatch()
    patch.setattr(code, "AutoModel", Models)
    model = code.Gemma3nForConditionalGeneration(config).eval()
    patch.undo()
    weights = {name[2:]: torch.from_numpy(array) for name, array in fixture.items() if name.startswith("w:")}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not [name for name in missing if "lm_head" not in name and "softcap" not in name and "inv_" not in name], (
        missing
    )
    assert not unexpected
    return model


IMAGE, SOUND = [80, 91, 91, 91, 91, 90], [81, *[99] * 6, 98]


@pytest.mark.parity
def test_logits_and_greedy_tokens_with_two_images_and_two_sounds(gemma, theirs):
    """Interleaved; sounds of 61 and 38 frames, the second one padded, as transformers pads it."""
    import torch

    random = np.random.default_rng(0)
    ids = [2, 7, *IMAGE, 9, *SOUND, 5, 11, *SOUND, *IMAGE, 6, 13]
    pixels = random.uniform(0, 1, (2, 64, 64, 3)).astype(np.float32)
    mel = random.normal(size=(2, 61, 16)).astype(np.float32)
    valid = np.arange(61) < np.array([[61], [38]])
    media = {
        "pixel_values": torch.from_numpy(pixels.transpose(0, 3, 1, 2)),
        "input_features": torch.from_numpy(mel),
        "input_features_mask": torch.from_numpy(valid),
    }
    tokens = list(ids)
    with torch.no_grad():
        for _ in range(16):
            want = theirs(input_ids=torch.tensor([tokens]), **media).logits.numpy()
            tokens.append(int(want[0, -1].argmax()))
    model = gemma.model
    (index,) = places.soft_indices([ids], gemma.config, 2, 2)
    seen, heard = see(model, jnp.asarray(pixels)), hear(model, mel, valid)
    vectors = jnp.concatenate([seen.reshape(-1, 48), heard.reshape(-1, 48)])
    plain = np.where(index >= 0, 0, ids)
    inserted = Inserted(vectors, jnp.asarray(index[None]))
    got = forward(model, jnp.asarray(plain[None]), Places.plain(1, len(ids)), inserted)
    np.testing.assert_allclose(got[0], want[0, : len(ids)], atol=1e-3)
    params = [SamplingParams(max_new_tokens=16, ignore_eos=True)]
    for chunk in (512, 16):
        session = Session(model, [plain.tolist()], params, [], soft=Soft(vectors, [index]), prefill_chunk=chunk)
        assert [token for (step,) in session for token in step.tokens] == tokens[len(ids) :]


@pytest.mark.slow
@pytest.mark.parity
def test_logits_in_float64(gemma, theirs, monkeypatch):
    """What the formulas are, without rounding (gemma3n.md, trap 1): transformers' own casts to float32 are taken out.

    The tower's output is the same float32 values for both. Without sound: in transformers' conformer constants are
    float32, and logits with it are 8.5e-6 apart.
    """
    import torch

    random = np.random.default_rng(1)
    ids = np.asarray([[2, 7, *IMAGE, 9, 81, 98, 5, 11, *IMAGE, 6, 13]])
    pixels = random.uniform(0, 1, (2, 64, 64, 3)).astype(np.float32)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    real_softmax = torch.nn.functional.softmax
    monkeypatch.setattr(
        torch.nn.functional, "softmax", lambda x, dim=None, dtype=None, **_: real_softmax(x, dim=dim, dtype=x.dtype)
    )
    twice = copy.deepcopy(theirs).double()
    with torch.no_grad():
        values = torch.from_numpy(pixels.transpose(0, 3, 1, 2)).double()
        want = twice(input_ids=torch.from_numpy(ids), pixel_values=values).logits.numpy()
    seen = np.asarray(look(gemma.model.vision, pixels))
    (index,) = places.soft_indices(ids, gemma.config, 2)
    with jax.enable_x64(True):
        model = jax.tree.map(lambda leaf: leaf.astype("float64"), gemma.model)
        vectors = model.mm.soft(jnp.asarray(seen, "float64") * 20**0.5).reshape(-1, 48)
        tokens = jnp.asarray(np.where(index >= 0, 0, ids))
        got = forward(model, tokens, Places.plain(*ids.shape), Inserted(vectors, jnp.asarray(index[None])))
    assert got.dtype == want.dtype == "float64"
    np.testing.assert_allclose(got, want, atol=1e-6)
