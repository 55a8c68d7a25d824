"""A Gemma 3 that sees, against transformers' own weights and outputs (fixtures/gemma3_multimodal.npz)."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import gemma_jax as gj
from gemma_jax import interp
from gemma_jax.generate import engine
from gemma_jax.media import places

FIXTURES = Path(__file__).parent.parent / "fixtures"
SOFT, SIZE = 90, 16  # the fixture's image token, and how many stand for an image


@pytest.fixture(scope="module")
def data():
    with np.load(FIXTURES / "gemma3_multimodal.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def gemma(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeing") / "model"
    folder.mkdir()
    save_file({key[2:]: value for key, value in data.items() if key.startswith("w:")}, folder / "model.safetensors")
    config = {**json.loads(bytes(data["config_json"])), "model_type": "gemma3"}
    (folder / "config.json").write_text(json.dumps(config))
    with jax.default_matmul_precision("highest"):
        return gj.load(folder)


@pytest.fixture(scope="module")
def images(data):
    return data["x:pixel_values"].transpose(0, 2, 3, 1)


def test_the_tower_and_projector_give_transformers_soft_tokens(gemma, data, images):
    np.testing.assert_allclose(gemma.see(images), data["x:soft_tokens"], atol=5e-6)
    np.testing.assert_allclose(gemma.see(images[1:]), data["x:soft_tokens"][1:], atol=5e-6)


def test_two_images_between_text_give_transformers_logits(gemma, data, images):
    """The window of 20 cuts blocks of 16 tokens too: who sees whom is the rule of transformers 5."""
    logits = gemma.logits(data["x:input_ids"], images)
    np.testing.assert_allclose(logits, data["x:logits"], atol=2e-5)
    swapped = np.asarray(gemma.logits(data["x:input_ids"], images[::-1]))
    assert np.abs(swapped - data["x:logits"]).max() > 0.01


def test_padding_and_batch_mates_change_nothing(gemma, data, images):
    tokens = data["x:input_ids"]
    wanted = np.asarray(gemma.logits(tokens, images))[0]
    length = tokens.shape[1]
    batch, mask = np.zeros((2, length + 5), np.int32), np.zeros((2, length + 5), bool)
    batch[0, 5:], mask[0, 5:] = tokens[0], True
    batch[1, :length], mask[1, :length] = tokens[0], True
    both = np.concatenate([images, images[::-1]])
    logits = np.asarray(gemma.logits(batch, both, mask=mask))
    np.testing.assert_allclose(logits[0, 5:], wanted, atol=2e-5)
    np.testing.assert_allclose(logits[1, :length], np.asarray(gemma.logits(tokens, images[::-1]))[0], atol=2e-5)


def test_tokens_of_an_image_see_each_other_and_no_later_image(gemma, data, images):
    """Changing the second image changes nothing before it; within an image its end reaches its beginning."""
    tokens = data["x:input_ids"]
    first, second = (np.flatnonzero(tokens[0] == SOFT)[at] for at in (0, SIZE))
    other = images.copy()
    other[1] = -other[1]
    states, changed = (np.asarray(gemma.hidden_states(tokens, one)) for one in (images, other))
    np.testing.assert_array_equal(states[:, 0, :second], changed[:, 0, :second])
    assert np.abs(states[-1, 0, second] - changed[-1, 0, second]).max() > 1e-3
    moved = images.copy()
    moved[0, -7:] = 1.0  # only the last row of patches: in the stream its soft tokens come last
    changed = np.asarray(gemma.hidden_states(tokens, moved))
    before = np.abs(states[:, 0, first] - changed[:, 0, first]).max(axis=-1)
    assert before[-1] > 1e-4
    np.testing.assert_array_equal(states[:, 0, :first], changed[:, 0, :first])


def test_a_model_that_sees_works_without_images(gemma):
    assert np.isfinite(np.asarray(gemma.logits([[2, 5, 9]]))).all()
    assert len(gemma.generate([2, 5, 9], max_new_tokens=4).tokens) == 4


def likeliest(gemma, prompt, answer, images, **options):
    """The likeliest token after the prompt and after each but the last of the answer, by one whole forward."""
    logits = np.asarray(gemma.logits([[*prompt, *answer[:-1]]], images, **options))
    return logits[0, len(prompt) - 1 :].argmax(axis=-1).tolist()


@pytest.mark.parametrize("chunk", [16, 24, 512])
def test_generation_with_images_is_greedy_by_the_whole_forward(gemma, data, images, chunk, monkeypatch):
    """Greedy, a batch of unequal prompts with two, one and no image; chunks that would end within an image do not."""
    whole = data["x:input_ids"][0].tolist()
    start = whole.index(SOFT)
    one = whole[: start + SIZE + 2]
    prompts, counts = [whole, one, [2, 5, 9, 33]], [2, 1, 0]
    given = np.concatenate([images, images[1:]])
    defaults = {**engine.Session.__init__.__kwdefaults__, "prefill_chunk": chunk}
    monkeypatch.setattr(engine.Session.__init__, "__kwdefaults__", defaults)
    answers = gemma.generate(prompts, images=given, max_new_tokens=5, temperature=0.0, ignore_eos=True)
    first = 0
    for prompt, count, answer in zip(prompts, counts, answers, strict=True):
        own = given[first : first + count] if count else None
        first += count
        assert answer.tokens == likeliest(gemma, prompt, answer.tokens, own)


def test_streaming_with_images_gives_what_generate_gives(gemma, data, images):
    prompt = data["x:input_ids"][0].tolist()
    want = gemma.generate(prompt, images=images, max_new_tokens=6, temperature=0.0).tokens
    pieces = list(gemma.stream(prompt, images=images, max_new_tokens=6, temperature=0.0))
    assert [token for piece in pieces for token in piece.tokens] == want


def test_edits_meet_images_in_the_forward_and_in_generation(gemma, data, images):
    """Steering the soft tokens alone, in the prompt; a zero vector changes nothing."""
    prompt = data["x:input_ids"][0].tolist()
    places = np.flatnonzero(np.asarray(prompt) == SOFT)
    vector = np.random.default_rng(0).normal(0, 3, gemma.config.width).astype(np.float32)
    steer = interp.Add("layers.0.resid_post", vector, positions=places)
    nothing = interp.Add("layers.0.resid_post", np.zeros_like(vector), positions=places)
    options = {"images": images, "max_new_tokens": 5, "temperature": 0.0, "ignore_eos": True}
    plain, steered = gemma.generate(prompt, **options).tokens, gemma.generate(prompt, edits=[steer], **options).tokens
    assert gemma.generate(prompt, edits=[nothing], **options).tokens == plain
    assert steered != plain
    assert steered == likeliest(gemma, prompt, steered, images, edits=[steer])
    np.testing.assert_array_equal(gemma.logits([prompt], images, edits=[nothing]), gemma.logits([prompt], images))
    seen = interp.capture(gemma, [prompt], ["embed"], images=images)["embed"]
    np.testing.assert_allclose(seen[0, places], np.asarray(gemma.see(images)).reshape(len(places), -1), atol=1e-6)


def test_a_tower_is_saved_with_its_model(gemma, data, images, tmp_path):
    gemma.save(tmp_path / "saved")
    again = gj.load(tmp_path / "saved")
    np.testing.assert_array_equal(again.logits(data["x:input_ids"], images), gemma.logits(data["x:input_ids"], images))
    text = gj.load(tmp_path / "saved", overrides={"vision": None})
    assert not hasattr(text.model, "vision")
    np.testing.assert_allclose(text.logits([[2, 5, 9]]), gemma.logits([[2, 5, 9]]), atol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "count", "words"),
    [
        ([2, 90, 90, 5], 1, "there are 2 image tokens 90, but 1 images take 1 x 16"),
        ([2, *[90] * 16, 5], 0, "there are 16 image tokens 90, but 0 images"),
        ([2, *[90] * 16, 5], 2, "2 images take 2 x 16"),
        ([2, *[90] * 8, 5, *[90] * 8], 1, "8 image tokens 90 stand in a row; one of the images takes 16"),
        ([2, *[90] * 32, 5], 2, "32 image tokens 90 stand in a row"),
    ],
)
def test_images_and_their_places_must_fit(gemma, images, tokens, count, words):
    given = images[:count] if count else None
    with pytest.raises(ValueError, match=words):
        gemma.logits([tokens], given)


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (np.zeros((1, 56, 56), np.float32), r"images is an array of shape \(1, 56, 56\)"),
        (np.zeros((1, 3, 56, 56), np.float32), r"prepared pixels have \[56, 56, 3\]"),
        (np.zeros((1, 56, 56, 3), np.int32), "an array of int32"),
        (np.full((1, 56, 56, 3), np.nan, np.float32), "these reach nan"),
        (np.full((1, 56, 56, 3), 127.0, np.float32), "these reach 127"),
    ],
)
def test_pixels_of_another_kind_are_refused(gemma, pixels, words):
    with pytest.raises(ValueError, match=words):
        gemma.see(pixels)


def test_a_text_model_says_that_it_cannot_see(tiny_config):
    with pytest.raises(ValueError, match="has no vision tower; images need a Gemma 3 of 4B or more"):
        places.tower_of(tiny_config)
    with pytest.raises(ValueError, match="has no vision tower"):
        places.soft_indices([[1, 2]], tiny_config, 2)
