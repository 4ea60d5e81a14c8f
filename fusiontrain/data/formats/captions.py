"""Caption pairs as img2dataset and webdataset users write them, and samples of text alone."""

from __future__ import annotations

from collections.abc import Collection

from fusiontrain.data.errors import BadSample
from fusiontrain.data.formats.pieces import REPRESENTATIONS, Fields, Latents, Piece, Sample, checked_text, image_suffixes, latents_of, read_json

TEXT_KEYS = ("caption", "text")
TEXT_SUFFIXES = ("txt", "text", "caption")


def read_captions(suffixes: Collection[str], fields: Fields, latents: Latents) -> Sample:
    """A pair from `{key}.jpg` (or .png, ...) and `{key}.txt` or the key "caption" or "text" of `{key}.json`; text alone without an image.

    Raises BadSample where there is no text, and where the image is there in the other representation only.
    """
    found = image_suffixes(suffixes)
    images = [suffix for suffix in found if latents_of(suffix) == latents]
    if found and not images:
        raise BadSample(f"has {', '.join(found)}, but data.image.representation={next(name for name, kind in REPRESENTATIONS.items() if kind == latents)}")
    if len(images) > 1:
        raise BadSample(f"has {len(images)} images ({', '.join(images)}), a caption pair has one")
    pieces = [Piece(text=_text(suffixes, fields)), *(Piece(image=image) for image in images)]
    return Sample(tuple(pieces), is_pair=bool(images))


def _text(suffixes: Collection[str], fields: Fields) -> str:
    for suffix in TEXT_SUFFIXES:
        if suffix in suffixes:
            try:
                text = fields(suffix).decode().strip()
            except UnicodeDecodeError as error:
                raise BadSample(f"its .{suffix} is not UTF-8") from error
            if text:
                return text
    if "json" in suffixes:
        document = read_json(fields)
        for key in TEXT_KEYS:
            if isinstance(document, dict) and isinstance(document.get(key), str) and document[key].strip():
                return checked_text(document[key].strip())
    raise BadSample("has no text: neither a .txt member nor a 'caption' or 'text' in its .json")
