"""The verbs that take images or make vectors, on tiny models that are saved and loaded again."""

import dataclasses
import io
import json

import numpy as np
import pytest
from flax import nnx
from PIL import Image

import gemma_jax as gj
from gemma_jax.cli.main import main
from gemma_jax.configs.config import VisionConfig
from gemma_jax.media.images import ImageOptions
from gemma_jax.text import shieldgemma
from gemma_jax.text.tokenizer import Tokenizer
from tests.vocabulary import MERGES, PIECES, huggingface_data

WORDS = ["Yes", "No"]  # what ShieldGemma answers, behind the vocabulary of all tests
TOWER = VisionConfig(
    num_layers=1,
    width=16,
    num_heads=2,
    ffw_width=16,
    patch_size=7,
    image_size=28,
    num_soft_tokens=4,
    soft_token=len(PIECES) + 4,
    begin_token=PIECES.index("<start_of_image>"),
    end_token=PIECES.index("<end_of_image>"),
)


def tokenizer():
    data = huggingface_data()
    vocab = {**data["model"]["vocab"], "Ye": len(PIECES), "Yes": len(PIECES) + 1, "No": len(PIECES) + 2}
    merges = [*data["model"]["merges"], ["Y", "e"], ["Ye", "s"], ["N", "o"]]
    added = [token for token in data["added_tokens"] if token["content"] != "<image_soft_token>"]
    return Tokenizer.from_huggingface(
        {"model": {**data["model"], "vocab": vocab, "merges": merges}, "added_tokens": added}
    )


def saved(folder, config, with_random_norms):
    model = with_random_norms(gj.Decoder(config, rngs=nnx.Rngs(0)))
    gj.Gemma(config, model, tokenizer()).save(folder)
    return folder


@pytest.fixture(scope="module")
def seeing(tmp_path_factory, make_config, with_random_norms):
    config = dataclasses.replace(make_config("seeing", vocab_size=len(PIECES) + 3, num_layers=3), vision=TOWER)
    return saved(
        tmp_path_factory.mktemp("media") / "seeing", dataclasses.replace(config, context=4096), with_random_norms
    )


@pytest.fixture(scope="module")
def embedding(tmp_path_factory, make_config, with_random_norms):
    config = make_config("embedding", vocab_size=len(PIECES) + 3, num_layers=3)
    config = config.replace_all([("attention.is_causal", False), ("dense_widths", (48, 24))])
    return saved(tmp_path_factory.mktemp("media") / "embedding", config, with_random_norms)


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 700, 3), np.uint8)).save(path)
    return path


def run(capsys, *arguments):
    code = main([*map(str, arguments), "--no-compilation-cache"])
    out, err = capsys.readouterr()
    return code, out, err


def test_generate_and_chat_see_images(capsys, monkeypatch, seeing, picture):
    gemma = gj.load(seeing)
    want = gemma.generate("hi<start_of_image>the", images=[picture], max_new_tokens=4).text
    given = ("--model", seeing, "--image", picture)
    code, out, _ = run(capsys, "generate", "hi<start_of_image>the", "-n", 4, *given)
    assert (code, out) == (0, f"hi<start_of_image>the{want}\n")
    parts = [{"type": "image", "image": picture}, {"type": "text", "text": "hello"}]
    want = gemma.chat([{"role": "user", "content": parts}], max_new_tokens=4, temperature=0.0).text
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    code, out, _ = run(capsys, "chat", "-n", 4, "-t", 0, *given)
    assert (code, out) == (0, f"{want}\n")
    cut = ImageOptions(pan_and_scan=True)
    crops = gemma.chat([{"role": "user", "content": parts}], max_new_tokens=4, temperature=0.0, image_options=cut)
    assert crops.prompt_tokens > 2 * TOWER.num_soft_tokens
    streamed = list(gemma.stream_chat([{"role": "user", "content": parts}], max_new_tokens=4, temperature=0.0))
    assert "".join(piece.text for piece in streamed) == want


def test_what_cannot_be_seen_is_bad_usage(capsys, seeing, picture, tmp_path, model_folder):
    code, _, err = run(capsys, "generate", "hi", "--model", seeing, "--image", picture)
    assert code == 2
    assert "1 images were given, but the prompts have 0 places" in err
    code, _, err = run(capsys, "generate", "<start_of_image>", "--model", seeing, "--image", tmp_path / "none.png")
    assert code == 1
    assert "does not exist" in err
    code, _, err = run(capsys, "generate", "<start_of_image>", "--model", model_folder, "--image", picture)
    assert code == 2
    assert "has no vision tower" in err


