"""The spectrogram. Oracles: transformers' feature extractor and the specification's numbers (gemma3n.md, 6.1)."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_jax.configs import mel as sizes
from gemma_jax.media import mel as numpy_mel
from gemma_jax.nn.audio.mel import mel as jax_mel

RATE = sizes.SAMPLE_RATE
FIXTURE = Path(__file__).parent.parent / "fixtures" / "gemma3n_mel.npz"


def speech(seconds, seed=0):
    """Something like speech: a buzzing voice of changing pitch through moving formants, with hisses and pauses."""
    random = np.random.default_rng(seed)
    count = round(seconds * RATE)
    time = np.arange(count) / RATE
    pitch = 2 * np.pi * np.cumsum(120 + 30 * np.sin(2 * np.pi * 1.3 * time + seed)) / RATE
    wave = 0.01 * random.normal(size=count)
    for k in range(1, 40):
        formants = [500 + 200 * np.sin(2 * np.pi * 3.1 * time), 1500 + 500 * np.sin(2 * np.pi * 2.3 * time), 2700]
        gain = sum(np.exp(-(((120 * k - f) / 250) ** 2)) for f in formants)
        wave = wave + (0.1 * gain + 0.02 / k) * np.sin(k * pitch)
    is_loud = np.sin(2 * np.pi * 1.7 * time) > -0.6
    return (wave * (0.02 + is_loud) + 0.05 * random.normal(size=count) * ~is_loud).astype(np.float32)


def signals():
    noise = np.random.default_rng(1).normal(size=2 * RATE)
    return {
        "speech": speech(2.0),
        "noise": (0.3 * noise).astype(np.float32),
        "faint": (1e-6 * noise).astype(np.float32),
        "silence": np.zeros(RATE, np.float32),
        "clipped": np.clip(8 * speech(1.5, seed=3), -1, 1),
        "0.04 s": speech(0.04),
    }


@pytest.fixture(scope="module")
def extractor():
    gemma3n = pytest.importorskip("transformers.models.gemma3n.feature_extraction_gemma3n")
    return gemma3n.Gemma3nAudioFeatureExtractor()


def assert_near(found, want):
    """What a float32 transform may differ by from one in float64: 1e-6 of a frame's loudest bin, and the logarithm."""
    assert found.dtype == np.float32
    assert np.quantile(np.abs(found - want), 0.999) <= 5e-5
    found, want = np.exp(found, dtype=np.float64), np.exp(want, dtype=np.float64)
    loudest = want.max(axis=-1, keepdims=True, initial=0)
    assert (np.abs(found - want) <= 1e-6 * loudest + 2e-5 * want).all()


def jax_form(waves):
    lengths = np.array([len(wave) for wave in waves])
    batch = np.stack([np.pad(wave, (0, lengths.max() - len(wave))) for wave in waves])
    features, is_valid = jax.jit(jax_mel)(jnp.asarray(batch), jnp.asarray(lengths))
    return np.asarray(features), np.asarray(is_valid)


@pytest.mark.parity
@pytest.mark.parametrize("name", signals())
def test_features_are_transformers_bit_for_bit(extractor, name):
    wave = signals()[name]
    want = extractor([wave])
    features, is_valid = numpy_mel.mel([wave])
    assert features.dtype == np.float32
    np.testing.assert_array_equal(features[0], want["input_features"][0])
    np.testing.assert_array_equal(is_valid[0], want["input_features_mask"][0])
    features, is_valid = jax_form([wave])
    assert_near(features[0], want["input_features"][0])
    np.testing.assert_array_equal(is_valid[0], want["input_features_mask"][0])


@pytest.mark.parity
def test_a_padded_batch_and_its_mask_are_transformers(extractor):
    waves = [speech(0.7), speech(1.9, seed=1), speech(0.03, seed=2), np.zeros(4000, np.float32)]
    want = extractor(waves)
    for form in (numpy_mel.mel, jax_form):
        features, is_valid = form(waves)
        assert_near(features, np.stack(want["input_features"]))
        np.testing.assert_array_equal(is_valid, np.stack(want["input_features_mask"]))


