"""Sizes from header bytes against Pillow, which decodes."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from fusiontrain.data.errors import BadSample
from fusiontrain.data.modalities.image import image_size
from fusiontrain.data.modalities.image_header import has_exif, header_size, plain_size

SIZES = [(1, 1), (7, 300), (640, 33), (2000, 3)]
KINDS = {
    "jpeg": ("RGB", "JPEG", {}),
    "progressive": ("RGB", "JPEG", {"progressive": True}),
    "grey jpeg": ("L", "JPEG", {}),
    "cmyk jpeg": ("CMYK", "JPEG", {}),
    "png": ("RGBA", "PNG", {}),
    "16-bit png": ("I;16", "PNG", {}),
    "palette png": ("P", "PNG", {}),
    "gif": ("P", "GIF", {}),
    "lossy webp": ("RGB", "WEBP", {"quality": 50}),
    "lossless webp": ("RGB", "WEBP", {"lossless": True}),
    "alpha webp": ("RGBA", "WEBP", {"quality": 50}),
}


def encode(mode, kind, size, **options):
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, kind, **options)
    return buffer.getvalue()


def pillow_size(data):
    with Image.open(io.BytesIO(data)) as image:
        return image.height, image.width


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_header_says_what_pillow_says(kind, size):
    mode, name, options = KINDS[kind]
    data = encode(mode, name, size, **options)
    assert header_size(data) == pillow_size(data) == (size[1], size[0])


def test_animations_have_the_size_of_their_canvas():
    frames = [Image.new("RGB", (50, 20), color) for color in ("red", "blue")]
    for kind in ("GIF", "WEBP"):
        buffer = io.BytesIO()
        frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
        assert header_size(buffer.getvalue()) == (20, 50)


def test_a_thumbnail_in_exif_is_not_the_image():
    thumbnail, exif = encode("RGB", "JPEG", (16, 8)), Image.Exif()
    exif[0x010E] = "x"
    data = encode("RGB", "JPEG", (300, 200), exif=exif.tobytes() + thumbnail)
    assert thumbnail in data[: data.index(b"\xff\xdb", data.index(thumbnail) + len(thumbnail))]
    assert header_size(data) == pillow_size(data) == (200, 300)


def test_a_rotated_photo_keeps_its_stored_size():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode("RGB", "JPEG", (300, 200), exif=exif.tobytes())
    assert header_size(data) == pillow_size(data) == (200, 300)


def test_fill_bytes_before_a_marker_are_passed_over():
    data = encode("RGB", "JPEG", (30, 20))
    assert header_size(data[:2] + b"\xff\xff" + data[2:]) == (20, 30)


def test_the_extension_may_lie():
    assert image_size("0.jpg", encode("RGB", "PNG", (5, 9))) == (9, 5)
    assert image_size("0.png", encode("RGB", "BMP", (5, 9))) == (9, 5)  # by Pillow


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_header_is_no_size_and_no_crash(kind):
    mode, name, options = KINDS[kind]
    data = encode(mode, name, (40, 30), **options)
    for length in range(60):
        assert header_size(data[:length]) in (None, (30, 40))
    with pytest.raises(BadSample, match="not an image"):
        image_size("0.jpg", data[:9])


def test_noise_is_no_size_and_no_crash():
    rng = np.random.default_rng(0)
    for magic in (b"\xff\xd8", b"GIF89a", b"RIFF0000WEBPVP8L", b"\x89PNG\r\n\x1a\n"):
        for _ in range(200):
            size = header_size(magic + rng.bytes(200))
            assert size is None or min(size) > 0


def test_a_side_of_zero_is_left_to_pillow():
    data = bytearray(encode("RGB", "PNG", (5, 5)))
    data[16:20] = bytes(4)
    assert header_size(bytes(data)) is None


def segment(marker, payload):
    return bytes([0xFF, marker]) + (len(payload) + 2).to_bytes(2, "big") + payload


@pytest.mark.parametrize("place", ["first", "behind a thumbnail", "behind the frame header", "behind fill bytes", "behind stray bytes"])
def test_a_turned_photo_is_measured_upright_wherever_its_exif_lies(place):
    exif = Image.Exif()
    exif[0x0112] = 6
    plain, app1 = encode("RGB", "JPEG", (300, 200)), segment(0xE1, exif.tobytes())
    frame = plain.index(b"\xff\xc0")
    behind_frame = frame + 2 + int.from_bytes(plain[frame + 2 : frame + 4], "big")
    data = {
        "first": plain[:2] + app1 + plain[2:],
        "behind a thumbnail": plain[:2] + segment(0xE2, encode("RGB", "JPEG", (16, 8))) + app1 + plain[2:],
        "behind the frame header": plain[:behind_frame] + app1 + plain[behind_frame:],
        "behind fill bytes": plain[:2] + b"\xff\xff" + app1 + plain[2:],
        "behind stray bytes": plain[:behind_frame] + b"\0\0" + app1 + plain[behind_frame:],
    }[place]
    with Image.open(io.BytesIO(data)) as image:
        upright = ImageOps.exif_transpose(image).size
    assert upright == (200, 300) and image_size("0.jpg", data) == (300, 200)
    assert has_exif(data) and plain_size(data) is None and header_size(data) == (200, 300)


def test_a_jpeg_whose_tables_hold_the_bytes_of_a_marker_is_upright():
    plain = encode("RGB", "JPEG", (300, 200))
    data = plain[:2] + segment(0xFE, b"\xff\xe1 and \xff\xda") + plain[2:]
    assert not has_exif(data) and plain_size(data) == image_size("0.jpg", data) == (200, 300)
