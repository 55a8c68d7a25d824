"""Sound from files, bytes, URLs and arrays; and what becomes of files that are not what they say."""

import base64
import contextlib
import io
import math
import struct
import time
import tracemalloc
import warnings

import numpy as np
import pytest

from gemma_jax.media import audio, mel
from gemma_jax.media.audio import AudioError, AudioOptions

soundfile = pytest.importorskip("soundfile")
soxr = pytest.importorskip("soxr")
RATE = 16_000


def tone(seconds=0.5, rate=RATE, channels=1, frequency=440.0):
    """[samples, channels], each channel fainter than the one before."""
    wave = 0.5 * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)
    return (wave[:, None] / np.arange(1, channels + 1)).astype(np.float32)


def encoded(wave, rate=RATE, format="WAV", subtype=None):
    data = io.BytesIO()
    soundfile.write(data, wave, rate, format=format, subtype=subtype)
    return data.getvalue()


def wav(payload=b"", *, rate=RATE, channels=1, bits=16, claimed=None, kind=1):
    """A WAV file by hand, whose header may say anything."""
    frame = channels * bits // 8
    fields = (kind, channels & 0xFFFF, rate, rate * frame & 0xFFFFFFFF, frame & 0xFFFF, bits)
    size = len(payload) if claimed is None else claimed
    head = (
        b"RIFF" + struct.pack("<I", 36 + size & 0xFFFFFFFF) + b"WAVE" + struct.pack("<4sIHHIIHH", b"fmt ", 16, *fields)
    )
    return head + b"data" + struct.pack("<I", size) + payload


def test_one_sound_from_every_kind_of_source(tmp_path):
    data = encoded(tone(), subtype="FLOAT")
    (tmp_path / "a.wav").write_bytes(data)
    text = base64.b64encode(data).decode()
    found = [
        audio.read(source)
        for source in (
            (tone(), RATE),
            (RATE, tone()),
            (tone()[:, 0].astype(np.float64), np.int64(RATE)),
            tmp_path / "a.wav",
            str(tmp_path / "a.wav"),
            data,
            memoryview(data),
            f"data:audio/wav;base64,{text}",
            f"data:audio/x-wav;codecs=1;base64,{text}",
            {"data": text, "format": "wav"},
        )
    ]
    for wave in found:
        assert wave.dtype == np.float32
        np.testing.assert_array_equal(wave, tone()[:, 0])


@pytest.mark.parametrize(("format", "subtype"), [("WAV", None), ("WAV", "FLOAT"), ("FLAC", None), ("RF64", None)])
def test_formats_without_loss(format, subtype):
    np.testing.assert_allclose(audio.read(encoded(tone(), RATE, format, subtype)), tone()[:, 0], atol=1 / 32_000)


@pytest.mark.parametrize(("format", "subtype"), [("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", None)])
@pytest.mark.parametrize("rate", [16_000, 48_000])
def test_formats_with_loss(format, subtype, rate):
    wave = audio.read(encoded(tone(1.0, rate), rate, format, subtype))
    assert abs(len(wave) - RATE) <= 2400  # MP3 pads
    spectrum = np.abs(np.fft.rfft(wave := wave[2000:14_000]))
    assert np.argmax(spectrum) == pytest.approx(440 * 12_000 / RATE, abs=1)
    assert wave.std() == pytest.approx(0.5 * 2**-0.5, abs=0.03)


@pytest.mark.parametrize(("subtype", "step"), [("PCM_U8", 1 / 128), ("PCM_24", 1e-6), ("PCM_32", 1e-6), ("ULAW", 0.02)])
def test_widths_of_samples(subtype, step):
    np.testing.assert_allclose(audio.read(encoded(tone(), subtype=subtype)), tone()[:, 0], atol=1.01 * step)


@pytest.mark.parametrize("dtype", ["int16", "int32", "uint8", "float64", "float16"])
def test_arrays_of_numbers(dtype):
    wave = tone()[:, 0].astype(np.float64)
    scale, zero, step = {
        "int16": (2**15, 0, 2**-15), "int32": (2**31, 0, 1e-7), "uint8": (128, 128, 2**-7)
    }.get(dtype, (1, 0, 1e-3))  # fmt: skip
    np.testing.assert_allclose(audio.read(((wave * scale + zero).astype(dtype), RATE)), wave, atol=1.01 * step)


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000, 192_000])
def test_other_rates_are_resampled(rate):
    wave = audio.read(encoded(tone(5.0, rate), rate, subtype="FLOAT"))
    assert len(wave) == pytest.approx(5 * RATE, abs=1)
    np.testing.assert_allclose(wave[800:79_000], tone(5.0)[800:79_000, 0], atol=1e-3)
    np.testing.assert_allclose(wave, soxr.resample(tone(5.0, rate)[:, 0], rate, RATE)[: len(wave)], atol=1e-5)


