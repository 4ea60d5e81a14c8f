"""What every format maps to: the pieces of a sample, in reading order."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff")
LATENT_SUFFIX = "latent.npy"

Fields = Callable[[str], bytes]
"""The bytes of a member, by suffix."""


@dataclass(frozen=True)
class Piece:
    """A text, or the suffix of the member that holds an image."""

    text: str | None = None
    image: str | None = None


@dataclass(frozen=True)
class Sample:
    """Pieces in reading order. is_pair: an image and its caption without an order of their own; the plan draws one."""

    pieces: tuple[Piece, ...]
    is_pair: bool = False


def is_image(suffix: str) -> bool:
    return suffix.rpartition(".")[2] in IMAGE_SUFFIXES or suffix == LATENT_SUFFIX or suffix.endswith("." + LATENT_SUFFIX)


def image_suffixes(suffixes: Collection[str]) -> list[str]:
    return sorted(suffix for suffix in suffixes if is_image(suffix))
