"""Speech as the units of a quantiser (such as HuBERT's or DinoSR's clusters), made beforehand: `.units.npy` members, whole numbers [n]."""

from __future__ import annotations

import numpy as np

from fusiontrain.config.schema import DataConfig
from fusiontrain.data.errors import DECODE, BadSample
from fusiontrain.data.formats.pieces import UNITS_SUFFIX
from fusiontrain.data.modalities.image import load_array
from fusiontrain.modality import IMAGE


def num_units(data: bytes) -> int:
    """How many units a member holds. Raises BadSample."""
    return len(_load(data))


def decode_units(data: bytes, most: int) -> np.ndarray:
    """Bytes of a member -> its units [n] int64, each in [0, most). Raises BadSample."""
    units = _load(data)
    if units.min() < 0 or units.max() >= most:
        raise BadSample(f"its .{UNITS_SUFFIX} has units from {units.min()} to {units.max()}, data.speech.num_units={most} allows 0 to {most - 1}", DECODE)
    return units.astype(np.int64)


def num_codes(data: DataConfig) -> int:
    """Tokens of images, which stand between those of the tokenizer and those of speech."""
    return (data.image.codebook_size or 0) if data.image.representation == "codes" and IMAGE.name in data.modalities else 0


def _load(data: bytes) -> np.ndarray:
    array = load_array(UNITS_SUFFIX, data)
    if array.ndim != 1 or array.dtype.kind not in "iu" or not array.size:
        raise BadSample(f"its .{UNITS_SUFFIX} is {array.dtype} {list(array.shape)}, expected whole numbers [n]", DECODE)
    return array
