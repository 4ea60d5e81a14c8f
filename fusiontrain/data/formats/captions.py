"""Caption pairs as img2dataset and webdataset users write them, and samples of text alone."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from fusiontrain.data.errors import BadSample
from fusiontrain.data.formats.pieces import Fields, Piece, Representation, Sample, checked_text, image_suffixes, is_speech, read_json, representation_of

TEXT_KEYS = ("caption", "captions", "text")
TEXT_SUFFIXES = ("txt", "text", "caption")
CLASS_SUFFIX = "cls"
DOWNLOAD_FIELDS = {"url", "status", "error_message"}
"""What img2dataset writes into every .json about how the download of its image went."""


def read_captions(
    suffixes: Collection[str], fields: Fields, representation: Representation, text_key: str | None = None, document: Any = None
) -> Sample:
    """A pair from `{key}.jpg` (or .png, ...) or `{key}.units.npy` (speech) and its text; text alone without them.

    The text is the first of these that is not blank: `{key}.txt`, `.text` or `.caption`; the field "caption", "captions" or "text" of
    `{key}.json`; the words of `{key}.cls`. text_key: the field of the .json instead, with dots between the keys of nested objects. A list of
    texts is a choice, which the plan draws anew for each visit. Raises BadSample where there is no text, where an image is there in the other
    representation only, and where img2dataset says that there is none. document: what is in the .json, where it was read before.
    """
    found = image_suffixes(suffixes)
    images = [suffix for suffix in found if representation_of(suffix) == representation]
    if found and not images:
        raise BadSample(f"has {', '.join(found)}, but data.image.representation={representation}")
    if len(images) > 1:
        raise BadSample(f"has {len(images)} images ({', '.join(images)}), a caption pair has one")
    speech = sorted(suffix for suffix in suffixes if is_speech(suffix))
    if len(speech) > 1:
        raise BadSample(f"has {len(speech)} recordings ({', '.join(speech)}), a caption pair has one")
    texts = _texts(suffixes, fields, text_key, document)
    if not images and "json" in suffixes:
        _require_downloaded(read_json(fields) if document is None else document)
    pieces = [*(Piece(text=text) for text in texts), *(Piece(image=name) for name in (*images, *speech))]
    return Sample(tuple(pieces), is_pair=bool(images or speech) or len(texts) > 1)


def _texts(suffixes: Collection[str], fields: Fields, text_key: str | None, document: Any) -> list[str]:
    if text_key is not None:
        texts = _field(read_json(fields), text_key) if "json" in suffixes else []
        if not texts:
            raise BadSample(f"has no text in the field {text_key!r} of a .json")
        return texts
    for suffix in _text_members(suffixes):
        if text := _decoded(suffix, fields):
            return [text]
    if "json" in suffixes:
        if document is None:
            document = read_json(fields)
        for key in TEXT_KEYS:
            if texts := _field(document, key):
                return texts
    if CLASS_SUFFIX in suffixes and (label := _decoded(CLASS_SUFFIX, fields)):
        if label.lstrip("-").isdigit():
            raise BadSample(f"has no text but the class number {label} in its .cls; write the name of the class as .txt")
        return [label]
    raise BadSample("has no text: neither a .txt member nor a 'caption', 'captions' or 'text' in its .json")


def _text_members(suffixes: Collection[str]) -> list[str]:
    """The members that hold text: those of the usual names, else the only one of a name of its own, such as `caption.txt`. Raises BadSample."""
    named = [suffix for suffix in TEXT_SUFFIXES if suffix in suffixes]
    if named:
        return named
    others = sorted(suffix for suffix in suffixes if suffix.rpartition(".")[2] in TEXT_SUFFIXES)
    if len(others) > 1:
        raise BadSample(f"has several texts ({', '.join(others)}); name the one that is the caption .txt")
    return others


def _decoded(suffix: str, fields: Fields) -> str:
    try:
        return fields(suffix).decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise BadSample(f"its .{suffix} is not UTF-8") from error


def _field(document: Any, key: str) -> list[str]:
    """The texts of a field that is a text or a list of texts, blank ones left out; none where it is anything else."""
    value = document.get(key) if isinstance(document, dict) else None
    if value is None:
        value = document
        for name in key.split("."):
            value = value.get(name) if isinstance(value, dict) else None
    values = value if isinstance(value, list) else [value]
    return [checked_text(text.strip()) for text in values if isinstance(text, str) and text.strip()]


def _require_downloaded(document: Any) -> None:
    """Raises BadSample for a caption whose image img2dataset could not fetch: it is half of a pair, not a text."""
    if isinstance(document, dict) and document.keys() >= DOWNLOAD_FIELDS and document["status"] != "success":
        raise BadSample(f"its image was not fetched: img2dataset says {document['status']} ({document['error_message']})")
