"""A tiny Gemma 3n with eyes and ears, from texts, images, sounds and videos to tokens."""

import dataclasses
import io
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import gemma_jax as gj
from gemma_jax import matformer, prompts
from gemma_jax.cli.main import main
from gemma_jax.configs.towers import AudioConfig
from gemma_jax.generate.engine import Session, Soft
from gemma_jax.generate.sampling import SamplingParams
from gemma_jax.media import places, video
from gemma_jax.media.audio import AudioError, AudioOptions
from gemma_jax.media.images import ImageOptions
from gemma_jax.media.mel import mel
from gemma_jax.media.video import VideoError, VideoOptions
from gemma_jax.nn.decoder import Decoder
from gemma_jax.text import speech, translategemma
from gemma_jax.text.chat import ChatError, chat_parts, encode_chat, render
from gemma_jax.text.tokenizer import Tokenizer
from tests.parity.test_multimodal_3n import tiny_tower
from tests.vocabulary import PIECES, gguf_metadata

V = len(PIECES)
EARS = AudioConfig(
    num_layers=2, width=16, num_heads=2, channels=(4, 2), num_soft_tokens=8, num_hard_tokens=4,
    first_token=V + 8, begin_token=V - 1, end_token=V + 8, soft_token=V + 9,
)  # fmt: skip
see = jax.jit(lambda model, pixels: model.see(pixels))
hear = jax.jit(lambda model, features, is_valid: model.hear(features, is_valid))
WISHES = {"max_new_tokens": 5, "ignore_eos": True, "temperature": 0.0}


def wave(seconds: float, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).normal(size=round(16_000 * seconds))).astype(np.float32)


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def gemma(make_3n) -> gj.Gemma:
    tokenizer = Tokenizer.from_gguf(gguf_metadata())
    tower = dataclasses.replace(
        tiny_tower(), begin_token=tokenizer.id_of("<start_of_image>"), first_token=V, end_token=V, soft_token=V + 1
    )
    config = dataclasses.replace(make_3n(num_layers=5, num_shared=1), vocab_size=V, vision=tower, audio=EARS)
    return gj.Gemma(config, Decoder(config, rngs=nnx.Rngs(0)), tokenizer)


def greedy(gemma, ids, pixels, waves, count=5):
    """The engine given what the towers make, put together by hand."""
    (index,) = places.soft_indices([ids], gemma.config, len(pixels), len(waves))
    parts = [see(gemma.model, image[None])[0] for image in pixels]
    parts += [hear(gemma.model, *mel([one]))[0] for one in waves]
    soft = Soft(jnp.concatenate(parts), [index])
    plain = np.where(index >= 0, 0, ids).tolist()
    params = [SamplingParams(max_new_tokens=count, ignore_eos=True)]
    return [token for (step,) in Session(gemma.model, [plain], params, [], soft=soft) for token in step.tokens]


def place(tower) -> list[int]:
    return [tower.begin_token, *[tower.soft_token] * tower.num_soft_tokens, tower.end_token]


def test_marks_in_a_text_stand_for_images_and_sounds_in_their_order(gemma):
    text = "the<start_of_audio>user<start_of_image>hello<start_of_image>"
    tokenizer, config = gemma.tokenizer, gemma.config
    newlines = tokenizer.encode("\n\n", bos=False)
    media = [*newlines, *place(config.audio), *newlines], [*newlines, *place(config.vision), *newlines]
    pieces = [tokenizer.encode(word, bos=False) for word in ("the", "user", "hello")]
    ids = [2, *pieces[0], *media[0], *pieces[1], *media[1], *pieces[2], *media[1]]
    (read,) = prompts.assemble_all(
        [text], [picture(0), picture(1)], tokenizer, config, prompts.MediaOptions(), [(wave(0.4), 16_000)]
    )
    assert read.ids == ids
    assert read.pixels.min() >= 0
    done = gemma.generate(text, images=[picture(0), picture(1)], audio=[(wave(0.4), 16_000)], **WISHES)
    assert done.tokens == greedy(gemma, ids, read.pixels, [wave(0.4)])
    again = gemma.generate([ids, [2, 5]], images=[picture(0), picture(1)], audio=[(wave(0.4), 16_000)], **WISHES)
    assert again[0].tokens == done.tokens
    small = matformer.slice(gemma, ffw=40)
    drafted = gemma.generate(
        text, images=[picture(0), picture(1)], audio=[(wave(0.4), 16_000)], draft=small, draft_tokens=2, **WISHES
    )
    assert drafted.tokens == done.tokens
    logits = gemma.logits([ids], read.pixels, [(wave(0.4), 16_000)])
    assert int(logits[0, -1].argmax()) == done.tokens[0]


