"""The mel spectrogram that Gemma 3n hears by, as data (specification of Gemma 3n, 6.1). Times are in samples."""

import functools
import math

import numpy as np
from jaxtyping import Float

SAMPLE_RATE = 16_000  # Hz
MULTIPLE = 128  # a batch is padded to a multiple of so many samples (not frames)
HOP = 160  # from one frame to the next: 10 ms
FRAME = 512  # 32 ms, after pre-emphasis, which looks at one sample more
FFT = 1024  # twice the frame: "FFT overdrive"
NUM_BINS = 128
LOWEST, HIGHEST = 125.0, 7600.0  # Hz; where the first triangle begins and the last one ends
PREEMPHASIS = 0.97
FLOOR = 1e-5  # of a filter's output, before the logarithm


def padded(num_samples: int) -> int:
    """How long a batch is whose longest clip has so many samples."""
    return -(-num_samples // MULTIPLE) * MULTIPLE


def num_frames(size: int) -> int:
    """Whole frames in so many samples; none in fewer than FRAME + 1."""
    return max(0, (size - FRAME - 1) // HOP + 1)


@functools.cache
def window() -> Float[np.ndarray, " frame"]:
    """A periodic Hann window, float32, rounded as transformers' is."""
    found = (0.5 * (1 - np.cos(2 * np.pi * np.arange(FRAME, dtype=np.float32) / FRAME))).astype(np.float32)
    found.setflags(write=False)
    return found


@functools.cache
def filters() -> Float[np.ndarray, "frequencies bins"]:
    """How much of each frequency of the transform goes into each bin, float64.

    Triangles of height 1, linear in Hz, whose corners are evenly spaced on HTK's scale, 2595 log10(1 + f / 700).
    """
    lowest, highest = (2595.0 * math.log10(1.0 + f / 700.0) for f in (LOWEST, HIGHEST))
    corners = 700.0 * (10 ** (np.linspace(lowest, highest, NUM_BINS + 2) / 2595.0) - 1.0)
    away = corners[None] - (np.arange(FFT // 2 + 1) * (SAMPLE_RATE / FFT))[:, None]
    widths = np.diff(corners)
    found = np.maximum(0.0, np.minimum(-away[:, :-2] / widths[:-1], away[:, 2:] / widths[1:]))
    found.setflags(write=False)
    return found