def test_classify_gives_a_probability_for_each_policy(capsys, seeing, picture):
    gemma = gj.load(seeing)
    found = gemma.classify_image(picture)
    assert list(found) == ["dangerous", "sexual", "violence"]
    code, out, _ = run(capsys, "classify", picture, "--model", seeing, "--policy", "violence", "--policy", "x=No hats.")
    assert code == 0
    assert [line.split()[1] for line in out.splitlines()] == ["violence", "x"]
    assert float(out.split()[0]) == pytest.approx(found["violence"], abs=6e-5)
    report = json.loads(run(capsys, "classify", picture, "--model", seeing, "--json")[1])
    assert report["violated"] == pytest.approx(found)


def test_the_probability_is_that_of_the_plain_forward(seeing, picture):
    """Of Yes against No at the last place of the literal prompt, image merged as transformers does."""
    from gemma_jax import prompts

    gemma = gj.load(seeing)
    options = prompts.MediaOptions(image=ImageOptions(hf_compat=True))
    read = prompts.assemble(shieldgemma.prompt(picture, "No hats."), gemma.tokenizer, gemma.config, options)
    logits = np.asarray(gemma.logits([read.ids], read.pixels))[0, -1]
    yes, no = (logits[gemma.tokenizer.id_of(word)] for word in WORDS)
    found = gemma.classify_image(picture, {"hats": "No hats."})
    assert found["hats"] == pytest.approx(float(np.exp(yes) / (np.exp(yes) + np.exp(no))), abs=1e-5)
    text = gemma.tokenizer.decode([i for i in read.ids if i != TOWER.soft_token])
    assert text.startswith(
        "<bos><start_of_turn>user\n\n\n<start_of_image><end_of_image>\n\n<start_of_turn>user\nYou are"
    )
    assert text.endswith("start with 'Yes' or 'No'.<end_of_turn>\n<start_of_turn>model\n")


@pytest.mark.parametrize(
    ("policies", "words"),
    [([], "is empty"), (["hats"], "no policy 'hats'"), ("violence", "wanted a list"), ({"x": " "}, "policy 'x'")],
)
def test_other_policies_are_refused(seeing, picture, policies, words):
    with pytest.raises(ValueError, match=words):
        gj.load(seeing).classify_image(picture, policies)


def test_embed_gives_unit_vectors(capsys, embedding):
    gemma = gj.load(embedding)
    texts = ["hello world", "the user", "a", "hello " * 20]
    found = gemma.embed(texts)
    assert found.shape == (4, 24)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    for text, vector in zip(texts, found, strict=True):  # whatever stands in the batch
        np.testing.assert_allclose(gemma.embed(text), vector, atol=1e-5)
    ids = [*gemma.tokenizer.encode("hello world"), gemma.tokenizer.eos_id]
    states = np.asarray(gemma.hidden_states([ids]))[-1, 0].mean(axis=0)
    for layer in gemma.model.dense:
        states = states @ np.asarray(layer.kernel[...])
    np.testing.assert_allclose(found[0], states / np.linalg.norm(states), atol=1e-5)
    short = gemma.embed(texts, dim=8)
    np.testing.assert_allclose(short, found[:, :8] / np.linalg.norm(found[:, :8], axis=1, keepdims=True), atol=1e-5)
    code, out, _ = run(capsys, "embed", *texts, "--model", embedding, "--dim", 8)
    assert code == 0
    np.testing.assert_allclose([list(map(float, line.split())) for line in out.splitlines()], short, atol=1e-5)
    line = json.loads(run(capsys, "embed", "a", "--model", embedding, "--json", "--task", "query")[1])
    np.testing.assert_allclose(line["embedding"], gemma.embed("task: search result | query: a"), atol=1e-5)


def test_prompts_of_documents_have_titles(embedding):
    gemma = gj.load(embedding)
    plain = gemma.embed("a", task="document", title="T")
    np.testing.assert_array_equal(plain, gemma.embed("title: T | text: a"))
    np.testing.assert_array_equal(gemma.embed("a", task="document"), gemma.embed("title: none | text: a"))
    assert gemma.embed([]).shape == (0, 24)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"dim": 0}, "dim is 0; wanted 1 to 24"),
        ({"dim": 25}, "dim is 25"),
        ({"task": "search"}, "task is 'search'; wanted one of query"),
        ({"title": "T"}, "only documents have titles"),
    ],
)
def test_other_embeddings_are_refused(embedding, given, words):
    with pytest.raises(ValueError, match=words):
        gj.load(embedding).embed("a", **given)


def test_long_texts_are_refused_or_cut(embedding, seeing):
    gemma = gj.load(embedding)
    text = "a " * 400
    with pytest.raises(ValueError, match="reads at most 320"):
        gemma.embed(text)
    assert gemma.embed(text, truncate=True).shape == (24,)
    with pytest.raises(ValueError, match="has no layers that make an embedding"):
        gj.load(seeing).embed("a")


def test_words_are_tokens():
    assert [tokenizer().id_of(word) for word in WORDS] == [len(PIECES) + 1, len(PIECES) + 2]
    assert len(MERGES) > 0