def test_newlines_merge_with_the_texts_if_wanted(gemma):
    """As transformers' processor writes a place into the text, before that is encoded."""
    options = prompts.MediaOptions(image=ImageOptions(hf_compat=True))
    parts = chat_parts([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "audio", "audio": 1}]}])
    parts = [dataclasses.replace(p, source=(wave(0.2), 16_000)) if hasattr(p, "source") else p for p in parts]
    found = prompts.assemble(parts, gemma.tokenizer, gemma.config, options).ids
    before, after = (gemma.tokenizer.encode(text, bos=False) for text in ("user\na\n\n", "\n\n"))
    at = found.index(EARS.begin_token)
    assert found[:at][-len(before) :] == before
    assert found[at : at + 10] == place(EARS)
    assert found[at + 10 : at + 10 + len(after)] == after


@pytest.mark.parametrize("seconds", [0.01, 0.03, 0.2, 0.77, 1.2])
def test_a_clip_is_heard_as_alone_whatever_fills_it_up(gemma, seconds):
    features, valid = mel([wave(seconds)])
    found = gemma.hear([(wave(seconds), 16_000)])
    assert found.shape == (1, 8, 32)
    if features.shape[1]:
        np.testing.assert_allclose(found, hear(gemma.model, features, valid), atol=2e-5)
    else:
        padding = gemma.model.audio_mm.hard(jnp.asarray(EARS.padding_token))
        np.testing.assert_allclose(found[0], np.tile(padding, (8, 1)), atol=1e-6)


def test_hard_tokens_have_rows_of_their_own(gemma):
    model = gemma.model
    tokens = jnp.asarray([[5, V, V + 8, V + 11]])
    found = model.embed(tokens)[0]
    np.testing.assert_allclose(found[1], model.mm.hard(tokens[0, 1]), atol=1e-6)
    np.testing.assert_allclose(found[2:], model.audio_mm.hard(tokens[0, 2:]), atol=1e-6)
    np.testing.assert_array_equal(found[0], model.embedder.rows(tokens)[0, 0] * np.float32(32**0.5))


def test_chats_take_all_kinds_of_parts(gemma, tmp_path):
    import base64

    import soundfile

    data = io.BytesIO()
    soundfile.write(data, wave(0.3), 16_000, format="WAV")
    (tmp_path / "a.wav").write_bytes(data.getvalue())
    encoded = {"data": base64.b64encode(data.getvalue()).decode(), "format": "wav"}
    ways = [
        {"type": "audio", "audio": str(tmp_path / "a.wav")},
        {"type": "audio", "audio": data.getvalue()},
        {"type": "input_audio", "input_audio": encoded},
    ]
    text = {"type": "text", "text": "hello"}
    answers = [gemma.chat([{"role": "user", "content": [way, text]}], **WISHES).tokens for way in ways]
    assert answers[0] == answers[1] == answers[2]
    film = {"type": "video", "video": [picture(0), picture(1)]}
    pictures = [{"type": "text", "text": "00:00"}, {"type": "image", "image": picture(0)}]
    pictures += [{"type": "text", "text": "00:01"}, {"type": "image", "image": picture(1)}]
    as_film, as_images = (
        gemma.chat([{"role": "user", "content": [*shown, text]}], **WISHES).tokens for shown in ([film], pictures)
    )
    assert as_film == as_images
    pieces = list(gemma.stream_chat([{"role": "user", "content": [ways[0], text]}], **WISHES))
    assert [token for piece in pieces for token in piece.tokens] == answers[0]
    assert "<start_of_audio>hello" in render([{"role": "user", "content": [ways[0], text]}])
    with pytest.raises(ChatError, match="a message has sound"):
        encode_chat(gemma.tokenizer, [{"role": "user", "content": [ways[0]]}])
    with pytest.raises(ChatError, match="input_audio without data"):
        gemma.chat([{"role": "user", "content": [{"type": "input_audio", "input_audio": {"url": "x"}}]}])


def test_a_transcript_is_asked_for_clip_by_clip(gemma):
    options = AudioOptions(long="chunk", max_seconds=0.5)
    (found,) = gemma.transcribe([(wave(1.2), 16_000)], language="en", audio_options=options, **WISHES)
    clips = [wave(1.2)[start : start + 8000] for start in (0, 8000, 16_000)]
    task = {"type": "text", "text": "Transcribe the following speech segment in English:"}
    said = [
        gemma.chat([{"role": "user", "content": [task, {"type": "audio", "audio": (clip, 16_000)}]}], **WISHES).text
        for clip in clips
    ]
    assert found == " ".join(text.strip() for text in said)
    german, english = map(translategemma.language, ("de", "en"))
    assert speech.of_clip(None, None) == "Transcribe the following speech segment:"
    wanted = "Transcribe the following speech segment in German, then translate it into English:"
    assert speech.of_clip(german, english) == wanted
    with pytest.raises(ValueError, match="give the language that is spoken"):
        gemma.transcribe([(wave(0.3), 16_000)], translate_to="en")


