"""Bytes of a picture to RGB pixels: simplejpeg for what JPEGs mostly are, Pillow for everything else.

Both stand on libjpeg-turbo, and where their versions of it agree so do their pixels; but that is no promise, and what counts as damage differs:
simplejpeg refuses much of what Pillow shows as grey or torn. So which one decodes is part of what a resumed run compares (`decode_path`).
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError, features
from PIL import __version__ as pillow_version

from fusiontrain.config.schema import ImageDataConfig
from fusiontrain.data.errors import DECODE, BadSample
from fusiontrain.data.formats.pieces import split_page
from fusiontrain.data.modalities.image_header import has_exif
from fusiontrain.data.modalities.policy import grid_of, resized
from fusiontrain.data.modalities.scratch import scratch
from fusiontrain.utils.errors import UserError

try:
    import simplejpeg
except ImportError:  # a platform that it has no build for
    simplejpeg = None

PILLOW, SIMPLEJPEG = "pillow", "simplejpeg"
JPEG_MAGIC = b"\xff\xd8"
ORIENTATION_TAG = 0x0112
MAX_PIXELS = 100_000_000
"""An image with more pixels is refused from its header, before anything is decompressed."""

DCT_SCALES = (8, 4, 2)
LEFT_TO_FILTER = 1.5
"""A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where that leaves at least so many times the pixels needed along a side: what the bicubic
filter then makes of them is hardly another picture (above 40 dB against a full decode), for a half to a third of the time."""

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what turns the stored pixels upright. From 5 on, height and width change places."""


def jpeg_decoder(config: ImageDataConfig) -> str:
    """PILLOW or SIMPLEJPEG, as `data.image.decoder` says or, with auto, as is installed. Raises UserError for one that is not."""
    if config.decoder == SIMPLEJPEG and simplejpeg is None:
        raise UserError("data.image.decoder=simplejpeg: the package simplejpeg is not installed; install it, or set the decoder to auto or pillow")
    return PILLOW if simplejpeg is None else SIMPLEJPEG if config.decoder == "auto" else config.decoder


def decode_path(config: ImageDataConfig) -> str:
    """What turns bytes into numbers, with versions: equal on all machines of a run, and from its first step to its last."""
    if config.representation != "pixels":
        return "arrays as stored"
    scaling = f"1/2 to 1/8 from {LEFT_TO_FILTER:g} x the size"
    pillow = f"pillow {pillow_version}, libjpeg-turbo {features.version('libjpeg_turbo')}, {scaling}"
    return pillow if jpeg_decoder(config) == PILLOW else f"simplejpeg {simplejpeg.__version__}, {pillow}"


def decode_pixels(suffix: str, data: bytes, config: ImageDataConfig) -> np.ndarray:
    """The picture upright, as RGB (transparency over white), at the size that the policy gives it: [H, W, 3] uint8. Raises BadSample."""
    return decode_rgbx(suffix, data, config)[..., :3].copy()


def decode_rgbx(suffix: str, data: bytes, config: ImageDataConfig) -> np.ndarray:
    """As `decode_pixels`, with a fourth byte behind each pixel that means nothing: [H, W, 4] uint8, good until this thread's next call.

    Words of 4 bytes are moved whole by numpy, where 3 bytes are moved one by one.
    """
    try:
        if data[:2] == JPEG_MAGIC and jpeg_decoder(config) == SIMPLEJPEG:
            height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
            if colors == "YCbCr":
                return _by_simplejpeg(suffix, data, height, width, config)
        return _by_pillow(suffix, data, config)
    except (BadSample, UserError):
        raise
    except UnidentifiedImageError:
        raise BadSample(f"its .{suffix} is not an image that can be read ({'its format is unknown' if data else 'it is empty'})", DECODE) from None
    except Exception as error:  # readers, given damaged bytes, raise nearly anything
        raise BadSample(f"its .{suffix} is not an image that can be read ({error})", DECODE) from error


def _by_simplejpeg(suffix: str, data: bytes, height: int, width: int, config: ImageDataConfig) -> np.ndarray:
    refuse_bomb(suffix, height, width)
    turn = 1
    if has_exif(data):
        with Image.open(io.BytesIO(data)) as opened:
            turn = orientation(opened)
    target = _target(height, width, turn, config)
    scale = dct_scale(height, width, turn, target)
    rows, columns = -(-height // scale), -(-width // scale)
    memory = scratch("pixels", (rows * columns * 4,), np.uint8)
    pixels = simplejpeg.decode_jpeg(data, "RGBX", min_height=rows, min_width=columns, strict=True, buffer=memory)
    if turn == 1 and pixels.shape[:2] == target:
        return pixels
    image = Image.frombuffer("RGB", pixels.shape[1::-1], pixels, "raw", "RGBX", 0, 1)
    return _finished(image, turn, target, config)


def _by_pillow(suffix: str, data: bytes, config: ImageDataConfig) -> np.ndarray:
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise UserError("PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set, so that pictures which are cut short would pass for whole ones; unset it")
    with Image.open(io.BytesIO(data)) as opened:
        opened.seek(split_page(suffix)[1])
        height, width = opened.height, opened.width
        refuse_bomb(suffix, height, width)
        turn = orientation(opened)
        target = _target(height, width, turn, config)
        scale = dct_scale(height, width, turn, target)
        if opened.format in ("JPEG", "MPO") and scale > 1:
            opened.draft(opened.mode, (-(-width // scale), -(-height // scale)))
        opened.load()
        return _finished(to_rgb(opened), turn, target, config)


def _target(height: int, width: int, turn: int, config: ImageDataConfig) -> tuple[int, int]:
    """(height, width) of the upright picture under the policy."""
    rows, columns = grid_of(width, height, config) if turn >= 5 else grid_of(height, width, config)
    return rows * config.patch_size, columns * config.patch_size


def dct_scale(height: int, width: int, turn: int, target: tuple[int, int]) -> int:
    """1, 2, 4 or 8: by how much less of a JPEG of that stored size is to be decoded. target: (height, width) of the upright picture."""
    upright = (width, height) if turn >= 5 else (height, width)
    spare = min(have / need for have, need in zip(upright, target, strict=True)) / LEFT_TO_FILTER
    return next((scale for scale in DCT_SCALES if scale <= spare), 1)


def _finished(image: Image.Image, turn: int, target: tuple[int, int], config: ImageDataConfig) -> np.ndarray:
    if turn in UPRIGHT:
        image = image.transpose(UPRIGHT[turn])
    image = resized(image, *target, crop=config.resize == "square")
    return np.frombuffer(bytearray(image.tobytes("raw", "RGBX")), np.uint8).reshape(*target, 4)


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of an image that is open but not loaded, 1 = upright.

    From the header alone, so that the index and the decoder agree: Pillow would decompress a PNG to look for a tag behind its pixels, and
    turns a TIFF upright by itself.
    """
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return 1
    found = image.getexif().get(ORIENTATION_TAG, 1)
    return found if found in UPRIGHT else 1


def refuse_bomb(suffix: str, height: int, width: int) -> None:
    """Raises BadSample for more than MAX_PIXELS."""
    if height * width > MAX_PIXELS:
        raise BadSample(f"its .{suffix} has {height} x {width} pixels, more than {MAX_PIXELS} are refused", DECODE)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode of Pillow as RGB: 16-bit grey is scaled, not clipped; transparent pixels become white."""
    if image.mode.startswith("I"):  # 16 bits; "I" in older Pillow
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