@pytest.mark.slow
@pytest.mark.parity
def test_a_clip_of_30_seconds_is_transformers(extractor):
    wave = speech(30.0)
    want = extractor([wave])["input_features"][0]
    assert want.shape == (2997, 128)
    np.testing.assert_array_equal(numpy_mel.mel([wave])[0][0], want)
    assert_near(jax_form([wave])[0][0], want)


@pytest.mark.parity
def test_filters_and_window_are_transformers(extractor):
    np.testing.assert_array_equal(sizes.filters(), extractor.mel_filters)
    np.testing.assert_array_equal(sizes.window(), extractor.window)


def test_filters_sum_to_the_specifications_number():
    assert sizes.filters().shape == (513, 128)
    assert sizes.filters().sum() == pytest.approx(473.2006, abs=1e-4)


@pytest.mark.parametrize(("seconds", "frames"), [(1, 97), (5, 497), (30, 2997)])
def test_so_many_seconds_give_so_many_frames(seconds, frames):
    assert sizes.num_frames(sizes.padded(seconds * RATE)) == frames


@pytest.mark.parametrize("count", [1, 480, 512])
def test_a_clip_shorter_than_a_frame_has_no_frames(count):
    for form in (numpy_mel.mel, jax_form):
        features, is_valid = form([np.ones(count, np.float32)])
        assert features.shape == (1, 0, 128)
        assert is_valid.shape == (1, 0)


def test_silence_is_the_floor_and_a_tone_peaks_where_it_is():
    features, _ = numpy_mel.mel([np.zeros(2000, np.float32)])
    np.testing.assert_allclose(features, np.log(1e-5))
    tone = np.sin(2 * np.pi * 1000 * np.arange(4000) / RATE).astype(np.float32)
    peak = np.argmax(numpy_mel.mel([tone])[0][0, 5])
    assert np.argmax(sizes.filters()[64]) == peak  # 1000 Hz is 64 of 15.625 Hz


def test_the_two_forms_agree_and_padding_beyond_a_length_is_silence():
    waves = [speech(0.6), speech(0.4, seed=1)]
    lengths = jnp.asarray([len(wave) for wave in waves])
    batch = np.full((2, len(waves[0])), 0.5, np.float32)
    for row, wave in zip(batch, waves, strict=True):
        row[: len(wave)] = wave
    features, is_valid = jax.jit(jax_mel)(jnp.asarray(batch), lengths)
    want, want_valid = numpy_mel.mel(waves)
    assert_near(features, want)
    np.testing.assert_array_equal(is_valid, want_valid)


def test_of_a_loud_tone_the_forms_differ_where_it_drowns_the_rest_by_what_rounding_explains():
    tone = (0.9 * np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)).astype(np.float32)
    want, found = (np.exp(form([tone])[0].astype(np.float64)) for form in (numpy_mel.mel, jax_form))
    assert (np.abs(found - want) <= 1e-6 * want.max(axis=-1, keepdims=True) + 2e-5 * want).all()


def test_features_are_those_of_the_fixture():
    with np.load(FIXTURE) as file:
        wave, want, mask = file["waveform"], file["features"], file["mask"]
    for form in (numpy_mel.mel, jax_form):
        features, is_valid = form([wave])
        np.testing.assert_allclose(features[0], want, atol=5e-5)
        np.testing.assert_array_equal(is_valid[0], mask)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 3000), min_size=1, max_size=8))
def test_a_spectrogram_made_in_pieces_is_that_of_the_whole(lengths):
    wave = np.random.default_rng(sum(lengths)).normal(size=sum(lengths)).astype(np.float32)
    stream, found = numpy_mel.MelStream(), []
    for i, piece in enumerate(np.split(wave, np.cumsum(lengths)[:-1])):
        stream, features = numpy_mel.step(stream, piece, is_last=i == len(lengths) - 1)
        found.append(features)
    np.testing.assert_array_equal(np.concatenate(found), numpy_mel.mel([wave])[0][0])


@pytest.mark.parametrize("waves", [[], [np.zeros((2, 9))], [np.float32(1)]])
def test_what_is_no_list_of_clips_is_refused(waves):
    with pytest.raises(ValueError, match="wanted one or more of"):
        numpy_mel.mel(waves)
