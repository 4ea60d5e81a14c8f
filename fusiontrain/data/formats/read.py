"""The choice of a reader for a sample."""

from __future__ import annotations

from collections.abc import Collection

from fusiontrain.data.errors import BadSample
from fusiontrain.data.formats.captions import TEXT_SUFFIXES, read_captions
from fusiontrain.data.formats.interleaved import is_interleaved, read_interleaved
from fusiontrain.data.formats.pieces import Fields, Latents, Sample, read_json

READERS = {"interleaved": read_interleaved, "captions": read_captions}


def read_sample(kind: str, suffixes: Collection[str], fields: Fields, latents: Latents) -> Sample:
    """The pieces of a sample of format `kind`; "auto" looks at its .json. Raises BadSample."""
    return READERS[detect(suffixes, fields) if kind == "auto" else kind](suffixes, fields, latents)


def detect(suffixes: Collection[str], fields: Fields) -> str:
    """interleaved where the .json has the lists of that layout, else captions."""
    if "json" not in suffixes:
        return "captions"
    try:
        document = read_json(fields)
    except BadSample:  # a caption beside it may do without; else the reader says what is wrong
        return "captions" if any(suffix in suffixes for suffix in TEXT_SUFFIXES) else "interleaved"
    return "interleaved" if is_interleaved(document) else "captions"
