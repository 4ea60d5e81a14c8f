"""Interleaved documents as Megatron-Energon lays them out: `{key}.json` with parallel lists `texts` and `images`, one of the two null in
each place, and the images as members `{key}.<name>`; or, as MINT-1T-PDF and MINT-1T-ArXiv do, as the pages of one `{key}.tiff` in reading order."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from io import BytesIO
from typing import Any

from PIL import Image

from fusiontrain.data.errors import DECODE, BadSample
from fusiontrain.data.formats.pieces import ARRAYS, Fields, Piece, Representation, Sample, checked_text, is_speech, page_name, read_json

TIFF_SUFFIXES = ("tiff", "tif")


def is_interleaved(document: Any) -> bool:
    return isinstance(document, dict) and isinstance(document.get("texts"), list) and isinstance(document.get("images"), list)


def read_interleaved(suffixes: Collection[str], fields: Fields, representation: Representation, document: Any = None) -> Sample:
    """Raises BadSample for json that is not of this layout and for images that are not in the tar.

    representation: other than pixels, an image `0.png` is taken from the member `0.latent.npy` or `0.vq.npy`. document: what is in
    the .json, where it was read before.
    """
    if "json" not in suffixes:
        raise BadSample("has no .json member")
    if document is None:
        document = read_json(fields)
    if not is_interleaved(document):
        raise BadSample("its .json has no lists 'texts' and 'images'")
    texts, images = document["texts"], document["images"]
    if len(texts) != len(images):
        raise BadSample(f"'texts' has {len(texts)} places and 'images' {len(images)}")
    pages = _pages(images, suffixes, fields, representation)
    pieces = []
    for place, (text, image) in enumerate(zip(texts, images, strict=True)):
        if text is not None and image is not None:
            raise BadSample(f"place {place} has both a text and an image")
        if isinstance(text, str) and text:
            pieces.append(Piece(checked_text(text)))
        elif image is not None:
            pieces.append(Piece(None, next(pages) if pages is not None else _member(image, suffixes, representation)))
        elif text not in (None, ""):
            raise BadSample(f"the text in place {place} is a {type(text).__name__}")
    if not pieces:
        raise BadSample("holds neither text nor image")
    return Sample(tuple(pieces))


def _pages(images: list[Any], suffixes: Collection[str], fields: Fields, representation: Representation) -> Iterator[str] | None:
    """The names of the pages of the TIFF that holds the sample's images, one for each; None where the images are members. Raises BadSample."""
    tiff = next((suffix for suffix in TIFF_SUFFIXES if suffix in suffixes), None)
    if tiff is None:
        return None
    named = [image for image in images if image is not None]
    if not named or any(isinstance(image, str) and image.lower() in suffixes for image in named):
        return None
    if representation != "pixels":
        raise BadSample(f"has its images in a .{tiff}, but data.image.representation={representation}")
    try:
        with Image.open(BytesIO(fields(tiff))) as opened:
            found = getattr(opened, "n_frames", 1)
    except BadSample:
        raise
    except Exception as error:  # Pillow's readers, given damaged bytes, raise nearly anything
        raise BadSample(f"its .{tiff} is not an image that can be read ({error})", DECODE) from error
    if found != len(named):
        raise BadSample(f"names {len(named)} images, but its .{tiff} has {found} pages")
    return (page_name(tiff, page) for page in range(found))


def _member(image: Any, suffixes: Collection[str], representation: Representation) -> str:
    if not isinstance(image, str):
        raise BadSample(f"an image name is a {type(image).__name__}")
    name = image.lower()
    array = ARRAYS.get(representation)
    if array is not None and not name.endswith(array) and not is_speech(name):
        name = f"{name.rpartition('.')[0]}.{array}"
    if name not in suffixes:
        raise BadSample(f"names the image {image!r}, but the shard has no member .{name} of it")
    return name
