"""What every format maps to: the pieces of a sample, in reading order."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import orjson

from fusiontrain.data.errors import BadSample

IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff")
LATENT_SUFFIX = "latent.npy"
PAGE = "#page="
CODES_SUFFIX = "vq.npy"
UNITS_SUFFIX = "units.npy"
SUFFIXES = 1 << 12
"""Names of members of which what they say is remembered: the same few come with every sample."""

Representation = Literal["pixels", "latents", "codes"]
"""What of an image is read: `data.image.representation`."""

ARRAYS: dict[Representation, str] = {"latents": LATENT_SUFFIX, "codes": CODES_SUFFIX}
"""The suffixes of the arrays that stand in for the pixels of an image."""

Fields = Callable[[str], bytes]
"""The bytes of a member, by suffix."""


class Piece(NamedTuple):
    """A text, or the name of an image: the suffix of its member, with `#page=N` behind it where that holds several. Speech is named like an image.
    token_ids: of a text that was tokenised before, instead of it."""

    text: str | None = None
    image: str | None = None
    token_ids: Sequence[int] | np.ndarray | None = None


class Sample(NamedTuple):
    """Pieces in reading order. is_pair: a caption, or several to choose from, and perhaps their image, without an order of their own; the plan
    draws the caption and the order."""

    pieces: tuple[Piece, ...]
    is_pair: bool = False


def page_name(suffix: str, page: int) -> str:
    """The name of an image that is page 0, 1, ... of a member."""
    return f"{suffix}{PAGE}{page}"


@lru_cache(SUFFIXES)
def split_page(name: str) -> tuple[str, int]:
    """(suffix of the member, page in it) of an image's name; page 0 where the name has none."""
    suffix, _, page = name.partition(PAGE)
    return suffix, int(page or 0)


@lru_cache(SUFFIXES)
def is_image(name: str) -> bool:
    suffix, _ = split_page(name)
    return suffix.rpartition(".")[2] in IMAGE_SUFFIXES or representation_of(suffix) != "pixels"


@lru_cache(SUFFIXES)
def representation_of(suffix: str) -> Representation:
    """What a member of that suffix holds, if it is an image."""
    return next((name for name, array in ARRAYS.items() if f".{suffix}".endswith(f".{array}")), "pixels")


@lru_cache(SUFFIXES)
def is_speech(name: str) -> bool:
    """Whether a member holds units of speech."""
    return f".{name}".endswith(f".{UNITS_SUFFIX}")


def image_suffixes(suffixes: Collection[str]) -> list[str]:
    return sorted(suffix for suffix in suffixes if is_image(suffix))


def read_json(fields: Fields) -> Any:
    """The value of the `.json` member. Raises BadSample."""
    data = fields("json")
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        return _read_lenient_json(data)


def _read_lenient_json(data: bytes) -> Any:
    """Slower, but NaN, which img2dataset writes, and halves of surrogate pairs are read."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadSample(f"its .json is not valid JSON ({error})") from error


def checked_text(text: str) -> str:
    """The text, if it can be written as UTF-8: JSON may hold half of a surrogate pair, which no tokenizer takes. Raises BadSample."""
    try:
        if not text.isascii():
            text.encode()
    except UnicodeEncodeError as error:
        raise BadSample(f"its text is not Unicode ({error.reason})") from error
    return text
