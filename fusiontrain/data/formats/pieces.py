"""What every format maps to: the pieces of a sample, in reading order."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fusiontrain.data.errors import BadSample

IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff")
LATENT_SUFFIX = "latent.npy"
CODES_SUFFIX = "vq.npy"
Latents = str | Literal[False]
"""Which arrays stand in for the pixels of an image: those of LATENT_SUFFIX or of CODES_SUFFIX, or False for the pixels themselves."""

REPRESENTATIONS: dict[str, Latents] = {"pixels": False, "latents": LATENT_SUFFIX, "codes": CODES_SUFFIX}
"""By `data.image.representation`."""

Fields = Callable[[str], bytes]
"""The bytes of a member, by suffix."""


@dataclass(frozen=True)
class Piece:
    """A text, or the suffix of the member that holds an image. token_ids: of a text that was tokenised before, instead of it."""

    text: str | None = None
    image: str | None = None
    token_ids: Sequence[int] | None = None


@dataclass(frozen=True)
class Sample:
    """Pieces in reading order. is_pair: an image and its caption without an order of their own; the plan draws one."""

    pieces: tuple[Piece, ...]
    is_pair: bool = False


def is_image(suffix: str) -> bool:
    return suffix.rpartition(".")[2] in IMAGE_SUFFIXES or bool(latents_of(suffix))


def latents_of(suffix: str) -> Latents:
    """Which arrays a member of that suffix holds; False where it is no such array."""
    return next((kind for kind in (LATENT_SUFFIX, CODES_SUFFIX) if f".{suffix}".endswith(f".{kind}")), False)


def image_suffixes(suffixes: Collection[str]) -> list[str]:
    return sorted(suffix for suffix in suffixes if is_image(suffix))


def read_json(fields: Fields) -> Any:
    """The value of the `.json` member. Raises BadSample."""
    try:
        return json.loads(fields("json"))
    except (ValueError, RecursionError) as error:
        raise BadSample(f"its .json is not valid JSON ({error})") from error


def checked_text(text: str) -> str:
    """The text, if it can be written as UTF-8: JSON may hold half of a surrogate pair, which no tokenizer takes. Raises BadSample."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadSample(f"its text is not Unicode ({error.reason})") from error
    return text
