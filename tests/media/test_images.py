"""What becomes of an image before the tower sees it. The oracle is transformers' processor (gemma3.md section 5)."""

import base64
import contextlib
import io
import struct
import zlib

import jax
import numpy as np
import pytest
from PIL import Image

from gemma_jax.media import images
from gemma_jax.media.images import ImageError, ImageOptions

SIZES = [(64, 64), (37, 120), (301, 17), (5, 5), (640, 480), (1, 9)]


def noise(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def encoded(image, format="PNG", **options):
    data = io.BytesIO()
    image.save(data, format, **options)
    return data.getvalue()


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_native_pixels_are_jax_resize_and_scale(height, width):
    image = noise(height, width)
    wanted = jax.image.resize(image.astype(np.float32), (56, 56, 3), "bilinear", antialias=True)
    wanted = np.clip((np.asarray(wanted) - 127.5) / 127.5, -1, 1)
    found = images.pixels(image, 56)
    assert found.dtype == np.float32
    assert found.min() >= -1
    assert found.max() <= 1
    np.testing.assert_allclose(found, wanted, atol=2e-4)


@pytest.mark.parity
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK"])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_pixels_for_transformers_are_its_processors_bit_for_bit(mode, height, width):
    gemma3 = pytest.importorskip("transformers.models.gemma3.image_processing_pil_gemma3")
    processor = gemma3.Gemma3ImageProcessorPil(size={"height": 56, "width": 56})
    image = Image.fromarray(noise(height, width, 4), "RGBA").convert(mode)
    wanted = processor(image, return_tensors="np")["pixel_values"]
    found = images.prepare(image, 56, ImageOptions(hf_compat=True))
    np.testing.assert_array_equal(found.transpose(0, 3, 1, 2), wanted)
    native = images.prepare(image, 56)
    assert np.abs(native - found).max() <= 1.02 * 2 / 255  # Pillow rounds after each of the two directions


VECTORS = [  # height, width, crops as (height, width); gemma3.md section 5
    (896, 896, []),
    (768, 1024, [(768, 512)] * 2),
    (480, 640, [(480, 320)] * 2),
    (1000, 1190, []),
    (1000, 1200, [(1000, 600)] * 2),
    (600, 1800, [(600, 600)] * 3),
    (500, 1250, [(500, 417), (500, 417), (500, 416)]),
    (500, 3000, [(500, 750)] * 4),
    (1920, 1080, [(960, 1080)] * 2),
    (255, 800, []),
    (300, 400, []),
]


@pytest.mark.parametrize(("height", "width", "wanted"), VECTORS)
def test_pan_and_scan_cuts_as_the_specification_says(height, width, wanted):
    boxes = images.crops(width, height, ImageOptions())
    assert [(bottom - top, right - left) for left, top, right, bottom in boxes] == wanted
    if boxes:
        covered = np.zeros((height, width), int)
        for left, top, right, bottom in boxes:
            covered[top:bottom, left:right] += 1
        assert (covered == 1).all()
        assert boxes == sorted(boxes, key=lambda box: (box[1], box[0]))


@pytest.mark.parity
@pytest.mark.parametrize(("height", "width"), [vector[:2] for vector in VECTORS] + [(257, 3000), (2600, 513)])
def test_crops_are_transformers(height, width):
    gemma3 = pytest.importorskip("transformers.models.gemma3.image_processing_pil_gemma3")
    limits = {"min_crop_size": 256, "max_num_crops": 4, "min_ratio_to_activate": 1.2}
    processor = gemma3.Gemma3ImageProcessorPil(
        size={"height": 28, "width": 28}, do_pan_and_scan=True, **{f"pan_and_scan_{k}": v for k, v in limits.items()}
    )
    image = noise(height, width)
    wanted = processor(Image.fromarray(image), return_tensors="np")["pixel_values"]
    found = images.prepare(image, 28, ImageOptions(pan_and_scan=True, hf_compat=True))
    np.testing.assert_array_equal(found.transpose(0, 3, 1, 2), wanted)


def test_one_image_from_every_kind_of_source(tmp_path):
    array = noise(20, 30)
    image = Image.fromarray(array)
    (tmp_path / "a.png").write_bytes(data := encoded(image))
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    for source in (array, image, tmp_path / "a.png", str(tmp_path / "a.png"), data, bytearray(data), url):
        np.testing.assert_array_equal(images.read(source), array)
    np.testing.assert_array_equal(images.read(jax.numpy.asarray(array)), array)


@pytest.mark.parametrize("format", images.FORMATS)
def test_every_format_is_read(format):
    image = Image.fromarray(np.full((8, 9, 3), 128, np.uint8))
    np.testing.assert_allclose(images.read(encoded(image, format)), 128, atol=2)


def test_modes_become_rgb():
    grey = noise(6, 7)[..., 0]
    np.testing.assert_array_equal(images.read(grey), np.repeat(grey[..., None], 3, axis=2))
    np.testing.assert_array_equal(images.read(grey[..., None]), images.read(grey))
    clear = np.zeros((6, 7, 4), np.uint8)
    assert (images.read(clear) == 255).all()  # transparency is on white
    wide = grey.astype(np.uint16) * 257
    for image in (Image.fromarray(wide), Image.fromarray(wide.astype(np.int32))):
        np.testing.assert_array_equal(images.read(image)[..., 0], grey)
    np.testing.assert_array_equal(images.read(encoded(Image.fromarray(wide)))[..., 0], grey)
    palette = Image.fromarray(noise(6, 7)).convert("P")
    np.testing.assert_array_equal(images.read(palette), np.asarray(palette.convert("RGB")))


def test_a_photograph_is_turned_as_its_exif_data_say():
    array = np.zeros((16, 32, 3), np.uint8)
    array[:, :16] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it a quarter turn clockwise
    turned = images.read(encoded(Image.fromarray(array), "JPEG", exif=exif, quality=95))
    assert turned.shape == (32, 16, 3)
    assert turned[:15].mean() > 240
    assert turned[17:].mean() < 15


def huge_header(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


def frames(format):
    first, *others = [Image.fromarray(noise(8, 8, seed=i)) for i in range(3)]
    return encoded(first, format, save_all=True, append_images=others)


GOOD = encoded(Image.fromarray(noise(64, 64)), "JPEG")
BAD = {
    "text": (b"hello", "is no image that can be read; wanted PNG"),
    "nothing": (b"", "is no image"),
    "cut JPEG": (GOOD[: len(GOOD) // 2], "damaged or cut off"),
    "cut PNG": (encoded(Image.fromarray(noise(64, 64)))[:2000], "damaged or cut off"),
    "100,000 x 100,000": (huge_header(100_000, 100_000), "too large|at most 64,000,000"),
    "12,000 x 8,000": (huge_header(12_000, 8_000), "too large|at most 64,000,000 pixels"),
    "9,000 x 8,000": (huge_header(9_000, 8_000), "has 9000 x 8000 pixels; at most 64,000,000"),
    "animated GIF": (frames("GIF"), "is animated, with 3 frames; give one"),
    "animated WebP": (frames("WEBP"), "is animated, with 3 frames"),
    "not base64": ("data:image/png;base64,$$$", "is not base64"),
    "another URL": ("data:text/plain;base64,aGk=", "wanted data:image/"),
    "an address": ("https://example.com/a.png", "nothing is fetched"),
    "a number": (7, "an image is a int; wanted"),
    "floats": (np.zeros((4, 4, 3)), "an array of float64"),
    "two channels": (np.zeros((4, 4, 2), np.uint8), "an array of uint8 with shape"),
    "no pixels": (np.zeros((0, 4, 3), np.uint8), "an array of uint8 with shape"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is no image"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_image_is_refused(name):
    source, words = BAD[name]
    with pytest.raises(ImageError, match=words):
        images.read(source)


def test_files_beyond_the_limits_are_not_read(tmp_path):
    (tmp_path / "a.png").write_bytes(data := encoded(Image.fromarray(noise(40, 40))))
    small = ImageOptions(max_bytes=1000)
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    for source in (data, tmp_path / "a.png", url):
        with pytest.raises(ImageError, match=r"at most 1,000 (bytes )?are read"):
            images.read(source, small)
    with pytest.raises(ImageError, match="has 40 x 40 pixels; at most 1,599"):
        images.read(data, ImageOptions(max_pixels=1599))
    with pytest.raises(ImageError, match="has 40 x 40 pixels; at most 1,599"):
        images.read(noise(40, 40), ImageOptions(max_pixels=1599))
    with pytest.raises(FileNotFoundError, match=r"no-such\.png' does not exist"):
        images.read(tmp_path / "no-such.png")


@pytest.mark.filterwarnings("ignore")  # Pillow's own, of damage
def test_damaged_files_are_read_or_refused():
    chance = np.random.default_rng(0)
    whole = [encoded(Image.fromarray(noise(24, 24)), format) for format in images.FORMATS]
    refused = 0
    for i in range(600):
        data = bytearray(whole[i % len(whole)])
        for _ in range(chance.integers(1, 6)):
            data[chance.integers(min(len(data), 400))] = chance.integers(256)
        try:
            assert images.read(bytes(data[: chance.integers(len(data) // 2, len(data) + 1)])).ndim == 3
        except ImageError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    ("options", "words"),
    [({"max_crops": 0}, "max_crops is 0"), ({"min_crop": 1.5}, "min_crop is 1.5"), ({"min_ratio": 0.5}, "min_ratio")],
)
def test_impossible_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        ImageOptions(**options)


def test_lists_of_images():
    array = noise(8, 8)
    assert images.sources(None) == []
    assert len(images.sources([array, array])) == 2
    assert len(images.sources(np.stack([array] * 3))) == 3
    assert len(images.sources(Image.fromarray(array))) == 1
    assert images.sources("a.png") == ["a.png"]
    with pytest.raises(ImageError, match=r"shape \(8, 8, 3\); wanted \[N, height, width, 3\], or a list"):
        images.sources(array)
    with pytest.raises(ImageError, match="images is a int"):
        images.sources(7)


def test_a_cut_animation_and_an_image_without_pixels_are_refused():
    frames = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 20), np.uint8)) for i in range(4)]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    data = file.getvalue()
    for end in range(10, len(data), 7):
        with contextlib.suppress(ImageError):
            images.read(data[:end])
    with pytest.raises(ImageError, match="0 x 5 pixels"):
        images.prepare(Image.new("RGB", (0, 5)), 28, ImageOptions(pan_and_scan=True))


def test_what_is_meant_is_said():
    with pytest.raises(ImageError, match=r"too long for a path; is it base64\?"):
        images.read("iVBORw0KGgo" * 1000)
    with pytest.raises(ImageError, match="there are no images"):
        images.stack([], 28)
    with pytest.raises(TypeError, match="image_options is a dict"):
        images.prepare(Image.new("RGB", (5, 5)), 28, {})
    for options, words in (({"max_pixels": 10**9}, "Pillow reads at most"), ({"min_ratio": "a"}, "min_ratio is 'a'"),
                           ({"hf_compat": "no"}, "hf_compat 'no'; wanted True or False")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            ImageOptions(**options)