@pytest.mark.parametrize("channels", [2, 8])
def test_channels_are_averaged(channels):
    wave = tone(channels=channels)
    np.testing.assert_allclose(audio.read(encoded(wave, subtype="FLOAT")), wave.mean(axis=1), atol=1e-7)
    np.testing.assert_allclose(audio.read((wave, RATE)), wave.mean(axis=1), atol=1e-7)


@pytest.mark.parametrize("rate", [RATE, 44_100])
def test_long_sound_is_cut_with_a_warning_refused_or_given_in_clips(rate):
    wave = tone(2.5, rate)
    for source in ((wave, rate), encoded(wave, rate, subtype="FLOAT")):
        with pytest.warns(UserWarning, match="longer than 1 s; the rest is cut off"):
            cut = audio.clips(source, AudioOptions(max_seconds=1))
        assert [len(clip) for clip in cut] == [RATE]
        with pytest.raises(AudioError, match=r"longer than 1 s \(max_seconds\); long='cut' keeps"):
            audio.read(source, AudioOptions(max_seconds=1, long="error"))
        chunks = audio.clips(source, AudioOptions(max_seconds=1, long="chunk"))
        assert [len(clip) for clip in chunks] == [RATE, RATE, RATE // 2]
        np.testing.assert_array_equal(np.concatenate(chunks), audio.read(source))
        with pytest.raises(AudioError, match=r"longer than 2 s \(max_total_seconds\)"):
            audio.clips(source, AudioOptions(max_seconds=1, long="chunk", max_total_seconds=2))


def test_exactly_30_seconds_are_not_long_and_fill_188_soft_tokens():
    wave = audio.read((np.zeros(30 * RATE, np.int16), RATE), AudioOptions(long="error"))
    count = mel.mel([wave])[0].shape[1]
    for stride in (2, 2, 4):
        count = math.ceil(count / stride)
    assert count == 188
    with pytest.raises(AudioError, match="longer than 30 s"):
        audio.read((np.zeros(30 * RATE + 1, np.int16), RATE), AudioOptions(long="error"))


def test_a_rest_without_a_frame_is_left_out():
    options = AudioOptions(max_seconds=1, long="chunk")
    assert [len(clip) for clip in audio.clips((tone(1.02), RATE), options)] == [RATE]
    assert [len(clip) for clip in audio.clips((tone(0.02), RATE), options)] == [320]


BAD = {
    "text": (b"hello, this is no sound", "no sound that can be read"),
    "empty": (b"", "no sound that can be read"),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(100), "no sound that can be read"),
    "another format of libsndfile": (b".snd" + bytes(100), "no sound that can be read"),
    "riff only": (b"RIFF", "no sound that can be read"),
    "wave without chunks": (b"RIFF\x00\x00\x00\x00WAVE", "cannot be decoded"),
    "flac of nothing": (b"fLaC" + bytes(50), "cannot be decoded"),
    "ogg of nothing": (b"OggS" + bytes(50), "cannot be decoded"),
    "mp3 of nothing": (b"ID3" + bytes(50), "cannot be decoded"),
    "no samples": (wav(), "holds no samples"),
    "rate of 2^31": (wav(bytes(100), rate=2**31 - 1), "samples per second|cannot be decoded"),
    "rate of 1": (wav(bytes(100), rate=1), "1 samples per second"),
    "rate of 0": (wav(bytes(100), rate=0), "samples per second|cannot be decoded"),
    "1000 channels": (wav(bytes(20_000), channels=1000), "1000 channels"),
    "70,000 channels": (wav(bytes(20_000), channels=65_535), "channels|cannot be decoded"),
    "0 channels": (wav(bytes(100), channels=0), "cannot be decoded"),
    "NaN": (wav(np.array([0, 0.5, np.nan], np.float32).tobytes(), bits=32, kind=3), "sample 2 is nan"),
    "infinity": (wav(np.array([0, np.inf], np.float32).tobytes(), bits=32, kind=3), "sample 1 is inf"),
    "float of grey levels": (wav(np.array([0, 4e3], np.float32).tobytes(), bits=32, kind=3), "sample 1 is 4000"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_with_the_reason(name):
    data, message = BAD[name]
    with pytest.raises(AudioError, match=message):
        audio.read(data)


@pytest.mark.parametrize("claimed", [2**32 - 1, 2**31, 10**6])
def test_a_header_that_claims_too_much_costs_neither_memory_nor_time(claimed):
    data = wav(bytes(3200), claimed=claimed)
    tracemalloc.start()
    began = time.perf_counter()
    wave = audio.read(data)
    assert len(wave) == 1600
    assert tracemalloc.get_traced_memory()[1] < 8e6
    tracemalloc.stop()
    assert time.perf_counter() - began < 5


def test_a_flac_that_claims_days_costs_neither_memory_nor_time():
    data = bytearray(encoded(tone(), format="FLAC"))
    data[8 + 13] |= 0x0F  # STREAMINFO's number of samples: 36 bits
    data[8 + 14 : 8 + 18] = b"\xff\xff\xff\xff"
    tracemalloc.start()
    with contextlib.suppress(AudioError):
        assert len(audio.read(bytes(data))) == 8000
    assert tracemalloc.get_traced_memory()[1] < 8e6
    tracemalloc.stop()


def test_of_a_long_file_no_more_is_decoded_than_is_kept(monkeypatch):
    data = encoded(np.zeros(120 * RATE, np.int16), format="FLAC")
    read, blocks = audio._decoded, []
    monkeypatch.setattr(audio, "_decoded", lambda file: (blocks.append(len(b)) or b for b in read(file)))
    with pytest.warns(UserWarning, match="longer than 30 s"):
        assert len(audio.read(data)) == 30 * RATE
    assert sum(blocks) <= 30 * RATE + audio.BLOCK


@pytest.mark.parametrize("format", ["WAV", "FLAC", "OGG", "MP3"])
def test_damaged_files_give_a_clear_error_or_some_sound(format):
    whole = encoded(tone(0.5), format=format)
    random = np.random.default_rng(0)
    for i in range(60):
        data = bytearray(whole[: random.integers(1, len(whole))] if i % 2 else whole)
        for place in random.integers(0, len(data), 4):
            data[place] = random.integers(256)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            try:
                wave = audio.read(bytes(data))
            except AudioError:
                continue
        assert np.isfinite(wave).all()
        assert len(wave) <= 30 * RATE


OTHERS = [
    (np.zeros(9, np.float32), "array without a rate"),
    ((np.zeros(9, np.float32), "fast"), "rate of a sound is 'fast'"),
    ((np.zeros(9, np.float32), float("nan")), "rate of a sound is nan"),
    ((np.zeros(9, np.float32), 16_000.5), "rate of a sound is 16000.5"),
    ((np.zeros(9, np.int64), RATE), "array of int64"),
    ((np.zeros(9, complex), RATE), "array of complex128"),
    ((np.zeros((1, 2, 3), np.float32), RATE), r"shape \(1, 2, 3\)"),
    ((np.zeros((2, 9000), np.float32), RATE), r"9000 channels.*\[samples, channels\]"),
    ((np.zeros((9, 0), np.float32), RATE), "0 channels"),
    ((np.zeros(0, np.float32), RATE), "holds no samples"),
    ((np.array([0, 1e300]), RATE), "sample 1 is inf"),
    ((np.array([0, np.nan]), 44_100), "sample 1 is nan"),
    ((np.zeros(9, np.float32), 10), "10 samples per second"),
    (17, "the sound is a int"),
    ("https://example.com/a.wav", "nothing is fetched"),
    ("A" * 5000, "too long for a path"),
    ("data:text/plain;base64,AAAA", "wanted data:audio"),
    ("data:audio/wav;base64,A*A", "is not base64"),
    ({"data": "AAAA"}, "format is None"),
    ({"data": "AAAA", "format": "aiff"}, "format is 'aiff'"),
    ({"data": 5, "format": "wav"}, "wanted data"),
    ({"url": "a"}, "has the keys"),
]


@pytest.mark.parametrize(("source", "message"), OTHERS)
def test_what_is_no_sound_is_refused_with_the_reason(source, message):
    with pytest.raises(AudioError, match=message):
        audio.read(source)


def test_a_missing_file_is_said_to_be_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.wav"):
        audio.read(tmp_path / "none.wav")


def test_large_files_are_not_read(tmp_path):
    (tmp_path / "a.wav").write_bytes(data := encoded(tone()))
    text = base64.b64encode(data).decode()
    for source in (tmp_path / "a.wav", data, f"data:audio/wav;base64,{text}", {"data": text, "format": "wav"}):
        with pytest.raises(AudioError, match="at most 1,000 are read"):
            audio.read(source, AudioOptions(max_bytes=1000))


@pytest.mark.parametrize(
    "wrong",
    [{"long": "split"}, {"max_seconds": 0}, {"max_seconds": "30"}, {"max_bytes": 0}, {"max_total_seconds": 1e9}],
)
def test_wrong_options_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        AudioOptions(**wrong)


def test_several_sounds_or_one_are_a_list():
    pair = (np.zeros(9, np.float32), RATE)
    assert audio.sources(None) == []
    assert audio.sources("a.wav") == ["a.wav"]
    assert audio.sources(pair) == [pair]
    assert audio.sources([pair, "a.wav"]) == [pair, "a.wav"]
    assert audio.sources(["a.wav", "b.wav"]) == ["a.wav", "b.wav"]
    with pytest.raises(AudioError, match="array with its rate"):
        audio.sources(np.zeros(9))


def test_without_the_extra_arrays_at_16_khz_work_and_files_say_what_to_install(monkeypatch):
    data = encoded(tone())
    monkeypatch.setitem(__import__("sys").modules, "soundfile", None)
    monkeypatch.setitem(__import__("sys").modules, "soxr", None)
    np.testing.assert_array_equal(audio.read((tone(), RATE)), tone()[:, 0])
    with pytest.raises(ImportError, match=r"gemma-jax\[audio\]"):
        audio.read(data)
    with pytest.raises(ImportError, match=r"gemma-jax\[audio\]"):
        audio.read((tone(), 8_000))
