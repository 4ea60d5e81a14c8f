"""Documents of published interleaved datasets as texts and pictures in reading order."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from fusiontrain.data.errors import BadSample
from fusiontrain.utils.keyed import keyed_uniform

ImagePosition = Literal["before", "after", "random"]
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Picture:
    """A picture that a document names: by where it came from, by the name it was saved under, or with its bytes."""

    url: str | None = None
    name: str | None = None
    data: bytes | None = None

    def __str__(self) -> str:
        return self.url or self.name or "(in the document)"


class Layout(NamedTuple):
    """slots: a record and its number -> texts and pictures in reading order; it raises BadSample for a record of another layout.

    separator: what stands between texts that come next to each other, also where a picture between them is missing.
    """

    slots: Callable[[Record, int], list[str | Picture]]
    separator: str


def layout_of(name: str, image_position: ImagePosition = "before", text_key: str = "text") -> Layout:
    """The layout of that name. image_position: of a picture of MMC4 and the sentence it is matched to. text_key: of plain JSON lines."""
    layouts = {
        "obelics": Layout(lambda record, _: obelics(record), "\n\n"),
        "mmc4": Layout(lambda record, number: mmc4(record, number, image_position), " "),
        "moscar": Layout(lambda record, _: moscar(record), "\n"),
        "jsonl": Layout(lambda record, _: [_text(record.get(text_key), text_key)], ""),
    }
    return layouts[name]


def obelics(record: Record) -> list[str | Picture]:
    """OBELICS (and MINT-1T-HTML, which is laid out alike): parallel lists `texts` and `images`, of which one is null in each place; images are URLs.

    Source: the card of huggingface.co/datasets/HuggingFaceM4/OBELICS.
    """
    texts, images = _list(record, "texts"), _list(record, "images")
    if len(texts) != len(images):
        raise BadSample(f"'texts' has {len(texts)} places and 'images' {len(images)}")
    slots: list[str | Picture] = []
    for place, (text, image) in enumerate(zip(texts, images, strict=True)):
        if text is not None and image is not None:
            raise BadSample(f"place {place} has both a text and an image")
        if text is not None:
            slots.append(_text(text, "texts"))
        elif image is not None:
            slots.append(Picture(url=_text(image, "images")))
    return slots


def mmc4(record: Record, number: int, image_position: ImagePosition) -> list[str | Picture]:
    """Multimodal C4: sentences in `text_list`, and in `image_info` pictures that are each matched to one of them; they have no order of their own.

    A picture stands before its sentence, as in OpenFlamingo, or after it, or (`random`) on a side drawn from its number and the record's; those of
    one sentence in the order of the list. Its bytes may be there as `image_base64`, as OpenFlamingo's conversion leaves them.
    Source: the README of github.com/allenai/mmc4 and convert_mmc4_to_wds.py of OpenFlamingo.
    """
    sentences, infos = _list(record, "text_list"), _list(record, "image_info")
    before: dict[int, list[Picture]] = {}
    for image, info in enumerate(infos):
        matched = info.get("matched_text_index") if isinstance(info, dict) else None
        if not isinstance(matched, int) or not 0 <= matched < len(sentences):
            raise BadSample(f"image {image} is matched to text {matched!r} of {len(sentences)}")
        follows = image_position == "after" or (image_position == "random" and keyed_uniform(number, image) < 0.5)
        before.setdefault(matched + follows, []).append(_mmc4_picture(info))
    slots: list[str | Picture] = []
    for place in range(len(sentences) + 1):
        slots += before.get(place, [])
        if place < len(sentences):
            slots.append(_text(sentences[place], "text_list"))
    return slots


def moscar(record: Record) -> list[str | Picture]:
    """mOSCAR: `text` and `images` with an index each, and their order in `metadata[0].node_order`, as `img_#000002|txt_#000000`.

    Source: Futeral et al., arXiv 2406.08707, and the card of huggingface.co/datasets/oscar-corpus/mOSCAR.
    """
    metadata = record.get("metadata")
    first = metadata[0] if isinstance(metadata, list) and metadata else metadata
    order = first.get("node_order") if isinstance(first, dict) else None
    if not isinstance(order, str):
        raise BadSample("has no 'node_order' in its metadata")
    nodes: dict[str, str | Picture] = {}
    for text in _objects(record, "text"):
        nodes[f"txt_{text.get('text_idx')}"] = _text(text.get("text"), "text")
    for image in _objects(record, "images"):
        nodes[f"img_{image.get('img_idx')}"] = Picture(url=_text(image.get("url"), "images.url"))
    names = [name for name in order.split("|") if name]
    unknown = [name for name in names if name not in nodes]
    if unknown:
        raise BadSample(f"its node_order names {unknown[0]}, which is not there")
    if len(set(names)) != len(nodes):
        raise BadSample(f"its node_order names {len(set(names))} of its {len(nodes)} texts and images")
    return [nodes[name] for name in names]


def _mmc4_picture(info: Mapping[str, Any]) -> Picture:
    data = info.get("image_base64")
    if data is not None:
        try:
            data = base64.b64decode(data, validate=True)
        except (binascii.Error, TypeError, ValueError) as error:
            raise BadSample(f"an image_base64 is not base64 ({error})") from error
    return Picture(url=info.get("raw_url"), name=info.get("image_name"), data=data)


def _list(record: Record, key: str) -> list[Any]:
    """A field that is a list. Raises BadSample."""
    value = record.get(key)
    if not isinstance(value, list):
        raise BadSample(f"has no list {key!r}")
    return value


def _objects(record: Record, key: str) -> list[dict[str, Any]]:
    """A list whose items are objects. Raises BadSample."""
    values = _list(record, key)
    if not all(isinstance(value, dict) for value in values):
        raise BadSample(f"{key!r} is no list of objects")
    return values


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise BadSample(f"{key!r} holds a {type(value).__name__} where a text is expected")
    return value
