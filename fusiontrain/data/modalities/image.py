"""Images and latents as patches, and codes. A patch vector is ordered (channel, row, column), patches and codes in raster order."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from fusiontrain.config.schema import ImageDataConfig
from fusiontrain.data.errors import DECODE, BadSample
from fusiontrain.data.formats.pieces import CODES_SUFFIX, LATENT_SUFFIX, representation_of, split_page
from fusiontrain.data.modalities.decoders import MAX_PIXELS, decode_rgbx, orientation, refuse_bomb
from fusiontrain.data.modalities.image_header import plain_size
from fusiontrain.data.modalities.policy import whole_patches
from fusiontrain.data.modalities.scratch import scratch
from fusiontrain.modality import IMAGE
from fusiontrain.types import Segment

PIXEL_SCALE = np.float32(127.5)
RGB = 3


def image_size(suffix: str, data: bytes) -> tuple[int, int]:
    """(height, width) of the upright image in pixels from its header, or of an array in latent cells or codes. Raises BadSample."""
    kind = representation_of(suffix)
    if kind != "pixels":
        array = _load_latent(data) if kind == "latents" else _load_codes(data)
        return array.shape[-2], array.shape[-1]
    page = split_page(suffix)[1]
    size = None if page else plain_size(data)
    if size is not None and size[0] * size[1] <= MAX_PIXELS:
        return size
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.seek(page)
            height, width = image.height, image.width
            turned = orientation(image) >= 5
    except UnidentifiedImageError:
        raise BadSample(f"its .{suffix} is not an image that can be read ({'its format is unknown' if data else 'it is empty'})", DECODE) from None
    except Exception as error:  # Pillow's readers, given damaged bytes, raise nearly anything
        raise BadSample(f"its .{suffix} is not an image that can be read ({error})", DECODE) from error
    refuse_bomb(suffix, height, width)
    return (width, height) if turned else (height, width)


def decode_image(suffix: str, data: bytes, config: ImageDataConfig) -> tuple[np.ndarray, tuple[int, int]]:
    """Bytes of a member -> patches [n, C] float32 and their grid: pixels in [-1, 1], latents as stored. Raises BadSample."""
    patches, grid = decode_patches(suffix, data, config)
    return normalized(patches, np.empty(patches.shape, np.float32)), grid


def decode_patches(suffix: str, data: bytes, config: ImageDataConfig) -> tuple[np.ndarray, tuple[int, int]]:
    """Bytes of a member -> patches [n, C] and their grid: pixels as uint8, latents as float32. Raises BadSample."""
    side = config.patch_size
    if representation_of(suffix) != "latents":
        _require_channels(suffix, RGB, config)
        pixels = decode_rgbx(suffix, data, config)
        return pixel_patches(pixels, side), whole_patches(pixels.shape[0], pixels.shape[1], side)
    maps = _load_latent(data)
    _require_channels(suffix, len(maps), config)
    if not np.isfinite(maps).all():
        raise BadSample(f"its .{suffix} holds numbers that are not finite", DECODE)
    return patchify(maps, side), whole_patches(maps.shape[1], maps.shape[2], side)


def _require_channels(suffix: str, found: int, config: ImageDataConfig) -> None:
    if found != config.channels:
        raise BadSample(f"its .{suffix} has {found} channels, data.image.channels={config.channels}", DECODE)


def normalized(patches: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Writes patches as the model takes them into `out`, float32 of the same shape, and returns it: uint8 pixels in [-1, 1], else as they are."""
    out[...] = patches
    if patches.dtype == np.uint8:
        out /= PIXEL_SCALE  # not times its inverse, which rounds otherwise
        out -= 1
    return out


def decode_codes(suffix: str, data: bytes, config: ImageDataConfig) -> np.ndarray:
    """Bytes of a `.vq.npy` member -> its codes [h * w] int64, each in [0, codebook_size). Raises BadSample."""
    codes = _load_codes(data)
    size = config.codebook_size or 0
    if codes.min() < 0 or codes.max() >= size:
        raise BadSample(f"its .{suffix} has codes from {codes.min()} to {codes.max()}, data.image.codebook_size={size} allows 0 to {size - 1}", DECODE)
    return codes.astype(np.int64).ravel()


def image_segment(suffix: str, data: bytes, config: ImageDataConfig, max_timestep: float) -> Segment:
    """A member as a segment; a cap of 0 makes it context, not target."""
    values, grid = decode_patches(suffix, data, config)
    bidirectional = config.attention == "bidirectional"
    return Segment(IMAGE.name, values=values, grid=grid, bidirectional=bidirectional, is_target=max_timestep > 0, max_timestep=max_timestep)


def patchify(maps: np.ndarray, side: int) -> np.ndarray:
    """[channels, H, W] -> [(H / side) * (W / side), channels * side * side] of the same dtype."""
    channels, height, width = maps.shape
    planes = np.ascontiguousarray(maps)
    # A patch's row of pixels is moved as one item: numpy copies items fast and single bytes slowly.
    rows = planes.view(np.dtype((np.void, side * maps.itemsize))).reshape(channels, height // side, side, width // side)
    return np.ascontiguousarray(rows.transpose(1, 3, 0, 2)).view(maps.dtype).reshape(-1, channels * side * side)


def pixel_patches(pixels: np.ndarray, side: int) -> np.ndarray:
    """`patchify` of the three channels of pixels [H, W, 4] uint8 from `decode_rgbx`, which are used up: [n, 3 * side * side] uint8."""
    height, width, _ = pixels.shape
    planes = scratch("planes", (RGB, height, width), np.uint8)
    words = pixels.view("<u4")[..., 0]
    for plane in planes:
        plane[...] = words  # of which the lowest byte stays
        words >>= 8
    return patchify(planes, side)


def load_array(suffix: str, data: bytes) -> np.ndarray:
    """The array of a .npy member. Raises BadSample."""
    try:
        return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # the header is parsed as Python: a damaged one may raise nearly anything
        raise BadSample(f"its .{suffix} is not a numpy array ({error})", DECODE) from error


def _load_codes(data: bytes) -> np.ndarray:
    array = load_array(CODES_SUFFIX, data)
    if array.ndim != 2 or array.dtype.kind not in "iu" or not array.size:
        raise BadSample(f"its .{CODES_SUFFIX} is {array.dtype} {list(array.shape)}, expected whole numbers [height, width]", DECODE)
    return array


def _load_latent(data: bytes) -> np.ndarray:
    array = load_array(LATENT_SUFFIX, data)
    if array.ndim != 3 or array.dtype.kind not in "fiu" or not array.size:
        raise BadSample(f"its .{LATENT_SUFFIX} is {array.dtype} {list(array.shape)}, expected numbers [channels, height, width]", DECODE)
    return array.astype(np.float32)
