"""Images in prompts: where their places are, against transformers' processor and the specification's ids."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from gemma_jax import prompts
from gemma_jax.configs.config import VisionConfig
from gemma_jax.media.images import ImageOptions
from gemma_jax.text.chat import ChatError, chat_parts, encode_chat, render
from gemma_jax.text.tokenizer import Tokenizer
from tests.vocabulary import PIECES, huggingface_data, transformers_tokenizer

BEGIN, END, SOFT, COUNT = PIECES.index("<start_of_image>"), PIECES.index("<end_of_image>"), len(PIECES), 4
NEWLINE, TWO, THREE = (PIECES.index("\n" * n) for n in (1, 2, 3))
PLACE = [BEGIN, *[SOFT] * COUNT, END]
COMPAT = ImageOptions(hf_compat=True)
MERGED, CROPPED = (prompts.MediaOptions(image=o) for o in (COMPAT, ImageOptions(pan_and_scan=True)))


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_huggingface(huggingface_data())


@pytest.fixture(scope="module")
def config(make_config):
    tower = VisionConfig(
        num_layers=1,
        width=8,
        num_heads=2,
        ffw_width=8,
        patch_size=7,
        image_size=28,
        num_soft_tokens=COUNT,
        soft_token=SOFT,
        begin_token=BEGIN,
        end_token=END,
    )
    return dataclasses.replace(make_config(vocab_size=len(PIECES)), vision=tower)


def picture(height=28, width=28, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def user(*parts):
    return {"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else image(p) for p in parts]}


def image(source):
    return {"type": "image", "image": source}


CONVERSATIONS = {
    "image first": [user(picture(), "hello")],
    "image last": [user("hello", picture())],
    "between": [user(" hi ", picture(), " user\n"), {"role": "assistant", "content": "model"}, user("hello")],
    "side by side": [user(picture(), picture(seed=1))],
    "three": [
        user(picture(), "hi", picture(seed=1)),
        {"role": "assistant", "content": "a"},
        user(picture(seed=2), "b"),
    ],
    "system": [{"role": "system", "content": "hello"}, user(picture(), "hi")],
    "newlines": [user("hi\n\n", picture(), "\nhi")],
}


def test_an_image_is_a_row_of_ids_of_its_own(tokenizer, config):
    """gemma3.md 6.3, DeepMind's layout: `user` 107 108 255999 ... 256000 108."""
    prompt = prompts.assemble(chat_parts([user(picture(), "hello")]), tokenizer, config, prompts.MediaOptions())
    ids = prompt.ids
    begin = ids.index(BEGIN)
    assert ids[begin - 2 : begin] == [NEWLINE, TWO]
    assert ids[begin : begin + 7] == [*PLACE, TWO]
    assert ids[begin + 7 :][:1] == tokenizer.encode("hello", bos=False)
    assert prompt.pixels.shape == (1, 28, 28, 3)


def test_for_transformers_newlines_merge(tokenizer, config):
    prompt = prompts.assemble(chat_parts([user(picture(), picture())]), tokenizer, config, MERGED)
    ids = prompt.ids
    assert ids[ids.index(BEGIN) - 1] == THREE
    assert ids[ids.index(END) + 1 : ids.index(END) + 4] != [TWO, TWO, BEGIN]
    assert prompt.pixels.shape == (2, 28, 28, 3)


