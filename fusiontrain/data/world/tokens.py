"""Pictures and texts of the demo world as discrete tokens, by fixed rules that need no trained quantiser."""

from __future__ import annotations

import io
import itertools

import numpy as np

CELL = 4
LEVELS = 4
NUM_CODES = LEVELS**3
NUM_UNITS = 28
LETTERS = "abcdefghijklmnopqrstuvwxyz "


def picture_codes(picture: np.ndarray) -> np.ndarray:
    """[H, W, 3] uint8 -> the mean color of every cell of 4 x 4 pixels in 4 levels a channel, [H / 4, W / 4] in [0, 64)."""
    height, width, _ = picture.shape
    means = picture.reshape(height // CELL, CELL, width // CELL, CELL, 3).mean((1, 3))
    levels = np.minimum(means / 256 * LEVELS, LEVELS - 1).astype(np.int64)
    return levels @ np.array([LEVELS**2, LEVELS, 1])


def spoken_units(text: str) -> np.ndarray:
    """A stand-in for the quantised sound of a text: a unit per letter, repeats taken out, [n] in [0, 28)."""
    units = [LETTERS.find(letter) if letter in LETTERS else NUM_UNITS - 1 for letter in text.lower()]
    return np.array([unit for unit, _ in itertools.groupby(units)], np.int64)


def to_npy(array: np.ndarray) -> bytes:
    """The bytes of a .npy member of small numbers."""
    buffer = io.BytesIO()
    np.save(buffer, array.astype(np.uint8), allow_pickle=False)
    return buffer.getvalue()
