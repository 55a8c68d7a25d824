"""From whatever holds an image to the pixels that the tower takes (gemma3.md section 5). Pillow does the decoding."""

import base64
import binascii
import dataclasses
import io
import math
import os
import re
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, UInt8

if TYPE_CHECKING:
    from PIL import Image

LONGEST_PATH = 4096  # characters
PILLOWS_LIMIT = 89_478_485  # pixels, beyond which it takes an image for an attack
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # of files that may come from others; open more with Pillow yourself
GREY_LEVELS = 20.0  # no prepared pixel gets there, also not a disturbed one; levels of 0 to 255 do, and NaN
_DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,", re.ASCII)
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error)


class ImageError(ValueError):
    """What was given is no image, is damaged, or is larger than allowed."""


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """How images are prepared.

    By default as DeepMind's library does it, on which the models were trained: resized in float, and each image's
    place a row of ids of its own. Pan and scan gives the model crops of long images too; it is for inference only.
    """

    pan_and_scan: bool = False
    hf_compat: bool = False  # as transformers: resized in whole grey levels, newlines around an image merge with text's
    min_crop: int = 256  # pixels; the shorter side of a crop
    max_crops: int = 4
    min_ratio: float = 1.2  # of long to short side, from which on an image is cut
    max_pixels: int = 64_000_000  # of an image before it is decoded
    max_bytes: int = 64 << 20  # of a file

    def __post_init__(self) -> None:
        if not isinstance(self.pan_and_scan, bool) or not isinstance(self.hf_compat, bool):
            raise ValueError(
                f"pan_and_scan is {self.pan_and_scan!r}, hf_compat {self.hf_compat!r}; wanted True or False"
            )
        for name in ("min_crop", "max_crops", "max_pixels", "max_bytes"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} is {value!r}; wanted a positive whole number")
        if self.max_pixels > PILLOWS_LIMIT:
            raise ValueError(f"max_pixels is {self.max_pixels}; Pillow reads at most {PILLOWS_LIMIT}")
        if not isinstance(self.min_ratio, int | float) or not 1.0 <= self.min_ratio < math.inf:
            raise ValueError(f"min_ratio is {self.min_ratio!r}; wanted a number of at least 1")


def read(source: Any, options: ImageOptions = ImageOptions()) -> UInt8[np.ndarray, "height width 3"]:
    """An image as RGB, turned as its EXIF data say, transparency on white, 16 bits a channel cut to 8.

    Args:
        source: a PIL image; an array uint8 [height, width] or [height, width, 1, 3 or 4]; a path; the bytes of a file;
            or a data URL.

    Raises: ImageError for what is none of these, is damaged, has several frames, or is larger than `options` allow;
        FileNotFoundError; ImportError without Pillow (extra `vision`).
    """
    if hasattr(source, "__array__") and not hasattr(source, "convert"):
        return _of_array(np.asarray(source), options)
    image, what = _opened(source, options)
    width, height = image.size
    if width * height > options.max_pixels:
        raise ImageError(f"{what} has {width} x {height} pixels; at most {options.max_pixels:,} are read (max_pixels)")
    if not width * height:
        raise ImageError(f"{what} has {width} x {height} pixels; wanted at least one")
    try:
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        if frames == 1:
            return np.asarray(_rgb(image))
        raise ImageError(f"{what} is animated, with {frames} frames; give one of them")
    except ImageError:
        raise
    except (*_DAMAGE, LookupError, MemoryError) as error:
        raise ImageError(f"{what} cannot be decoded, it is damaged or cut off: {error}") from None


