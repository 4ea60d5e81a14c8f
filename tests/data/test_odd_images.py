"""Pictures as they are found: turned, deep, transparent, moving, cut short, huge, tiny and thin."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from fusiontrain.config.schema import ImageDataConfig
from fusiontrain.data.errors import BadSample
from fusiontrain.data.modalities.decoders import MAX_PIXELS
from fusiontrain.data.modalities.image import decode_image, image_size

CONFIG = ImageDataConfig(size=8, patch_size=8)
SIZE = (16, 8)  # width, height


def encode(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def ramp(width: int = SIZE[0], height: int = SIZE[1]) -> Image.Image:
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([rows * 200 // height, columns * 200 // width, rows * 0 + 30], -1).astype(np.uint8))


def pixels(suffix: str, data: bytes) -> np.ndarray:
    """[8, 8, 3] uint8 as decoded."""
    values, grid = decode_image(suffix, data, CONFIG)
    assert grid == (1, 1)
    return ((values.reshape(3, 8, 8).transpose(1, 2, 0) + 1) * 127.5).round().astype(np.uint8)


def fitted(image: Image.Image) -> np.ndarray:
    return np.asarray(ImageOps.fit(image.convert("RGB"), (8, 8), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_turned_picture_stands_upright_and_its_size_is_that_of_the_upright_one(form, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(ramp(), form, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert upright.size == (SIZE if orientation < 5 else SIZE[::-1])
    assert image_size(form.lower(), data) == (upright.height, upright.width)
    assert np.array_equal(pixels(form.lower(), data), fitted(upright))


def test_an_orientation_that_does_not_exist_is_upright():
    exif = Image.Exif()
    exif[0x0112] = 77
    assert image_size("jpg", encode(ramp(), "JPEG", exif=exif)) == (8, 16)


def test_the_size_is_not_that_of_the_thumbnail_in_the_header():
    thumbnail = b"Exif\0\0" + encode(ramp(4, 4), "JPEG")
    data = encode(ramp(), "JPEG")
    segment = b"\xff\xe1" + struct.pack(">H", len(thumbnail) + 2) + thumbnail
    assert image_size("jpg", data[:2] + segment + data[2:]) == (8, 16)


@pytest.mark.parametrize("form", ["GIF", "WEBP"])
def test_the_first_frame_of_a_moving_picture_is_shown(form):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    options = {"lossless": True} if form == "WEBP" else {}
    data = encode(frames[0], form, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert np.array_equal(pixels(form.lower(), data), np.asarray(frames[0]))


def test_the_first_page_of_a_tiff_is_shown():
    pages = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    data = encode(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    assert np.array_equal(pixels("tiff", data), np.asarray(pages[0]))


def test_a_palette_with_a_transparent_color_shows_white_there():
    image = Image.new("P", (8, 8), 0)
    image.putpalette([0, 0, 0, 200, 10, 10])
    image.paste(1, (0, 0, 8, 4))
    shown = pixels("png", encode(image, "PNG", transparency=0))
    assert (shown[:4] == (200, 10, 10)).all()
    assert (shown[4:] == 255).all()


def test_sixteen_bits_are_scaled_and_not_clipped():
    deep = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    shown = pixels("png", encode(Image.fromarray(deep), "PNG"))
    assert np.array_equal(shown[..., 0], (deep >> 8).astype(np.uint8))


@pytest.mark.parametrize("decoder", ["pillow", "simplejpeg"])
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_a_picture_that_is_cut_short_is_a_bad_sample(form, decoder):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    data = encode(noise, form)
    pixels_of_half = data[: len(data) // 2]
    assert image_size(form.lower(), pixels_of_half) == (64, 64), "the header is whole, so the index takes it"
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    with pytest.raises(BadSample, match=r"truncated|[Pp]remature end"):
        decode_image(form.lower(), pixels_of_half, CONFIG.model_copy(update={"decoder": decoder}))


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [10_001, 30_000])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_refused_from_its_header(side):
    assert side * side > MAX_PIXELS
    for use in (lambda data: image_size("png", data), lambda data: decode_image("png", data, CONFIG)):
        with pytest.raises(BadSample, match=r"pixels, more than 100000000 are refused|decompression bomb"):
            use(png_header(side, side))


@pytest.mark.parametrize("size", [(0, 8), (8, 0)])
def test_a_picture_without_pixels_is_a_bad_sample(size):
    with pytest.raises(BadSample):
        decode_image("png", png_header(*size), CONFIG)


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (7, 9)])
def test_tiny_and_thin_pictures_fill_the_square(size):
    image = Image.new("RGB", size, (10, 120, 250))
    assert image_size("png", encode(image, "PNG")) == size[::-1]
    assert (pixels("png", encode(image, "PNG")) == (10, 120, 250)).all()


def test_the_bytes_decide_and_not_the_suffix():
    assert np.array_equal(pixels("jpg", encode(ramp(), "PNG")), fitted(ramp()))
