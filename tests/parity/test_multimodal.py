"""Gemma 3 with images, and ShieldGemma 2, against live models of transformers: tiny, random, float32."""

import json

import numpy as np
import pytest
from PIL import Image

import gemma_jax
from gemma_jax import prompts
from gemma_jax.media.images import ImageOptions
from gemma_jax.text import shieldgemma
from tests.vocabulary import PIECES, huggingface_data, transformers_tokenizer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

TOLERANCE = 2e-5  # on logits of order 1
MERGES = [["Y", "e"], ["Ye", "s"], ["N", "o"]]
VOCABULARY = [*PIECES, "Ye", "Yes", "No"]
SOFT, SIZE, COUNT = len(VOCABULARY), 56, 16
BEGIN, END = PIECES.index("<start_of_image>"), PIECES.index("<end_of_image>")


def config(window):
    text = {
        "vocab_size": SOFT + 8,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 7,  # one turn of 5:1 and a local layer
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": window,
        "query_pre_attn_scalar": 12,
        "max_position_embeddings": 2048,
    }
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return {
        "text_config": text,
        "vision_config": {**vision, "model_type": "siglip_vision_model", "image_size": SIZE, "patch_size": 7},
        "mm_tokens_per_image": COUNT,
        "image_token_index": SOFT,
        "boi_token_index": BEGIN,
        "eoi_token_index": END,
        "attn_implementation": "eager",
    }


@pytest.fixture(scope="module", params=[5, 24], ids=["window below an image", "window above an image"])
def pair(request, randomise, tmp_path_factory):
    theirs = transformers.Gemma3ForConditionalGeneration(transformers.Gemma3Config(**config(request.param)))
    folder = tmp_path_factory.mktemp("seeing")
    randomise(theirs, seed=3).save_pretrained(folder)
    return theirs, gemma_jax.load(folder, dtype="float32", progress=False)


def text(count, seed):
    return np.random.default_rng(seed).integers(4, len(PIECES) - 1, count).tolist()


def prompt(images, seed=0):
    """Text, and between its pieces images."""
    place = [BEGIN, *[SOFT] * COUNT, END]
    return [2, *text(5, seed), *(t for i in range(images) for t in (*place, *text(3 + i, seed + 1 + i)))]


def pixels(count, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (count, SIZE, SIZE, 3)).astype(np.float32)


