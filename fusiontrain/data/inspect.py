"""One sample as people see it: its members, its texts, its pictures. Read from the shard itself, which need not be indexed."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fusiontrain.config.schema import ImageDataConfig
from fusiontrain.data.errors import BadSample
from fusiontrain.data.formats.pieces import Representation, image_suffixes, representation_of, split_page
from fusiontrain.data.formats.read import read_sample
from fusiontrain.data.jsonl import shard_samples
from fusiontrain.data.modalities.decoders import decode_pixels
from fusiontrain.data.modalities.image import image_size, load_array
from fusiontrain.data.storage.open import open_shard
from fusiontrain.data.storage.shard import Shard
from fusiontrain.data.tar import Member, TarSample
from fusiontrain.data.tokenizer import Tokenizer
from fusiontrain.utils.errors import UserError

SIDE = 512
SHOWN = ImageDataConfig(patch_size=1, resize="native", min_tokens=1, max_tokens=SIDE**2)
"""How pictures are shown: in their own shape, scaled down to SIDE x SIDE pixels."""

MARGIN, FONT_SIZE, LETTERS, LINES = 12, 14, 88, 24


@dataclass(frozen=True)
class Shown:
    """A piece of a sample: a text with its number of tokens, or an image with what there is to say about it.

    picture: [H, W, 3] uint8; None for texts, latents and codes, and for what does not decode, where `about` says why.
    """

    text: str | None = None
    num_tokens: int | None = None
    image: str | None = None
    about: str = ""
    picture: np.ndarray | None = None


@dataclass(frozen=True)
class Inspection:
    """A sample of a shard. number: its place in the shard; members: by suffix, in the order of the shard."""

    shard: Shard
    number: int
    key: str
    members: dict[str, Member]
    pieces: tuple[Shown, ...]


def find_sample(shards: Sequence[Shard], wanted: str) -> tuple[Shard, int, TarSample]:
    """The sample of that number, counted from 0 over all shards, or of that key; what is no plain number is a key, so `007` is one too.

    Raises UserError where there is none, and for damage before it.
    """
    is_number = wanted.isdecimal() and str(int(wanted)) == wanted
    passed = 0
    for shard in shards:
        for number, sample in enumerate(shard_samples(shard)):
            if (passed == int(wanted)) if is_number else (sample.key == wanted):
                return shard, number, sample
            passed += 1
    raise UserError(f"--sample {wanted}: the shards hold {passed} samples, " + ("counted from 0" if is_number else "none with that key"))


def inspect_sample(shard: Shard, number: int, sample: TarSample, kind: str = "auto", tokenizer: Tokenizer | None = None) -> Inspection:
    """Its pieces in reading order, with pixels where there are any, else latents or codes. An image that does not decode is told as such.
    kind: of its format, as `read_sample` takes it.

    Raises UserError for a sample that has no pieces because its layout is wrong, and for a shard that cannot be read.
    """
    file = open_shard(shard)
    try:
        data = {suffix: file.read(member.offset, member.size) for suffix, member in sample.members.items()}
        pieces = read_sample(kind, sample.members, data.__getitem__, _representation(sample)).pieces
    except (OSError, BadSample) as error:
        there = ", ".join(f".{suffix} of {member.size} bytes at offset {member.offset}" for suffix, member in sample.members.items())
        raise UserError(f"{shard}: sample {number} ({sample.key}): {error}; its members are {there}") from error
    finally:
        file.close()
    shown = []
    for piece in pieces:
        if piece.image is not None:
            shown.append(_image(piece.image, data[split_page(piece.image)[0]]))
        else:
            text = piece.text or ""
            shown.append(Shown(text=text, num_tokens=None if tokenizer is None else len(tokenizer.encode(text))))
    return Inspection(shard, number, sample.key, sample.members, tuple(shown))


def _representation(sample: TarSample) -> Representation:
    """Pixels where there are any."""
    found = {representation_of(suffix) for suffix in image_suffixes(sample.members)}
    return next((name for name in get_args(Representation) if name in found), "pixels")


def _image(suffix: str, data: bytes) -> Shown:
    try:
        height, width = image_size(suffix, data)
        if representation_of(suffix) == "pixels":
            return Shown(image=suffix, about=f"{width} x {height} pixels", picture=decode_pixels(suffix, data, SHOWN))
        array = load_array(suffix, data)
        sides = " x ".join(map(str, array.shape))
        return Shown(image=suffix, about=f"{sides} {array.dtype}, from {array.min():.6g} to {array.max():.6g}")
    except BadSample as error:
        return Shown(image=suffix, about=str(error))


def sheet(inspection: Inspection) -> Image.Image:
    """The pieces below each other as one picture: small pictures as they are, long texts cut."""
    font = ImageFont.load_default(FONT_SIZE)
    blocks: list[str | Image.Image] = [printable(f"{inspection.shard.name}   sample {inspection.number}   {inspection.key}")]
    for piece in inspection.pieces:
        if piece.text is not None:
            blocks.append(_wrapped(piece.text))
        elif piece.picture is not None:
            blocks.append(Image.fromarray(piece.picture))
        else:
            blocks.append(_wrapped(f"[.{piece.image}: {piece.about}]"))
    sizes = [_extent(block, font) for block in blocks]
    page = Image.new("RGB", (max(width for width, _ in sizes) + 2 * MARGIN, sum(height + MARGIN for _, height in sizes) + MARGIN), "white")
    draw, top = ImageDraw.Draw(page), MARGIN
    for block, (_, height) in zip(blocks, sizes, strict=True):
        if isinstance(block, str):
            draw.multiline_text((MARGIN, top), block, fill="black", font=font)
        else:
            page.paste(block, (MARGIN, top))
        top += height + MARGIN
    return page


def _wrapped(text: str) -> str:
    lines = [part for line in printable(text[: LETTERS * LINES * 2]).splitlines() for part in (textwrap.wrap(line, LETTERS) or [""])]
    return "\n".join(lines[:LINES] + ["..."] * (len(lines) > LINES))


def _extent(block: str | Image.Image, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> tuple[int, int]:
    if isinstance(block, Image.Image):
        return block.size
    right, bottom = ImageDraw.Draw(Image.new("L", (1, 1))).multiline_textbbox((0, 0), block, font=font)[2:]
    return int(right) + 1, int(bottom) + 1


def printable(text: str) -> str:
    """The text with everything but letters, signs, blanks and line ends spelled out: what a shard holds must not steer a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