def crops(width: int, height: int, options: ImageOptions) -> list[tuple[int, int, int, int]]:
    """Pan and scan's pieces of an image as (left, top, right, bottom), in order; none for one that is nearly square."""
    long, short = max(width, height), min(width, height)
    if long / short < options.min_ratio:
        return []
    count = min(math.floor(long / short + 0.5), long // options.min_crop)
    count = min(options.max_crops, max(2, count))
    step = math.ceil(long / count)
    if min(step, short) < options.min_crop:
        return []
    spans = [(start, min(start + step, long)) for start in range(0, long, step)]
    return [(a, 0, b, height) if width >= height else (0, a, width, b) for a, b in spans]


def pixels(
    image: UInt8[np.ndarray, "height width 3"], size: int, hf_compat: bool = False, black: float = -1.0
) -> Float[np.ndarray, "size size 3"]:
    """An image resized to a square whatever its shape (bilinear, antialiased), between -1 (or 0, if that is `black`)
    and 1, float32.

    Equal to `jax.image.resize` but for that function's rounding of positions (2e-4). With `hf_compat` bit for bit what
    transformers' Gemma3ImageProcessorPil gives: the resized image is rounded to whole grey levels.
    """
    Image = _pillow()
    if hf_compat:
        resized = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))
        scaled = (resized.astype(np.float64) * (1 / 255)).astype(np.float32)
        return scaled if black == 0 else (scaled - np.float32(0.5)) / np.float32(0.5)
    channels = [
        Image.fromarray(image[..., i].astype(np.float32)).resize((size, size), Image.Resampling.BILINEAR)
        for i in range(3)
    ]
    resized = np.stack([np.asarray(channel) for channel in channels], axis=-1)
    scaled = resized / 255 if black == 0 else (resized - 127.5) / 127.5
    return np.clip(scaled, black, 1.0).astype(np.float32)


def sources(images: Any) -> list[Any]:
    """Several images, a single one, or one array with all of them, as a list. Raises ImageError for anything else."""
    if images is None:
        return []
    if hasattr(images, "convert") or isinstance(images, str | bytes | bytearray | os.PathLike):
        return [images]
    if hasattr(images, "__array__"):
        array = np.asarray(images)
        if array.ndim != 4:
            raise ImageError(f"images is an array of shape {array.shape}; wanted [N, height, width, 3], or a list")
        return list(array)
    if not isinstance(images, Sequence):
        raise ImageError(f"images is a {type(images).__name__}; wanted a list of images")
    return list(images)


def stack(
    images: Sequence[Any], size: int, options: ImageOptions = ImageOptions(), black: float = -1.0
) -> Float[np.ndarray, "N size size 3"]:
    """The pixels of some images, of each alone. Raises as `read`."""
    if not images:
        raise ImageError("there are no images; give at least one")
    alone = dataclasses.replace(options, pan_and_scan=False)
    return np.concatenate([prepare(image, size, alone, black) for image in images])


def prepare(
    source: Any, size: int, options: ImageOptions = ImageOptions(), black: float = -1.0
) -> Float[np.ndarray, "n size size 3"]:
    """The pixels of an image and, with pan and scan, of its crops, which follow it.

    An array of floats is taken as prepared, [size, size, 3] with values between `black` (-1 or 0) and 1. Raises as
    `read`.
    """
    if not isinstance(options, ImageOptions):
        raise TypeError(f"image_options is a {type(options).__name__}; wanted an ImageOptions")
    if hasattr(source, "__array__") and np.asarray(source).dtype.kind in "fV":  # V: numpy's word for bfloat16
        return _prepared(np.asarray(source).astype(np.float32), size)[None]
    image = read(source, options)
    several = [image, *_cut(image, options)]
    return np.stack([pixels(one, size, options.hf_compat, black) for one in several])


def _cut(image: np.ndarray, options: ImageOptions) -> Iterator[np.ndarray]:
    height, width = image.shape[:2]
    for left, top, right, bottom in crops(width, height, options) if options.pan_and_scan else ():
        yield np.ascontiguousarray(image[top:bottom, left:right])


def _prepared(array: np.ndarray, size: int) -> Float[np.ndarray, "size size 3"]:
    if array.shape != (size, size, 3):
        raise ImageError(
            f"an image is an array of floats with shape {array.shape}; prepared pixels have [{size}, {size}, 3], "
            "others are uint8"
        )
    if not (np.abs(array) < GREY_LEVELS).all():
        raise ImageError(f"prepared pixels lie between -1 and 1; these reach {np.abs(array).max()}")
    return array


