"""From sound at 16 kHz to the log-mel spectrogram that the conformer takes (specification of Gemma 3n, 6.1)."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float

from gemma_jax.configs.mel import (
    FFT,
    FLOOR,
    FRAME,
    HOP,
    NUM_BINS,
    PREEMPHASIS,
    filters,
    num_frames,
    padded,
    window,
)


def mel(waves: Sequence[np.ndarray]) -> tuple[Float[np.ndarray, "B T bins"], Bool[np.ndarray, "B T"]]:
    """Clips at 16 kHz as natural logarithms of magnitudes, float32, and which frames are valid: begin inside the clip.

    Bit for bit what transformers' Gemma3nAudioFeatureExtractor gives, but that nothing is cut here: `media.audio` does
    that. Shorter clips are followed by silence up to the longest, whose length is rounded up to 128 samples; so a clip
    in a batch may have up to four valid frames more than alone. A clip of fewer than 513 samples has none alone.

    Raises: ValueError for no clips, or clips that are not of one dimension.
    """
    if not len(waves) or any(np.ndim(wave) != 1 for wave in waves):
        raise ValueError(f"clips have the shapes {[np.shape(wave) for wave in waves]}; wanted one or more of [samples]")
    lengths = np.array([len(wave) for wave in waves])
    size = padded(int(lengths.max()))
    features = np.empty((len(waves), num_frames(size), NUM_BINS), np.float32)
    for i, wave in enumerate(waves):
        features[i] = _log_mel(np.pad(np.asarray(wave, np.float32), (0, size - len(wave))))
    return features, HOP * np.arange(features.shape[1]) < lengths[:, None]


@dataclass(frozen=True)
class MelStream:
    """Where a spectrogram stands that is made while the sound comes in: `step` it, beginning with `MelStream()`."""

    tail: Float[np.ndarray, " samples"] = field(default_factory=lambda: np.zeros(0, np.float32))  # begin of next frame
    num_samples: int = 0  # that came in


def step(
    stream: MelStream, wave: Float[np.ndarray, " samples"], is_last: bool = False
) -> tuple[MelStream, Float[np.ndarray, "T bins"]]:
    """The frames that `wave` completes. Those of all pieces are those of `mel` of the whole, bit for bit; all valid."""
    total = stream.num_samples + len(wave)
    silence = padded(total) - total if is_last else 0
    samples = np.concatenate([stream.tail, np.asarray(wave, np.float32), np.zeros(silence, np.float32)])
    features = _log_mel(samples)
    return MelStream(samples[HOP * len(features) :].copy(), total), features


def _log_mel(wave: Float[np.ndarray, " samples"]) -> Float[np.ndarray, "T bins"]:
    """All whole frames of one clip."""
    if num_frames(len(wave)) == 0:
        return np.zeros((0, NUM_BINS), np.float32)
    frames = np.lib.stride_tricks.sliding_window_view(wave, FRAME + 1)[::HOP]
    first = frames[:, :1] * (1.0 - PREEMPHASIS)
    rest = frames[:, 1:-1] - PREEMPHASIS * frames[:, :-2]
    windowed = np.concatenate([first, rest], axis=1) * window()
    magnitudes = np.abs(np.fft.rfft(windowed, n=FFT, axis=1))
    return np.log(np.maximum(magnitudes @ filters(), FLOOR)).astype(np.float32)
