"""The log-mel spectrogram inside a compiled program; `media.mel` is the same in numpy (specification, 6.1)."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from gemma_jax.configs.mel import FFT, FLOOR, FRAME, HOP, PREEMPHASIS, filters, num_frames, padded, window


def mel(
    waves: Float[Array, "B samples"], lengths: Int[Array, " B"]
) -> tuple[Float[Array, "B T bins"], Bool[Array, "B T"]]:
    """Clips of different lengths, at 16 kHz, as natural logarithms of magnitudes, float32, and which frames are valid.

    A frame is valid if it begins inside its clip. What lies beyond a clip's length counts as silence. Differs from the
    numpy form, whose transform is in float64, by up to 1e-6 of a frame's loudest bin: mostly 5e-5, more beside a tone.
    """
    size = padded(waves.shape[1])
    waves = jnp.where(jnp.arange(waves.shape[1]) < lengths[:, None], waves.astype(jnp.float32), 0.0)
    waves = jnp.pad(waves, ((0, 0), (0, size - waves.shape[1])))
    starts = HOP * np.arange(num_frames(size))
    frames = waves[:, starts[:, None] + np.arange(FRAME + 1)]
    first = frames[..., :1] * (1.0 - PREEMPHASIS)
    rest = frames[..., 1:-1] - PREEMPHASIS * frames[..., :-2]
    windowed = jnp.concatenate([first, rest], axis=-1) * window()
    magnitudes = jnp.abs(jnp.fft.rfft(windowed, n=FFT, axis=-1))
    weights = jnp.asarray(filters(), jnp.float32)
    bins = jnp.matmul(magnitudes, weights, precision=jax.lax.Precision.HIGHEST)
    return jnp.log(jnp.maximum(bins, FLOOR)), jnp.asarray(starts) < lengths[:, None]
