"""The choice of a reader for a sample."""

from __future__ import annotations

import json
from collections.abc import Collection

from fusiontrain.data.formats.captions import read_captions
from fusiontrain.data.formats.interleaved import is_interleaved, read_interleaved
from fusiontrain.data.formats.pieces import Fields, Sample

READERS = {"interleaved": read_interleaved, "captions": read_captions}


def read_sample(kind: str, suffixes: Collection[str], fields: Fields, latents: bool) -> Sample:
    """The pieces of a sample of format `kind`; "auto" looks at its .json. Raises BadSample."""
    return READERS[detect(suffixes, fields) if kind == "auto" else kind](suffixes, fields, latents)


def detect(suffixes: Collection[str], fields: Fields) -> str:
    """interleaved where the .json has the lists of that layout, else captions."""
    if "json" not in suffixes:
        return "captions"
    try:
        document = json.loads(fields("json"))
    except ValueError:
        return "interleaved" if not any(suffix in suffixes for suffix in ("txt", "text", "caption")) else "captions"
    return "interleaved" if is_interleaved(document) else "captions"
