"""What goes wrong with pictures elsewhere without a word: globals of libraries, bombs, odd colors, thumbnails, threads, memory, odd documents."""

from __future__ import annotations

import hashlib
import io
import json
import resource
import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from fusiontrain.config.schema import ImageDataConfig
from fusiontrain.data.errors import BadSample
from fusiontrain.data.index.build import build_index
from fusiontrain.data.loader import Loader
from fusiontrain.data.modalities.decoders import decode_pixels
from fusiontrain.data.modalities.image import image_size
from fusiontrain.data.tokenizer import load_tokenizer
from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.shards import interleaved, png, write_shard
from fusiontrain.utils.errors import UserError

DECODERS = pytest.mark.parametrize("decoder", ["pillow", "simplejpeg"])


def policy(decoder="auto", size=16, **others) -> ImageDataConfig:
    return ImageDataConfig(size=size, patch_size=4, decoder=decoder, **others)


def ramp(width: int = 24, height: int = 16) -> Image.Image:
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([rows * 200 // height, columns * 200 // width, rows * 0 + 30], -1).astype(np.uint8))


def jpeg(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **{"quality": 95, **options})
    return buffer.getvalue()


def fitted(image: Image.Image) -> np.ndarray:
    return np.asarray(ImageOps.fit(image, (16, 16), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_library_that_lets_cut_pictures_pass_is_an_error_not_a_picture(suffix, monkeypatch):
    data = png(0, (64, 64), format="JPEG" if suffix == "jpg" else "PNG")
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    for content in (data, data[: len(data) // 2]):
        with pytest.raises(UserError, match="LOAD_TRUNCATED_IMAGES is set"):
            decode_pixels(suffix, content, policy("pillow"))
    monkeypatch.undo()
    assert decode_pixels(suffix, data, policy("pillow")).shape == (16, 16, 3)


@DECODERS
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_jpeg_that_claims_to_be_huge_is_refused_before_it_is_decoded(decoder):
    data = bytearray(jpeg(ramp()))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 30_000, 30_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for use in (lambda: image_size("jpg", bytes(data)), lambda: decode_pixels("jpg", bytes(data), policy(decoder))):
        with pytest.raises(BadSample, match=r"30000 x 30000 pixels, more than 100000000 are refused|decompression bomb"):
            use()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "KiB; the picture would take 2.7 GB"


@DECODERS
def test_a_jpeg_of_no_height_or_width_is_a_bad_sample(decoder):
    for place in (5, 7):
        data = bytearray(jpeg(ramp()))
        frame = data.index(b"\xff\xc0")
        data[frame + place : frame + place + 2] = bytes(2)
        with pytest.raises(BadSample):
            decode_pixels("jpg", bytes(data), policy(decoder))


@DECODERS
@pytest.mark.parametrize("kind", ["CMYK", "YCCK"])
def test_jpegs_of_four_inks_have_the_colors_of_the_formula(kind, decoder):
    """CMYK as Pillow writes it, and the same bytes declared to be YCCK by the Adobe segment, against the arithmetic of both."""
    flat = Image.new("CMYK", (16, 16), (90, 140, 110, 20))
    data = bytearray(jpeg(flat, quality=100, subsampling=0))
    transform = data.index(b"Adobe") + 11
    assert data[transform] == 0
    if kind == "CMYK":
        cmy, black = np.array([90, 140, 110]), 20
    else:
        data[transform] = 2
        # The file holds 255 - ink. Read as Y, Cb, Cr that is 255 minus a stored ink, and Adobe's stored inks are inverted: the two cancel out.
        y, cb, cr = 255 - 90.0, 255 - 140.0, 255 - 110.0
        cmy = np.array([y + 1.402 * (cr - 128), y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128), y + 1.772 * (cb - 128)]).clip(0, 255)
        black = 20
    expected = (255 - cmy) * (255 - black) / 255
    found = decode_pixels("jpg", bytes(data), policy(decoder)).reshape(-1, 3)
    assert np.abs(found - expected).max() <= 4, (found[0], expected)


@DECODERS
def test_the_picture_is_shown_and_not_the_thumbnail_in_its_header(decoder):
    exif = Image.Exif()
    exif[0x010E] = "x"
    data = jpeg(ramp(), exif=exif.tobytes() + jpeg(Image.new("RGB", (8, 8), "red")))
    assert np.array_equal(decode_pixels("jpg", data, policy(decoder)), fitted(Image.open(io.BytesIO(jpeg(ramp())))))


@DECODERS
@pytest.mark.parametrize("suffix", ["png", "webp", "0.page.tiff"])
def test_a_jpeg_by_another_name_is_a_jpeg(suffix, decoder):
    data = jpeg(ramp())
    assert np.array_equal(decode_pixels(suffix, data, policy(decoder)), decode_pixels("jpg", data, policy(decoder)))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16", "I", "F"])
@pytest.mark.parametrize("resize", ["square", "stretch", "native"])
def test_every_mode_becomes_rgb_under_every_policy(mode, resize):
    image = Image.fromarray(np.arange(384, dtype=np.uint16).reshape(16, 24)) if mode == "I;16" else ramp().convert("L").convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "TIFF")
    pixels = decode_pixels("tif", buffer.getvalue(), policy(resize=resize, min_tokens=4, max_tokens=64))
    assert pixels.dtype == np.uint8
    assert pixels.shape == ((16, 24, 3) if resize == "native" else (16, 16, 3))


@DECODERS
@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (2, 5000)])
def test_tiny_and_thin_jpegs_have_a_native_grid(size, decoder):
    config = policy(decoder, resize="native", min_tokens=4, max_tokens=64)
    pixels = decode_pixels("jpg", jpeg(Image.new("RGB", size, (10, 120, 250))), config)
    height, width, _ = pixels.shape
    assert height % 4 == width % 4 == 0
    assert 4 <= height * width // 16 <= 64
    assert (height > width) == (size[1] > size[0])
    assert np.abs(pixels.astype(int) - (10, 120, 250)).max() < 6


@DECODERS
def test_threads_decode_what_one_after_the_other_does(decoder):
    pictures = [jpeg(ramp(40 + n, 90 - n)) for n in range(40)]

    def digest(data):
        return hashlib.sha256(decode_pixels("jpg", data, policy(decoder)).tobytes()).hexdigest()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(digest, pictures * 5)) == [digest(data) for data in pictures] * 5


def test_the_global_generators_are_left_alone():
    import random

    before = random.getstate(), np.random.get_state()[1].tolist()
    for data in (png(0), jpeg(ramp()), png(1, mode="RGBA")):
        decode_pixels("x", data, policy())
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before


@DECODERS
def test_memory_does_not_grow_with_the_pictures(decoder):
    pictures = [jpeg(ramp(200, 150)), png(0, (150, 200)), png(1, (150, 200), mode="RGBA"), jpeg(ramp(200, 150).convert("L"))]

    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    def decode(times: int) -> None:
        for _ in range(times):
            for data in pictures:
                decode_pixels("x", data, policy(decoder))

    decode(50)
    before = resident()
    decode(400)
    assert resident() - before < 16e6, "1,600 pictures of 90 kB would be 144 MB"


# ---------------------------------------------------------------- documents


def make_loader(shard, **overrides):
    settings = {"data.sources": [{"path": str(shard)}], "data.condition_dropout": 0.0, "data.pack_window_documents": 1, "train.global_batch_sequences": 1}
    config = tiny_config({**settings, **overrides})
    return Loader(config, load_tokenizer(config), "train", 0, 1)


def documents(loader, count: int = 1):
    return [document for step in range(count) for planned in loader.plan.step(step) for document in loader.builder.read(planned, []).documents]


def test_a_document_of_two_hundred_pictures_keeps_them_in_order(tmp_path):
    images = [png(n) for n in range(200)]
    shard = write_shard(tmp_path / "a.tar", [interleaved([None] * 200, images)])
    (document,) = documents(make_loader(shard, **{"data.sequence_length": 2048}))
    segments = [segment for segment in document.segments if segment.values is not None]
    assert len(segments) == 200
    for data, segment in zip(images, segments, strict=True):
        pixels = np.asarray(Image.open(io.BytesIO(data)))
        assert np.array_equal(segment.values[0].reshape(3, 4, 4), pixels[:4, :4].transpose(2, 0, 1))


def test_a_picture_that_is_named_twice_is_shown_twice(tmp_path):
    members = {"json": json.dumps({"texts": [None, "ab", None], "images": ["0.png", None, "0.png"]}).encode(), "0.png": png(4)}
    (document,) = documents(make_loader(write_shard(tmp_path / "a.tar", [members])))
    first, second = (segment.values for segment in document.segments if segment.values is not None)
    assert np.array_equal(first, second)


def test_pictures_that_no_text_names_are_not_looked_at(tmp_path):
    members = {"json": json.dumps({"texts": ["ab"], "images": [None]}).encode(), "0.png": png(4), "1.jpg": b"broken"}
    shard = write_shard(tmp_path / "a.tar", [members])
    index = build_index(shard, "auto", "pixels")
    assert not index.bad
    assert index.kinds.tolist() == [0]
    loader = make_loader(shard)
    (document,) = documents(loader)
    assert all(segment.values is None for segment in document.segments)
    assert loader.skipped == 0


@pytest.mark.parametrize("text", ["<image>", "<|image|>", "<|/image|>", "a <|begin_of_text|>"])
def test_words_for_a_picture_are_words(tmp_path, text):
    shard = write_shard(tmp_path / "a.tar", [interleaved([text, None], [None, png(0)])])
    (document,) = documents(make_loader(shard))
    assert [segment.modality for segment in document.segments] == ["text", "image", "text"]
    assert document.segments[0].token_ids.tolist() == [256, *text.encode(), 258]