@pytest.fixture(scope="module")
def processor():
    """transformers' own, around a tokenizer with our small vocabulary."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    images = Gemma3ImageProcessorPil(size={"height": 28, "width": 28})
    return transformers.Gemma3Processor(images, transformers_tokenizer(huggingface_data()), image_seq_length=COUNT)


@pytest.mark.parity
@pytest.mark.parametrize("pan_and_scan", [False, True])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_ids_and_pixels_are_those_of_transformers_processor(tokenizer, config, processor, name, pan_and_scan):
    messages = CONVERSATIONS[name]
    if pan_and_scan:  # the images of this one are long enough to be cut
        messages = [user(picture(260, 700), "hi", picture(600, 256, seed=1)), *CONVERSATIONS["between"][1:]]
    sources = [p["image"] for m in messages if isinstance(m["content"], list) for p in m["content"] if "image" in p]
    limits = {"min_crop_size": 256, "max_num_crops": 4, "min_ratio_to_activate": 1.2}
    given = {f"pan_and_scan_{key}": value for key, value in limits.items()}
    wanted = processor(
        images=[sources], text=[render(messages)], do_pan_and_scan=pan_and_scan, return_tensors="np",
        add_special_tokens=False, **given,
    )  # fmt: skip
    options = dataclasses.replace(COMPAT, pan_and_scan=pan_and_scan)
    found = prompts.assemble(chat_parts(messages), tokenizer, config, prompts.MediaOptions(image=options))
    assert found.ids == wanted["input_ids"][0].tolist()
    np.testing.assert_array_equal(found.pixels.transpose(0, 3, 1, 2), wanted["pixel_values"])


def test_text_with_marks_and_images(tokenizer, config):
    marked = ["hi<start_of_image>the", "<start_of_image><start_of_image>", "hello"]
    images = [picture(seed=i) for i in range(3)]
    one, two, none = prompts.assemble_all(marked, images, tokenizer, config, prompts.MediaOptions())
    assert one.ids == [2, *tokenizer.encode("hi", bos=False), TWO, *PLACE, TWO, *tokenizer.encode("the", bos=False)]
    assert (len(one.pixels), len(two.pixels), none.pixels) == (1, 2, None)
    np.testing.assert_array_equal(two.pixels[1], prompts.media.prepare(images[2], 28)[0])
    ready = np.stack([prompts.media.prepare(image, 28)[0] for image in images])
    again = prompts.assemble_all(marked, ready, tokenizer, config, prompts.MediaOptions())
    np.testing.assert_array_equal(again[1].pixels, two.pixels)
    ids = prompts.assemble_all([one.ids], images[:1], None, config, prompts.MediaOptions())[0]
    assert ids.ids == one.ids
    np.testing.assert_array_equal(ids.pixels, one.pixels)


def test_without_images_a_mark_is_text(tokenizer, config):
    (prompt,) = prompts.assemble_all(["a<start_of_image>"], None, tokenizer, config, prompts.MediaOptions())
    assert BEGIN not in prompt.ids
    assert tokenizer.decode(prompt.ids[1:]) == "a<start_of_image>"


def test_soft_tokens_in_a_message_stay_text(tokenizer, config):
    parts = chat_parts([user(picture(), "<image_soft_token><start_of_image>")])
    ids = prompts.assemble(parts, tokenizer, config, prompts.MediaOptions()).ids
    assert (ids.count(BEGIN), ids.count(SOFT)) == (1, COUNT)


@pytest.mark.parametrize(
    ("texts", "count", "words"),
    [
        (["hi"], 1, "1 images were given, but the prompts have 0 places"),
        (["<start_of_image>" * 2], 1, "1 images were given, but the prompts have 2 places"),
        (["<start_of_image>", "hi"], 3, "3 images were given, but the prompts have 1 places"),
        ([""], 0, "the prompt is empty"),
    ],
)
def test_marks_and_images_must_be_as_many(tokenizer, config, texts, count, words):
    with pytest.raises(ValueError, match=words):
        prompts.assemble_all(texts, [picture()] * count, tokenizer, config, prompts.MediaOptions())


def test_what_cannot_be_is_refused(tokenizer, config, make_config):
    with pytest.raises(ValueError, match="has no vision tower"):
        prompts.assemble_all(["<start_of_image>"], [picture()], tokenizer, make_config(), prompts.MediaOptions())
    with pytest.raises(ValueError, match="has no vision tower"):
        prompts.assemble(chat_parts([user(picture())]), tokenizer, make_config(), prompts.MediaOptions())
    with pytest.raises(ValueError, match="pan and scan makes more places"):
        prompts.assemble_all([[2, *PLACE]], [picture()], tokenizer, config, CROPPED)
    with pytest.raises(ChatError, match="a message has an image"):
        encode_chat(tokenizer, [user(picture())])


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"type": "image_url", "image_url": {"url": "/etc/hosts"}}, "wanted a data URL"),
        ({"type": "image_url", "image_url": "http://a/b.png"}, "wanted a data URL"),
        ({"type": "image_url"}, "wanted a data URL"),
        ({"type": "image"}, "a part of type 'image'"),
        ({"type": "input_audio"}, "an input_audio without data"),
        ("text", "a part of type None"),
    ],
)
def test_other_parts_are_refused(part, words):
    with pytest.raises(ChatError, match=words):
        chat_parts([{"role": "user", "content": [part]}])


def test_a_conversation_with_images_can_be_read():
    text = render([user(picture(), " a ", "b")], False)
    assert text == "<bos><start_of_turn>user\n<start_of_image>ab<end_of_turn>\n"
