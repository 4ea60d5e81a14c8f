"""The choice of a reader for a sample."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from fusiontrain.config.schema import SourceConfig
from fusiontrain.data.errors import BadSample
from fusiontrain.data.formats.captions import TEXT_SUFFIXES, read_captions
from fusiontrain.data.formats.interleaved import is_interleaved, read_interleaved
from fusiontrain.data.formats.pieces import Fields, Representation, Sample, read_json


def source_kind(source: SourceConfig) -> str:
    """The kind of a source's samples, as `read_sample` takes it: its format, or `captions:<field>` where a field of the json holds the text."""
    return source.format if source.text_key is None else f"captions:{source.text_key}"


def read_sample(kind: str, suffixes: Collection[str], fields: Fields, representation: Representation) -> Sample:
    """The pieces of a sample of that kind; "auto" looks at its .json. Raises BadSample."""
    form, _, text_key = kind.partition(":")
    document = None
    if form == "auto":
        form, document = detect(suffixes, fields)
    if form == "interleaved":
        return read_interleaved(suffixes, fields, representation, document)
    return read_captions(suffixes, fields, representation, text_key or None, document)


def detect(suffixes: Collection[str], fields: Fields) -> tuple[str, Any]:
    """interleaved where the .json has the lists of that layout, else captions; and what is in it, None where it is not known."""
    if "json" not in suffixes:
        return "captions", None
    try:
        document = read_json(fields)
    except BadSample:  # a caption beside it may do without; else the reader says what is wrong
        return "captions" if any(suffix in suffixes for suffix in TEXT_SUFFIXES) else "interleaved", None
    return "interleaved" if is_interleaved(document) else "captions", document
