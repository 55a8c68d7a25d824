"""Videos as images and the times at which they were taken. PyAV (FFmpeg) does the decoding."""

import io
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8


class VideoError(ValueError):
    """What was given is no video, is damaged, or is larger than allowed."""


@dataclass(frozen=True, kw_only=True)
class VideoOptions:
    """How many images a video becomes: so many a second, or fewer, evenly spread, so that there are `max_frames`.

    A Gemma 3n reads 256 tokens an image, and 32,768 in all.
    """

    rate: float = 1.0  # images a second
    max_frames: int = 32
    max_seconds: float = 600.0  # of the whole video
    max_pixels: int = 64_000_000  # of an image
    max_bytes: int = 512 << 20  # of the file

    def __post_init__(self) -> None:
        for name in ("rate", "max_seconds"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"{name} is {value!r}; wanted a number above 0")
        for name in ("max_frames", "max_pixels", "max_bytes"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} is {value!r}; wanted a positive whole number")


@dataclass(frozen=True, eq=False)
class Frame:
    """An image, and its time in seconds from the beginning."""

    seconds: float
    image: UInt8[np.ndarray, "height width 3"]

    @property
    def clock(self) -> str:
        """As minutes and seconds."""
        whole = int(self.seconds)
        return f"{whole // 60:02}:{whole % 60:02}"


def read(source: Any, options: VideoOptions = VideoOptions()) -> list[Frame]:
    """The images of a video, a path or the bytes of a file; the first one is its first.

    A list of images is a video too, whose frames follow each other at `rate`.
    Raises: VideoError for what is no video, has no images, is damaged before the first one, or is larger than `options`
        allow; FileNotFoundError; ImportError without PyAV (extra `video`).
    """
    if isinstance(source, list | tuple):
        return _of_images(source, options)
    av = _pyav()
    data, what = _opened(source, options)
    try:
        with av.open(data, mode="r") as container:
            if not container.streams.video:
                raise VideoError(f"{what} has no images")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise VideoError(f"{what} has images of a kind that cannot be decoded")
            size = stream.codec_context.width * stream.codec_context.height
            if size > options.max_pixels:
                raise VideoError(f"{what} has images of {size:,} pixels; at most {options.max_pixels:,} are read")
            length = _length(container, stream, av.time_base)
            if length is not None and length > options.max_seconds:
                raise VideoError(f"{what} is {length:.0f} s long; at most {options.max_seconds:g} s are read: cut it")
            step = max(1 / options.rate, 0.0 if length is None else length / options.max_frames)
            found = list(_sampled(container, stream, step, options, what))
    except (av.FFmpegError, OSError, ValueError, MemoryError) as error:
        if isinstance(error, VideoError):
            raise
        raise VideoError(f"{what} cannot be read, it is no video or damaged: {error}") from None
    if not found:
        raise VideoError(f"{what} has no image that can be decoded")
    return found


def _sampled(container: Any, stream: Any, step: float, options: VideoOptions, what: str) -> Iterator[Frame]:
    """The first frame at or after each multiple of `step`; what comes after damage is lost."""
    stream.thread_type = "AUTO"
    count, start = 0, None
    try:
        for frame in container.decode(stream):
            start = frame.time or 0.0 if start is None else start
            seconds = (frame.time or 0.0) - start
            if seconds > options.max_seconds:
                raise VideoError(f"{what} is longer than {options.max_seconds:g} s; cut it")
            if frame.width * frame.height > options.max_pixels:
                raise VideoError(f"{what} has an image of {frame.width} x {frame.height} pixels, more than are read")
            if seconds >= count * step - 1e-6:
                yield Frame(seconds, frame.to_ndarray(format="rgb24"))
                count += 1
            if count == options.max_frames:
                return
    except _pyav().FFmpegError:
        if not count:
            raise


def _length(container: Any, stream: Any, time_base: int) -> float | None:
    """In seconds, as the header says."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    return container.duration / time_base if container.duration else None


def _of_images(source: list[Any] | tuple[Any, ...], options: VideoOptions) -> list[Frame]:
    if not source:
        raise VideoError("the video is an empty list; wanted at least one image")
    if len(source) > options.max_frames:
        raise VideoError(f"the video has {len(source)} images; at most {options.max_frames} are read (max_frames)")
    return [Frame(i / options.rate, image) for i, image in enumerate(source)]


def _opened(source: Any, options: VideoOptions) -> tuple[Any, str]:
    if isinstance(source, bytes | bytearray):
        size, data, what = len(source), io.BytesIO(source), "the video"
    elif isinstance(source, str | os.PathLike):
        path = Path(source)
        if not path.is_file():  # so no address and none of FFmpeg's protocols either
            raise FileNotFoundError(f"video {str(path)[:200]!r} does not exist or is no file")
        size, data, what = path.stat().st_size, str(path.resolve()), f"video {path}"
    else:
        raise VideoError(
            f"a video is a {type(source).__name__}; wanted a path, the bytes of a file or a list of images"
        )
    if size > options.max_bytes:
        raise VideoError(f"{what} has {size:,} bytes; at most {options.max_bytes:,} are read (max_bytes)")
    return data, what


def _pyav() -> Any:
    """Its module. Raises ImportError that says what to install."""
    try:
        import av
    except ImportError:
        raise ImportError("videos need PyAV: pip install 'gemma-jax[video]'") from None
    return av
