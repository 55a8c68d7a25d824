"""Prompts of Gemma 3n, their pixels and spectrograms, against transformers' processor."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from gemma_jax import prompts
from gemma_jax.configs.towers import AudioConfig
from gemma_jax.media import images
from gemma_jax.media.images import ImageOptions
from gemma_jax.media.mel import mel
from gemma_jax.text.chat import AUDIO, IMAGE, chat_parts, render
from gemma_jax.text.tokenizer import Tokenizer
from tests.parity.test_multimodal_3n import tiny_tower
from tests.vocabulary import PIECES, huggingface_data, transformers_tokenizer

transformers = pytest.importorskip("transformers", reason="the parity extra brings the reference")
pytest.importorskip("torch")
pytestmark = pytest.mark.parity

V = len(PIECES)
BEGIN_IMAGE, BEGIN_AUDIO = map(
    PIECES.index, ("<start_of_image>", "<end_of_image>")
)  # as 3n names Gemma 3's tokens anew
HARD = ["<end>", "<image_soft_token>", *(f"<hard {i}>" for i in range(2, 8)), "<end of audio>", "<audio_soft_token>"]
EARS = AudioConfig(
    num_soft_tokens=8, num_hard_tokens=4, first_token=V + 8, begin_token=BEGIN_AUDIO, end_token=V + 8, soft_token=V + 9
)
OPTIONS = prompts.MediaOptions(image=ImageOptions(hf_compat=True))


def picture(height=90, width=70, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def sound(seconds, seed=0):
    wave = (0.1 * np.random.default_rng(seed).normal(size=round(16_000 * seconds))).astype(np.float32)
    return {"type": "audio", "audio": (wave, 16_000)}


def user(*parts):
    as_part = {str: lambda p: {"type": "text", "text": p}, dict: lambda p: p}
    return {
        "role": "user",
        "content": [as_part.get(type(p), lambda p: {"type": "image", "image": p})(p) for p in parts],
    }


CONVERSATIONS = {
    "sound first": [user(sound(0.5), "hello")],
    "all": [
        {"role": "system", "content": "hello"},
        user("hi\n", picture(), "user", sound(0.7), picture(seed=1)),
        {"role": "assistant", "content": "model"},
        user(sound(0.3, seed=1), "\nhi"),
    ],
    "images": [user(picture(), picture(seed=3), "hello")],
}


@pytest.fixture(scope="module")
def processor():
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    data = huggingface_data()
    data["added_tokens"] = data["added_tokens"][:-1]
    data["added_tokens"] += [{"id": V + i, "content": piece, "special": True} for i, piece in enumerate(HARD)]
    tokenizer = transformers_tokenizer(data)
    names = {"boi_token": "<start_of_image>", "eoi_token": "<end>", "image_token": "<image_soft_token>"}
    names |= {"boa_token": "<end_of_image>", "eoa_token": "<end of audio>", "audio_token": "<audio_soft_token>"}
    for name, piece in names.items():
        setattr(tokenizer, name, piece)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(piece))
    pixels = SiglipImageProcessorPil(size={"height": 64, "width": 64}, do_normalize=False, resample=2)  # bilinear
    ears = transformers.Gemma3nAudioFeatureExtractor()
    return transformers.Gemma3nProcessor(ears, pixels, tokenizer, audio_seq_length=8, image_seq_length=4)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_ids_pixels_and_spectrograms_are_the_processors(processor, make_3n, name):
    messages, tokenizer = CONVERSATIONS[name], Tokenizer.from_huggingface(huggingface_data())
    tower = dataclasses.replace(
        tiny_tower(), begin_token=BEGIN_IMAGE, first_token=V, end_token=V, soft_token=V + 1, num_soft_tokens=4
    )
    config = dataclasses.replace(make_3n(num_layers=5, num_shared=1), vocab_size=V, vision=tower, audio=EARS)
    found = prompts.assemble(chat_parts(messages), tokenizer, config, OPTIONS)
    parts = [p for m in messages if isinstance(m["content"], list) for p in m["content"]]
    shown = [p["image"] for p in parts if p["type"] == "image"]
    heard = [p["audio"][0] for p in parts if p["type"] == "audio"]
    text = render(messages).replace(IMAGE, "<image_soft_token>").replace(AUDIO, "<audio_soft_token>")
    wanted = processor(
        text=[text], images=[shown] if shown else None, audio=heard or None, return_tensors="np",
        add_special_tokens=False,
    )  # fmt: skip
    assert found.ids == wanted["input_ids"][0].tolist()
    if shown:
        np.testing.assert_array_equal(found.pixels.transpose(0, 3, 1, 2), wanted["pixel_values"])
    if heard:
        features, valid = mel(found.clips)
        np.testing.assert_array_equal(valid, wanted["input_features_mask"].astype(bool))
        np.testing.assert_array_equal(features[valid], wanted["input_features"][valid])


@pytest.mark.parametrize(("height", "width"), [(768, 768), (200, 1000), (1000, 301), (3, 2)])
def test_pixels_at_the_real_size_are_the_processors(height, width):
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    theirs = SiglipImageProcessorPil(size={"height": 768, "width": 768}, do_normalize=False, resample=2)
    wanted = theirs(picture(height, width), return_tensors="np")["pixel_values"]
    found = images.prepare(picture(height, width), 768, ImageOptions(hf_compat=True), black=0.0)
    np.testing.assert_array_equal(found.transpose(0, 3, 1, 2), wanted)
