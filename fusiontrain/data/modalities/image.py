"""Images and latents as patches. A patch vector is ordered (channel, row, column), patches in raster order."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps

from fusiontrain.config.schema import ImageDataConfig
from fusiontrain.data.errors import DECODE, BadSample
from fusiontrain.data.formats.pieces import LATENT_SUFFIX, split_page
from fusiontrain.data.image_header import has_exif, header_size
from fusiontrain.modality import IMAGE
from fusiontrain.types import Segment

ORIENTATION_TAG = 0x0112
MAX_PIXELS = 100_000_000
"""An image with more pixels is refused from its header, before anything is decompressed."""

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


def image_size(suffix: str, data: bytes) -> tuple[int, int]:
    """(height, width) of the upright image in pixels, or of a latent in cells, from its header. Raises BadSample."""
    if suffix.endswith(LATENT_SUFFIX):
        array = _load_latent(data)
        return array.shape[1], array.shape[2]
    size, page = header_size(data), split_page(suffix)[1]
    if size is not None and not page and size[0] * size[1] <= MAX_PIXELS and not has_exif(data):
        return size
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.seek(page)
            height, width = image.height, image.width
            turned = _orientation(image) >= 5
    except Exception as error:  # Pillow's readers, given damaged bytes, raise nearly anything
        raise BadSample(f"its .{suffix} is not an image that can be read ({error})", DECODE) from error
    _refuse_bomb(suffix, height, width)
    return (width, height) if turned else (height, width)


def grid_of(height: int, width: int, config: ImageDataConfig) -> tuple[int, int]:
    """(rows, columns) in patches of an image of that size under the config's policy. Raises BadSample where patches do not divide a latent."""
    if config.representation == "pixels":
        height = width = config.size
    if height % config.patch_size or width % config.patch_size:
        raise BadSample(f"a latent of {height} x {width} cells does not divide into patches of {config.patch_size}", DECODE)
    return height // config.patch_size, width // config.patch_size


def decode_image(suffix: str, data: bytes, config: ImageDataConfig) -> tuple[np.ndarray, tuple[int, int]]:
    """Bytes of a member -> patches [n, C] float32 and their grid: pixels in [-1, 1], latents as stored. Raises BadSample."""
    maps = _load_latent(data) if suffix.endswith(LATENT_SUFFIX) else _load_pixels(suffix, data, config.size)
    if maps.shape[0] != config.channels:
        raise BadSample(f"its .{suffix} has {maps.shape[0]} channels, data.image.channels={config.channels}", DECODE)
    if not np.isfinite(maps).all():
        raise BadSample(f"its .{suffix} holds numbers that are not finite", DECODE)
    grid = grid_of(maps.shape[1], maps.shape[2], config)
    return patchify(maps, config.patch_size), grid


def image_segment(suffix: str, data: bytes, config: ImageDataConfig, max_timestep: float) -> Segment:
    """A member as a segment; a cap of 0 makes it context, not target."""
    values, grid = decode_image(suffix, data, config)
    return Segment(IMAGE.name, values=values, grid=grid, bidirectional=True, is_target=max_timestep > 0, max_timestep=max_timestep)


def patchify(maps: np.ndarray, side: int) -> np.ndarray:
    """[channels, H, W] -> [(H / side) * (W / side), channels * side * side] float32."""
    channels, height, width = maps.shape
    cut = maps.reshape(channels, height // side, side, width // side, side).transpose(1, 3, 0, 2, 4)
    return np.ascontiguousarray(cut, dtype=np.float32).reshape(-1, channels * side * side)


def _load_latent(data: bytes) -> np.ndarray:
    try:
        array = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # the header is parsed as Python: a damaged one may raise nearly anything
        raise BadSample(f"its .{LATENT_SUFFIX} is not a numpy array ({error})", DECODE) from error
    if array.ndim != 3 or array.dtype.kind not in "fiu" or not array.size:
        raise BadSample(f"its .{LATENT_SUFFIX} is {array.dtype} {list(array.shape)}, expected numbers [channels, height, width]", DECODE)
    return array.astype(np.float32)


def _load_pixels(suffix: str, data: bytes, size: int) -> np.ndarray:
    """Upright, RGB (transparency over white), centre-cropped to a square and resized: [3, size, size] in [-1, 1]."""
    try:
        with Image.open(io.BytesIO(data)) as opened:
            opened.seek(split_page(suffix)[1])
            _refuse_bomb(suffix, opened.height, opened.width)
            orientation = _orientation(opened)
            opened.load()
            image = to_rgb(opened)
    except BadSample:
        raise
    except Exception as error:  # Pillow's readers, given damaged bytes, raise nearly anything
        raise BadSample(f"its .{suffix} is not an image that can be read ({error})", DECODE) from error
    if orientation in UPRIGHT:
        image = image.transpose(UPRIGHT[orientation])
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation of an image that is open but not loaded, 1 = upright.

    From the header alone, so that the index and the decoder agree: Pillow would decompress a PNG to look for a tag behind its pixels, and
    turns a TIFF upright by itself.
    """
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return 1
    orientation = image.getexif().get(ORIENTATION_TAG, 1)
    return orientation if orientation in UPRIGHT else 1


def _refuse_bomb(suffix: str, height: int, width: int) -> None:
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
