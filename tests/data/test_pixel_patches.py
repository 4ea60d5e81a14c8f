"""Pixels of four bytes as patches, and the memory that threads use again."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from fusiontrain.config.schema import ImageDataConfig
from fusiontrain.data.modalities.decoders import decode_pixels
from fusiontrain.data.modalities.image import decode_patches, pixel_patches
from fusiontrain.data.modalities.image_header import has_exif, plain_size
from fusiontrain.data.modalities.scratch import MOST_BYTES, scratch


@pytest.mark.parametrize(("rows", "columns", "side"), [(1, 1, 1), (2, 3, 4), (16, 16, 16), (3, 2, 7), (5, 1, 2)])
def test_patches_are_channel_by_channel_and_row_by_row(rows, columns, side):
    pixels = np.random.default_rng(0).integers(0, 256, (rows * side, columns * side, 4), dtype=np.uint8)
    expected = [
        [pixels[r * side + y, c * side + x, channel] for channel in range(3) for y in range(side) for x in range(side)]
        for r in range(rows)
        for c in range(columns)
    ]
    assert np.array_equal(pixel_patches(pixels.copy(), side), np.array(expected))


def jpeg(seed: int, width: int, height: int, exif: bytes = b"") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


@pytest.mark.parametrize("decoder", ["simplejpeg", "pillow"])
@pytest.mark.parametrize("size", [32, 24])
def test_a_picture_stays_as_it_is_when_the_next_is_decoded(decoder, size):
    config = ImageDataConfig(size=size, patch_size=8, decoder=decoder)
    first, second = jpeg(1, 32, 32), jpeg(2, 32, 32)
    pixels, (patches, _) = decode_pixels("jpg", first, config), decode_patches("jpg", first, config)
    before = pixels.copy(), patches.copy()
    decode_pixels("jpg", second, config)
    decode_patches("jpg", second, config)
    assert np.array_equal(pixels, before[0])
    assert np.array_equal(patches, before[1])
    assert not np.array_equal(decode_pixels("jpg", second, config), pixels)


def test_scratch_is_used_again_but_never_holds_much():
    small = scratch("test", (100,), np.uint8)
    assert np.shares_memory(scratch("test", (10, 2), np.float32), small)
    assert not np.shares_memory(scratch("other", (100,), np.uint8), small)
    large = scratch("test", (MOST_BYTES + 1,), np.uint8)
    assert not np.shares_memory(scratch("test", (100,), np.uint8), large)


def test_headers_of_the_same_length_tell_their_own_sizes():
    """What an earlier picture's header said is remembered, by all its bytes."""
    exif = Image.Exif()
    exif[0x0112] = 6
    pictures = [(width, height, turned) for width, height in ((8, 16), (16, 8), (300, 7), (8, 16)) for turned in (False, True)]
    for _ in range(2):
        for width, height, turned in pictures:
            data = jpeg(0, width, height, exif.tobytes() if turned else b"")
            assert plain_size(data) == (None if turned else (height, width))
            assert has_exif(data) == turned
            cut = data[: data.rindex(b"\xff\xda") - 1]  # a header that ends before its pixels says no more than it did
            assert has_exif(cut) == turned
