"""Draws what Gemma 3n hears of some sound, by our spectrogram and by transformers', and their difference.

    python examples/spectrogram.py spectrogram.png [--sound clip.wav]

Needs the extras audio, parity (the reference) and bench (matplotlib). Without a file something like speech is drawn.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from gemma_jax.configs.mel import HIGHEST, HOP, LOWEST, NUM_BINS, SAMPLE_RATE
from gemma_jax.media import audio
from gemma_jax.media.mel import mel
from gemma_jax.nn.audio.mel import mel as compiled_mel

TICKS = (250, 500, 1000, 2000, 4000, 7000)  # Hz


def voice(seconds: float = 3.0) -> np.ndarray:
    """A buzz of changing pitch through moving formants, with hisses between."""
    time = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    noise = np.random.default_rng(0).normal(size=len(time))
    phase = 2 * np.pi * np.cumsum(120 + 30 * np.sin(2 * np.pi * 1.3 * time)) / SAMPLE_RATE
    formants = 500 + 200 * np.sin(2 * np.pi * 3.1 * time), 1500 + 500 * np.sin(2 * np.pi * 2.3 * time)
    wave = np.zeros(len(time))
    for k in range(1, 40):
        gain = sum(np.exp(-(((120 * k - formant) / 250) ** 2)) for formant in formants)
        wave += (0.1 * gain + 0.02 / k) * np.sin(k * phase)
    is_voiced = np.sin(2 * np.pi * 1.7 * time) > -0.6
    return (wave * is_voiced + 0.05 * noise * ~is_voiced + 0.002 * noise).astype(np.float32)


def heard(wave: np.ndarray) -> dict[str, np.ndarray]:
    """The spectrogram [T, bins] by each form."""
    from transformers import Gemma3nAudioFeatureExtractor

    compiled, _ = compiled_mel(wave[None], np.array([len(wave)]))
    reference = Gemma3nAudioFeatureExtractor()([wave])["input_features"][0]
    return {
        "gemma_jax, numpy": mel([wave])[0][0],
        "transformers": reference,
        "gemma_jax, in a JAX program": np.asarray(compiled[0]),
    }


def bin_of(hertz: float) -> float:
    """Where a frequency stands among the bins."""
    low, at, high = (np.log10(1 + f / 700) for f in (LOWEST, hertz, HIGHEST))
    return float((at - low) / (high - low) * (NUM_BINS + 1) - 1)


def draw(pyplot: Any, forms: dict[str, np.ndarray]) -> Any:
    """The forms above each other, below them how far ours are from the reference's."""
    reference = forms["transformers"]
    figure, axes = pyplot.subplots(5, 1, figsize=(9, 11), sharex=True, sharey=True, layout="constrained")
    extent = (0, len(reference) * HOP / SAMPLE_RATE, -0.5, NUM_BINS - 0.5)
    common = {"origin": "lower", "aspect": "auto", "extent": extent, "interpolation": "nearest"}
    for panel, (name, features) in zip(axes, forms.items(), strict=False):
        image = panel.imshow(features.T, cmap="magma", vmin=np.log(1e-5), vmax=reference.max(), **common)
        panel.set_title(name, size=10)
    figure.colorbar(image, ax=axes[:3], label="ln of magnitude", aspect=40)
    others = [name for name in forms if name != "transformers"]
    for panel, name in zip(axes[3:], others, strict=True):
        away = np.abs(forms[name] - reference)
        image = panel.imshow(away.T, cmap="viridis", vmin=0, vmax=5e-5, **common)
        panel.set_title(f"|{name} − transformers|: at most {away.max():.1e}", size=10)
    figure.colorbar(image, ax=axes[3:], label="difference", aspect=27)
    axes[0].set_yticks([bin_of(hertz) for hertz in TICKS], [f"{hertz} Hz" for hertz in TICKS])
    for panel in axes:
        panel.tick_params(labelsize=8)
    axes[-1].set_xlabel("seconds")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path, help="where the PNG is written")
    parser.add_argument("--sound", type=Path, help="a WAV, FLAC, Ogg or MP3 file; its first 30 s")
    args = parser.parse_args()
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit("the picture needs matplotlib: pip install 'gemma-jax[bench]'") from error
    matplotlib.use("agg")
    from matplotlib import pyplot

    wave = audio.read(args.sound) if args.sound else voice()
    figure = draw(pyplot, heard(wave))
    figure.savefig(args.picture, dpi=100)
    print(f"wrote {args.picture}")


if __name__ == "__main__":
    main()