def test_what_does_not_fit_is_refused(gemma, tiny_model):
    sound = (wave(0.3), 16_000)
    with pytest.raises(ValueError, match="0 places for clips"):
        gemma.generate("hello", audio=[sound])
    with pytest.raises(ValueError, match="2 places for clips"):
        gemma.generate("<start_of_audio><start_of_audio>", audio=[sound])
    with pytest.raises(ValueError, match="has no audio tower; sound needs a Gemma 3n"):
        gj.Gemma(tiny_model.config, tiny_model, gemma.tokenizer).generate("<start_of_audio>", audio=[sound])
    with pytest.raises(AudioError, match="array without a rate"):
        gemma.hear([wave(0.3)])
    with pytest.raises(ValueError, match="there are 3 audio tokens"):
        gemma.logits([[2, *[EARS.soft_token] * 3]], audio=[sound])
    with pytest.raises(ValueError, match=f"id {V + 12} at place 1; wanted 0 to {V + 11}"):
        gemma.generate([2, V + 12])


def film(seconds=2.5, rate=10, size=(48, 32)) -> bytes:
    av = pytest.importorskip("av")
    data = io.BytesIO()
    with av.open(data, mode="w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for i in range(round(seconds * rate)):
            image = np.full((size[1], size[0], 3), 10 * i % 250, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return data.getvalue()


def test_a_video_is_its_first_image_each_second(tmp_path):
    data = film()
    frames = video.read(data)
    assert [frame.clock for frame in frames] == ["00:00", "00:01", "00:02"]
    assert [round(float(frame.image.mean()) / 10) for frame in frames] == [0, 10, 20]
    assert frames[0].image.shape == (32, 48, 3)
    (tmp_path / "a.mp4").write_bytes(data)
    assert len(video.read(tmp_path / "a.mp4", VideoOptions(rate=4.0))) == 10
    assert [frame.clock for frame in video.read(data, VideoOptions(rate=4.0, max_frames=2))] == ["00:00", "00:01"]


def test_bad_videos_are_refused(tmp_path):
    data = film()
    sound = pytest.importorskip("soundfile")
    heard = io.BytesIO()
    sound.write(heard, wave(0.2), 16_000, format="WAV")
    for bad, words in (
        (b"no video at all", "cannot be read, it is no video or damaged"),
        (data[:40], "cannot be read"),
        (heard.getvalue(), "has no images"),
        (5, "a video is a int"),
        ([], "an empty list"),
        ([picture()] * 40, "at most 32 are read"),
    ):
        with pytest.raises(VideoError, match=words):
            video.read(bad)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        video.read("https://example.org/a.mp4")
    for options, words in (
        (VideoOptions(max_seconds=1.0), "is 2 s long; at most 1 s"),
        (VideoOptions(max_pixels=1000), "images of 1,536 pixels"),
        (VideoOptions(max_bytes=100), "at most 100 are read"),
    ):
        with pytest.raises(VideoError, match=words):
            video.read(data, options)
    with pytest.raises(ValueError, match="rate is 0"):
        VideoOptions(rate=0)
    random = np.random.default_rng(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(60):
            broken = bytearray(data)
            for at in random.integers(0, len(data), 5):
                broken[at] = int(random.integers(0, 256))
            try:
                assert len(video.read(bytes(broken))) <= 32
            except VideoError:
                continue


@pytest.mark.slow
def test_the_command_line_hears_and_sees(gemma, tmp_path, capsys, monkeypatch):
    import json

    import soundfile

    gemma.save(tmp_path / "model")
    soundfile.write(tmp_path / "a.wav", wave(0.3), 16_000)
    (tmp_path / "a.mp4").write_bytes(film(1.5))
    options = ["--model", str(tmp_path / "model"), "-n", "3", "--json", "--no-compilation-cache"]
    assert main(["transcribe", str(tmp_path / "a.wav"), "--language", "en", *options]) == 0
    report = json.loads(capsys.readouterr().out)
    (said,) = gemma.transcribe([tmp_path / "a.wav"], language="en", max_new_tokens=3)
    assert report["transcripts"] == [{"sound": str(tmp_path / "a.wav"), "text": said}]
    assert main(["generate", "the<start_of_audio>", "--audio", str(tmp_path / "a.wav"), *options]) == 0
    (done,) = json.loads(capsys.readouterr().out)["completions"]
    want = gemma.generate("the<start_of_audio>", audio=[tmp_path / "a.wav"], max_new_tokens=3)
    assert done["tokens"] == want.tokens
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    shown = ["--audio", str(tmp_path / "a.wav"), "--video", str(tmp_path / "a.mp4")]
    assert main(["chat", *shown, "-t", "0", *options]) == 0
    answer = json.loads(capsys.readouterr().out)["text"]
    content = [
        {"type": "audio", "audio": tmp_path / "a.wav"},
        {"type": "video", "video": tmp_path / "a.mp4"},
        {"type": "text", "text": "hello"},
    ]
    wanted = gemma.chat([{"role": "user", "content": content}], temperature=0.0, max_new_tokens=3)
    assert answer == wanted.text
    assert main(["transcribe", "nothing.wav", *options]) == 1
    assert "does not exist" in capsys.readouterr().err
