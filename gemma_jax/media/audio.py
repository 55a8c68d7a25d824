"""From whatever holds sound to what the mel spectrogram takes: one channel at 16 kHz, float32.

libsndfile (soundfile) does the decoding and soxr the resampling, in blocks: what a file's header says of its length is
never believed, and no more is decoded than is kept.
"""

import base64
import binascii
import importlib
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from gemma_jax.configs.mel import FRAME, SAMPLE_RATE

LONGEST_PATH = 4096  # characters
FORMATS = ("wav", "flac", "ogg", "mp3")
RATES = 1_000, 768_000  # Hz
MAX_CHANNELS = 64
LOUDEST = 32.0  # float samples lie between -1 and 1, or a little outside; beyond this they are in some other unit
BLOCK = 1 << 16  # samples of each channel that are decoded at a time
_DATA_URL = re.compile(r"data:audio/[\w.+-]+(;[\w=.+-]+)?;base64,", re.ASCII)
_INTEGERS = {"int16": (0, 1 << 15), "int32": (0, 1 << 31), "uint8": (128, 1 << 7)}  # zero, and what is 1.0


class AudioError(ValueError):
    """What was given is no sound, is damaged, or is longer than allowed."""


@dataclass(frozen=True, kw_only=True)
class AudioOptions:
    """How much is read, and what becomes of clips that are longer than the model hears at once."""

    max_seconds: float = 30.0  # of a clip; the model takes no more
    long: Literal["cut", "error", "chunk"] = "cut"  # with a warning, refused, or several clips in a row
    max_total_seconds: float = 3600.0  # of what is chunked
    max_bytes: int = 256 << 20  # of a file

    def __post_init__(self) -> None:
        if self.long not in ("cut", "error", "chunk"):
            raise ValueError(f"long is {self.long!r}; wanted 'cut', 'error' or 'chunk'")
        for name in ("max_seconds", "max_total_seconds"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0.1 <= value <= 86_400:
                raise ValueError(f"{name} is {value!r}; wanted seconds between 0.1 and 86,400")
        if type(self.max_bytes) is not int or self.max_bytes < 1:
            raise ValueError(f"max_bytes is {self.max_bytes!r}; wanted a positive whole number")

    @property
    def seconds_kept(self) -> float:
        return self.max_total_seconds if self.long == "chunk" else self.max_seconds


DEFAULT = AudioOptions()


def clips(source: Any, options: AudioOptions = DEFAULT) -> list[Float[np.ndarray, " samples"]]:
    """What the model hears of some sound: one clip, or with `long="chunk"` as many as it takes, the last one shorter.

    A rest that is too short for one frame of the spectrogram is left out. Takes and raises what `read` does.
    """
    wave = read(source, options)
    size = round(options.max_seconds * SAMPLE_RATE)
    pieces = [wave[start : start + size] for start in range(0, len(wave), size)]
    return pieces[:1] + [piece for piece in pieces[1:] if len(piece) > FRAME]


def read(source: Any, options: AudioOptions = DEFAULT) -> Float[np.ndarray, " samples"]:
    """Sound as one channel (the mean of all) at 16 kHz, between -1 and 1.

    Args:
        source: a path; the bytes of a file (WAV, FLAC, Ogg, MP3); a data URL; OpenAI's input_audio, a dict of `data` in
            base64 and `format`; or a pair of an array [samples] or [samples, channels] and its rate in Hz. Arrays are
            floats between -1 and 1, int16, int32 or uint8.

    Raises: AudioError for what is none of these, is damaged, empty, not finite, or longer than `options` allow;
        FileNotFoundError; ImportError without soundfile and soxr (extra `audio`), which arrays at 16 kHz do not need.
    Warns (UserWarning) when it cuts.
    """
    if isinstance(source, tuple | list) and len(source) == 2 and any(hasattr(one, "__array__") for one in source):
        return _of_array(source, options)
    if hasattr(source, "__array__"):
        raise AudioError("the sound is an array without a rate; give a pair such as (array, 16000)")
    data, what = _data(source, options)
    if not _is_known(data):
        raise AudioError(f"{what} is no sound that can be read; wanted {', '.join(FORMATS)}")
    soundfile = _extra("soundfile")
    try:
        with soundfile.SoundFile(BytesIO(data)) as file:
            return _gathered(_decoded(file), file.samplerate, file.channels, options, what)
    except AudioError:
        raise
    except (RuntimeError, ValueError, OSError, TypeError, MemoryError, OverflowError) as error:
        raise AudioError(f"{what} cannot be decoded, it is damaged or cut off: {error}") from None


def sources(audio: Any) -> list[Any]:
    """Several sounds, or a single one, as a list. Raises AudioError for anything else."""
    if audio is None:
        return []
    if isinstance(audio, str | bytes | bytearray | memoryview | os.PathLike | Mapping):
        return [audio]
    if isinstance(audio, tuple | list) and len(audio) == 2 and any(isinstance(one, int | np.integer) for one in audio):
        return [audio]
    if hasattr(audio, "__array__") or not isinstance(audio, Sequence):
        raise AudioError(f"audio is a {type(audio).__name__}; wanted a list of sounds, an array with its rate each")
    return list(audio)


def _of_array(pair: Sequence[Any], options: AudioOptions) -> np.ndarray:
    array, rate = pair if np.ndim(pair[0]) else reversed(pair)
    array = np.asarray(array)
    if not isinstance(rate, int | float | np.number) or not float(rate).is_integer():
        raise AudioError(f"the rate of a sound is {rate!r}; wanted a whole number of samples per second")
    if array.ndim not in (1, 2) or not (array.dtype.kind in "fV" or array.dtype.name in _INTEGERS):
        raise AudioError(
            f"the sound is an array of {array.dtype} with shape {array.shape}; wanted [samples] or [samples, channels] "
            f"of floats, {', '.join(_INTEGERS)}"
        )
    array = array if array.ndim == 2 else array[:, None]
    zero, one = _INTEGERS.get(array.dtype.name, (0, 1))

    def blocks() -> Iterator[np.ndarray]:
        for start in range(0, len(array), BLOCK):
            with np.errstate(over="ignore"):  # what becomes infinite is refused below
                block = array[start : start + BLOCK].astype(np.float32)
            yield (block - np.float32(zero)) * np.float32(1 / one)

    return _gathered(blocks(), int(rate), array.shape[1], options, "the sound")


def _decoded(file: Any) -> Iterator[np.ndarray]:
    """A file's samples, in blocks of [samples, channels]."""
    while len(block := file.read(BLOCK, dtype="float32", always_2d=True)):
        yield block


def _gathered(
    blocks: Iterator[np.ndarray], rate: int, channels: int, options: AudioOptions, what: str
) -> Float[np.ndarray, " samples"]:
    """Blocks [samples, channels] as one wave at 16 kHz, no longer than what is kept. Takes no more blocks than that."""
    if not RATES[0] <= rate <= RATES[1]:
        raise AudioError(f"{what} has {rate:,} samples per second; wanted {RATES[0]:,} to {RATES[1]:,}")
    if not 1 <= channels <= MAX_CHANNELS:
        raise AudioError(
            f"{what} has {channels} channels; wanted 1 to {MAX_CHANNELS} (arrays stand [samples, channels])"
        )
    kept = round(options.seconds_kept * rate)
    resample = None if rate == SAMPLE_RATE else _extra("soxr").ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32")
    pieces, count, is_long = [], 0, False
    for block in blocks:
        is_long = count + len(block) > kept
        if len(block := block[: kept - count]):
            mono = _checked(block, count, what).mean(axis=1, dtype=np.float32)
            count += len(mono)
            pieces.append(mono if resample is None else resample.resample_chunk(mono))
        if is_long:
            break
    if count == 0:
        raise AudioError(f"{what} holds no samples")
    if is_long:
        _refuse_or_warn(options, what)
    if resample is not None:
        pieces.append(resample.resample_chunk(np.zeros(0, np.float32), last=True))
    return np.concatenate(pieces)[: round(options.seconds_kept * SAMPLE_RATE)]


def _refuse_or_warn(options: AudioOptions, what: str) -> None:
    if options.long == "cut":
        message = (
            f"{what} is longer than {options.max_seconds:g} s; the rest is cut off (long='chunk' gives it in clips)"
        )
        warnings.warn(message, stacklevel=4)
        return
    name, hint = "max_total_seconds", "cut it up first"
    if options.long == "error":
        name, hint = "max_seconds", "long='cut' keeps its beginning, long='chunk' gives several clips"
    raise AudioError(f"{what} is longer than {options.seconds_kept:g} s ({name}); {hint}")


def _checked(block: np.ndarray, start: int, what: str) -> np.ndarray:
    """The block, if all its samples are finite and none is far too loud."""
    is_fine = np.abs(block) <= LOUDEST  # False for NaN
    if is_fine.all():
        return block
    row, channel = np.argwhere(~is_fine)[0]
    raise AudioError(
        f"{what}: sample {start + row} is {block[row, channel]:g}; float samples are finite, between -1 and 1"
    )


def _data(source: Any, options: AudioOptions) -> tuple[bytes, str]:
    """The bytes of a file, and what to call it."""
    if isinstance(source, Mapping):
        return _of_openai(source, options), "the sound"
    if isinstance(source, str) and source.startswith("data:"):
        head = _DATA_URL.match(source)
        if head is None:
            raise AudioError(f"the data URL begins with {source[:40]!r}; wanted data:audio/...;base64,")
        return _of_base64(source[head.end() :], options, "the data URL"), "the sound"
    if isinstance(source, str) and re.match(r"https?://", source, re.IGNORECASE):
        raise AudioError(f"{source[:100]!r} is an address; nothing is fetched from the net, give the sound itself")
    if isinstance(source, bytes | bytearray | memoryview):
        _check_size(memoryview(source).nbytes, options, "the sound")
        return bytes(source), "the sound"
    if not isinstance(source, str | os.PathLike):
        raise AudioError(
            f"the sound is a {type(source).__name__}; wanted a path, bytes, a data URL, or an array with its rate"
        )
    if len(str(source)) > LONGEST_PATH:
        raise AudioError(
            f"the sound is a text of {len(str(source)):,} characters, too long for a path; is it base64? "
            "That is written data:audio/wav;base64,..."
        )
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"sound {str(path)[:200]!r} does not exist or is no file")
    _check_size(path.stat().st_size, options, f"sound {path}")
    return path.read_bytes(), f"sound {path}"


