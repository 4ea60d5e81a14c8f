"""Interleaved documents as Megatron-Energon lays them out: `{key}.json` with parallel lists `texts` and `images`, one of the two null in
each place, and the images as members `{key}.<name>`."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from fusiontrain.data.errors import BadSample
from fusiontrain.data.formats.pieces import Fields, Latents, Piece, Sample, checked_text, read_json


def is_interleaved(document: Any) -> bool:
    return isinstance(document, dict) and isinstance(document.get("texts"), list) and isinstance(document.get("images"), list)


def read_interleaved(suffixes: Collection[str], fields: Fields, latents: Latents) -> Sample:
    """Raises BadSample for json that is not of this layout and for images that are not in the tar.

    latents: an image `0.png` is taken from the member `0.latent.npy` or `0.vq.npy`.
    """
    if "json" not in suffixes:
        raise BadSample("has no .json member")
    document = read_json(fields)
    if not is_interleaved(document):
        raise BadSample("its .json has no lists 'texts' and 'images'")
    texts, images = document["texts"], document["images"]
    if len(texts) != len(images):
        raise BadSample(f"'texts' has {len(texts)} places and 'images' {len(images)}")
    pieces = []
    for place, (text, image) in enumerate(zip(texts, images, strict=True)):
        if text is not None and image is not None:
            raise BadSample(f"place {place} has both a text and an image")
        if isinstance(text, str) and text:
            pieces.append(Piece(text=checked_text(text)))
        elif image is not None:
            pieces.append(Piece(image=_member(image, suffixes, latents)))
        elif text not in (None, ""):
            raise BadSample(f"the text in place {place} is a {type(text).__name__}")
    if not pieces:
        raise BadSample("holds neither text nor image")
    return Sample(tuple(pieces))


def _member(image: Any, suffixes: Collection[str], latents: Latents) -> str:
    if not isinstance(image, str):
        raise BadSample(f"an image name is a {type(image).__name__}")
    name = image.lower()
    if latents and not name.endswith(latents):
        name = f"{name.rpartition('.')[0]}.{latents}"
    if name not in suffixes:
        raise BadSample(f"names the image {image!r}, but the shard has no member .{name} of it")
    return name