def _of_array(array: np.ndarray, options: ImageOptions) -> np.ndarray:
    image = _pillow()

    shape = array.shape[:2] if array.ndim == 3 and array.shape[2] == 1 else array.shape
    if array.dtype != np.uint8 or not (len(shape) == 2 or (len(shape) == 3 and shape[2] in (3, 4))) or 0 in shape:
        raise ImageError(
            f"an image is an array of {array.dtype} with shape {array.shape}; wanted uint8 [height, width] or [height, "
            "width, 3 or 4]. Prepared pixels are one float array [N, size, size, 3] for all images"
        )
    if shape[0] * shape[1] > options.max_pixels:
        raise ImageError(f"an image has {shape[1]} x {shape[0]} pixels; at most {options.max_pixels:,} are read")
    return np.asarray(_rgb(image.fromarray(np.ascontiguousarray(array.reshape(shape)))))


def _opened(source: Any, options: ImageOptions) -> tuple["Image.Image", str]:
    """The image with its header read, and what to call it."""
    Image = _pillow()
    if isinstance(source, Image.Image):
        return source, "the image"
    data, what = _data(source, options)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(data), formats=FORMATS), what
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(
            f"{what} would be too large: {error}; at most {options.max_pixels:,} pixels are read"
        ) from None
    except _DAMAGE:
        raise ImageError(f"{what} is no image that can be read; wanted {', '.join(FORMATS)}") from None


def _pillow() -> Any:
    """Its module Image. Raises ImportError that says what to install."""
    try:
        from PIL import Image
    except ImportError:
        raise ImportError("images need Pillow: pip install 'gemma-jax[vision]'") from None
    return Image


def _data(source: Any, options: ImageOptions) -> tuple[bytes, str]:
    if isinstance(source, str) and source.startswith("data:"):
        return _of_url(source, options), "the data URL"
    if isinstance(source, str) and re.match(r"https?://", source, re.IGNORECASE):
        raise ImageError(f"{source[:100]!r} is an address; nothing is fetched from the net, give the image itself")
    if isinstance(source, bytes | bytearray | memoryview):
        size, data, what = len(source), source, "the image"
    elif isinstance(source, str | os.PathLike):
        path = Path(source)
        if len(str(source)) > LONGEST_PATH:
            raise ImageError(
                f"an image is a text of {len(str(source)):,} characters, too long for a path; is it base64? "
                "That is written data:image/png;base64,..."
            )
        if not path.is_file():
            raise FileNotFoundError(f"image {str(path)[:200]!r} does not exist or is no file")
        size, data, what = path.stat().st_size, path, f"image {path}"
    else:
        raise ImageError(
            f"an image is a {type(source).__name__}; wanted a PIL image, a uint8 array, a path, bytes or a data URL"
        )
    if size > options.max_bytes:
        raise ImageError(f"{what} has {size:,} bytes; at most {options.max_bytes:,} are read (max_bytes)")
    return data.read_bytes() if isinstance(data, Path) else bytes(data), what


def _of_url(url: str, options: ImageOptions) -> bytes:
    head = _DATA_URL.match(url)
    if head is None:
        raise ImageError(f"the data URL begins with {url[:40]!r}; wanted data:image/...;base64,")
    if len(url) - head.end() > options.max_bytes * 4 // 3 + 4:
        raise ImageError(f"the data URL has {len(url):,} characters; at most {options.max_bytes:,} bytes are read")
    try:
        return base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"the data URL is not base64: {error}") from None


def _rgb(image: "Image.Image") -> "Image.Image":
    from PIL import Image, ImageOps

    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = Image.fromarray(_eight_bits(np.asarray(image)))
    if "A" in image.getbands() or "a" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")
    return image.convert("RGB")


def _eight_bits(grey: np.ndarray) -> UInt8[np.ndarray, "height width"]:
    """Grey levels of 16 bits (also in arrays of 32) as 8; what never passes 255 is taken to be 8 bits in wide cells."""
    is_wide = grey.dtype in (np.uint16, np.dtype(">u2")) or grey.max(initial=0) > 255
    return np.clip(grey / 257.0 + 0.5 if is_wide else grey, 0, 255).astype(np.uint8)