def _of_openai(source: Mapping[Any, Any], options: AudioOptions) -> bytes:
    data, format = source.get("data"), source.get("format")
    if not isinstance(data, str) or set(source) - {"data", "format"}:
        raise AudioError(f"input_audio has the keys {sorted(map(str, source))}; wanted data (base64) and format")
    if format not in FORMATS:
        raise AudioError(f"input_audio's format is {format!r}; wanted {', '.join(FORMATS)}")
    return _of_base64(data, options, "input_audio's data")


def _of_base64(text: str, options: AudioOptions, what: str) -> bytes:
    _check_size(len(text) * 3 // 4 - 2, options, what)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise AudioError(f"{what} is not base64: {error}") from None


def _check_size(size: int, options: AudioOptions, what: str) -> None:
    if size > options.max_bytes:
        raise AudioError(f"{what} has {size:,} bytes; at most {options.max_bytes:,} are read (max_bytes)")


def _is_known(data: bytes) -> bool:
    """Does it begin as one of `FORMATS` does? libsndfile knows many more, and strangers need not try them all."""
    is_wave = data[:4] in (b"RIFF", b"RF64") and data[8:12] == b"WAVE"
    is_mp3 = data[:3] == b"ID3" or (data[:1] == b"\xff" and len(data) > 1 and data[1] & 0xE6 == 0xE2)
    return is_wave or is_mp3 or data[:4] in (b"fLaC", b"OggS")


def _extra(name: str) -> Any:
    """An optional module. Raises ImportError that says what to install."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ImportError(f"sound needs {name}: pip install 'gemma-jax[audio]'") from None