def given(rows, images):
    """What transformers takes for rows of ids, padded left."""
    length = max(map(len, rows))
    ids = np.array([[0] * (length - len(row)) + list(row) for row in rows])
    mask = np.array([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    found = {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy(mask),
        "token_type_ids": torch.from_numpy((ids == SOFT).astype(np.int64)),
    }
    return found | ({"pixel_values": torch.from_numpy(images.transpose(0, 3, 1, 2))} if len(images) else {})


def test_the_tower_gives_transformers_soft_tokens(pair):
    theirs, ours = pair
    images = pixels(3)
    with torch.no_grad():
        want = theirs.model.get_image_features(torch.from_numpy(images.transpose(0, 3, 1, 2)))
    want = want.pooler_output if hasattr(want, "pooler_output") else want
    np.testing.assert_allclose(ours.see(images), want.numpy(), atol=5e-6)


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_logits_with_images_and_text_around(pair, count):
    theirs, ours = pair
    row, images = prompt(count, seed=count), pixels(count, seed=count)
    with torch.no_grad():
        want = theirs(**given([row], images)).logits.numpy()
    got = np.asarray(ours.logits([row], images if count else None))
    assert np.abs(want).max() > 0.5
    np.testing.assert_allclose(got, want[..., : got.shape[-1]], atol=TOLERANCE)


def test_logits_of_a_padded_batch_with_different_numbers_of_images(pair):
    theirs, ours = pair
    rows = [prompt(3), prompt(0, seed=5), prompt(1, seed=7)]
    images = pixels(4)
    inputs = given(rows, images)
    mask = inputs["attention_mask"].numpy().astype(bool)
    positions = torch.from_numpy(np.maximum(np.cumsum(mask, axis=1) - 1, 0))
    with torch.no_grad():
        want = theirs(**inputs, position_ids=positions).logits.numpy()
    got = np.asarray(ours.logits(inputs["input_ids"].numpy(), images, mask=mask))
    np.testing.assert_allclose(got[mask], want[..., : got.shape[-1]][mask], atol=TOLERANCE)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_greedy_generation_with_a_cache_gives_the_same_tokens(pair, count):
    theirs, ours = pair
    row, images = prompt(count, seed=count), pixels(count, seed=10 + count)
    with torch.no_grad():
        theirs.generation_config.eos_token_id = None
        want = theirs.generate(
            **given([row], images), max_new_tokens=40, do_sample=False, pad_token_id=0, suppress_tokens=None
        )
    got = ours.generate(row, images=images, max_new_tokens=40, temperature=0.0, ignore_eos=True).tokens
    assert got == want[0, len(row) :].tolist()


TEMPLATE = (  # gemma3.md, section 10
    "{{ bos_token }}{% for message in messages %}{{ '<start_of_turn>user\n' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<start_of_image>{% else %}{{ '<start_of_turn>user\n" + shieldgemma._BEFORE
    + "' + part['text'] + '" + shieldgemma._AFTER.replace("'", "\\'") + "' }}{% endif %}{% endfor %}"
    "{{ '<end_of_turn>\n<start_of_turn>model\n' }}{% endfor %}"
)  # fmt: skip


def vocabulary():
    data = huggingface_data()
    added = [*data["added_tokens"][:-1], {"id": SOFT, "content": "<image_soft_token>", "special": True}]
    vocab = {piece: i for i, piece in enumerate(VOCABULARY)}
    return {
        "model": {**data["model"], "vocab": vocab, "merges": [*data["model"]["merges"], *MERGES]},
        "added_tokens": added,
    }


@pytest.fixture(scope="module")
def shield(randomise, tmp_path_factory):
    """Their model and processor, and ours, loaded from what they saved."""
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
    from transformers.models.shieldgemma2 import ShieldGemma2Config

    yes, no = VOCABULARY.index("Yes"), VOCABULARY.index("No")
    theirs = transformers.ShieldGemma2ForImageClassification(
        ShieldGemma2Config(**config(24), yes_token_index=yes, no_token_index=no)
    )
    folder = tmp_path_factory.mktemp("shield")
    randomise(theirs, seed=5).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary()))
    fast = transformers_tokenizer(vocabulary())
    fast.bos_token = "<bos>"
    images = Gemma3ImageProcessorPil(size={"height": SIZE, "width": SIZE})
    processor = transformers.ShieldGemma2Processor(images, fast, chat_template=TEMPLATE, image_seq_length=COUNT)
    return theirs, processor, gemma_jax.load(folder, dtype="float32", progress=False)


def test_shieldgemma_prompts_and_probabilities_are_those_of_transformers(shield):
    theirs, processor, ours = shield
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 70, 3), np.uint8))
    inputs = processor(images=[image], return_tensors="pt", text_kwargs={"add_special_tokens": False})
    options = prompts.MediaOptions(image=ImageOptions(hf_compat=True))
    for ids, mask, policy in zip(
        inputs["input_ids"].tolist(), inputs["attention_mask"].tolist(), shieldgemma.POLICIES.values(), strict=True
    ):
        read = prompts.assemble(shieldgemma.prompt(image, policy), ours.tokenizer, ours.config, options)
        assert read.ids == ids[len(ids) - sum(mask) :]
        np.testing.assert_array_equal(read.pixels[0].transpose(2, 0, 1), inputs["pixel_values"][0].numpy())
    with torch.no_grad():
        want = theirs(**inputs).probabilities[:, 0].numpy()
    got = ours.classify_image(image)
    assert list(got) == list(shieldgemma.POLICIES)
    np.testing.assert_allclose(list(got.values()), want, atol=1e-5)
    assert np.ptp(want) > 1e-3
