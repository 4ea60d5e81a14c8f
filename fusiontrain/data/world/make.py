"""The demo world: captions, documents and tar shards of painted scenes, for which `judge.py` knows the truth.

Documents are of four kinds: caption then picture, picture then caption, stories in which the scene changes as told, and text
alone. Shards follow energon's interleaved layout with one extra field, `scenes`: the objects of each picture.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from fusiontrain.data.formats.pieces import CODES_SUFFIX, UNITS_SUFFIX
from fusiontrain.data.world.scene import (
    COLORS,
    CORNERS,
    HELD_OUT_PAIRS,
    IMAGE_SIZE,
    PLACES,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    in_reading_order,
    random_look,
    random_scene,
    render,
)
from fusiontrain.data.world.tokens import picture_codes, spoken_units, to_npy
from fusiontrain.utils.errors import UserError

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation")
SERIES = ("pictures", "texts")
"""Of shards: texts alone have their own, since training on frozen text has no use for them."""
KINDS = {"paint": 0.38, "describe": 0.10, "story": 0.02, "text": 0.50}
"""Share of documents: caption then picture, picture then caption, story with pictures, text alone."""
RETELLING_SHARE = 0.8
"""Share of the texts alone that tell one scene several times, in different phrasings. From these a language model learns to look up what
it has read, and that is how it will read pictures: with the text side frozen, it can only use what it looks up already. The others are
stories without pictures."""
INFO_FILE = "world.json"
_INFO_NAME = "fusiontrain demo world"

# One object's words, then how objects are joined, then what stands around them. Every phrasing names all four attributes.
_PHRASINGS: tuple[tuple[str, str, str], ...] = (
    ("a {size} {color} {shape} at the {place}", " and ", "{}."),
    ("a {size} {color} {shape} in the {place}", ", ", "there is {}."),
    ("{size} {color} {shape} {place}", "; ", "picture: {}."),
    ("the {place} shows a {size} {color} {shape}", ", ", "{}."),
    ("at the {place} a {shape} that is {size} and {color}", "; ", "{}."),
    ("one {color} {shape}, {size}, {place}", " and ", "here we see {}."),
)
NUM_PHRASINGS = len(_PHRASINGS)
_CAPTION_WORDS = frozenset(
    ["a", "and", "at", "the", "in", "there", "is", "picture", "shows", "that", "one", "here", "we", "see"]
    + [word for name in (*SIZES, *COLORS, *SHAPES, *PLACES) for word in name.split()]
)
_ATTRIBUTE_OF = {
    **dict.fromkeys(SIZES, "size"),
    **dict.fromkeys(COLORS, "color"),
    **dict.fromkeys(SHAPES, "shape"),
    **dict.fromkeys(PLACES, "place"),
}


@dataclass(frozen=True)
class WorldDocument:
    """One document: texts, pictures and scenes are parallel lists with None where a piece is of the other kind.

    pictures: [32, 32, 3] uint8. scenes: the objects of each picture; for kind "text", None throughout.
    """

    kind: str
    texts: tuple[str | None, ...]
    pictures: tuple[np.ndarray | None, ...]
    scenes: tuple[Scene | None, ...]


def caption(scene: Scene, phrasing: int) -> str:
    """Tell a scene in words, objects in reading order. phrasing: 0 .. NUM_PHRASINGS - 1."""
    one, between, around = _PHRASINGS[phrasing]
    return around.format(between.join(one.format(**asdict(item)) for item in in_reading_order(scene)))


def parse_caption(text: str) -> Scene | None:
    """Read a caption of any phrasing back into objects, in reading order.

    Returns None where the text is not a caption: a word that captions do not have, an object with an attribute missing or
    told twice, or no object at all.
    """
    words = re.findall(r"[a-z]+|[^\sa-z.,;:]", text.lower())
    if any(word not in _CAPTION_WORDS for word in words):
        return None
    told = re.findall("|".join((*PLACES, *SIZES, *COLORS, *SHAPES)), " ".join(words))
    told_words = sum(len(name.split()) for name in told)
    if told_words != sum(word in " ".join(_ATTRIBUTE_OF).split() for word in words):  # such as "top" without its side
        return None
    if not told or len(told) % 4:
        return None
    objects = []
    for start in range(0, len(told), 4):
        values = {_ATTRIBUTE_OF[name]: name for name in told[start : start + 4]}
        if len(values) < 4:
            return None
        objects.append(SceneObject(**values))
    return in_reading_order(objects)


def _next_scene(rng: Random, scene: Scene, held_out: bool) -> tuple[str, Scene]:
    """One event of a story: the sentence that tells it and the scene after it."""
    free = [place for place in CORNERS if place not in {item.place for item in scene}]
    events = ["appears"] * (len(scene) < 3) + ["disappears"] * (len(scene) > 1) + ["turns", "moves"]
    event = rng.choice(events)
    if event == "appears":
        added = SceneObject(*random_look(rng, held_out), rng.choice(free))
        text = f"then a {added.size} {added.color} {added.shape} appears at the {added.place}."
        return text, in_reading_order([*scene, added])
    item = rng.choice(scene)
    others = [other for other in scene if other is not item]
    told = f"then the {item.size} {item.color} {item.shape} at the {item.place}"
    if event == "disappears":
        return f"{told} disappears.", tuple(others)
    if event == "moves":
        moved = SceneObject(item.size, item.color, item.shape, rng.choice(free))
        return f"{told} moves to the {moved.place}.", in_reading_order([*others, moved])
    allowed = [color for color in COLORS if color != item.color and (held_out or (color, item.shape) not in HELD_OUT_PAIRS)]
    turned = SceneObject(item.size, rng.choice(allowed), item.shape, item.place)
    return f"{told} turns {turned.color}.", in_reading_order([*others, turned])


def random_document(rng: Random, held_out: bool) -> WorldDocument:
    """Draw a document. held_out: whether the color-shape pairs of HELD_OUT_PAIRS may appear (validation) or not (training)."""
    kind = rng.choices(tuple(KINDS), weights=tuple(KINDS.values()))[0]
    if kind in ("paint", "describe"):
        scene = random_scene(rng, held_out)
        text = caption(scene, rng.randrange(NUM_PHRASINGS))
        picture = np.asarray(render(scene))
        if kind == "paint":
            return WorldDocument(kind, (text, None), (None, picture), (None, scene))
        return WorldDocument(kind, (None, text), (picture, None), (scene, None))
    if kind == "text" and rng.random() < RETELLING_SHARE:
        scene = random_scene(rng, held_out)
        told = [caption(scene, phrasing) for phrasing in rng.sample(range(NUM_PHRASINGS), rng.randint(3, NUM_PHRASINGS - 1))]
        return WorldDocument(kind, (" ".join(told),), (None,), (None,))
    scene = random_scene(rng, held_out, num_objects=rng.choice((1, 1, 2)), corners_only=True)
    told = [caption(scene, rng.randrange(NUM_PHRASINGS))]
    scenes = [scene]
    for _ in range(rng.randint(1, 2)):
        sentence, scene = _next_scene(rng, scene, held_out)
        told.append(sentence)
        scenes.append(scene)
    if kind == "text":
        told.append("now " + caption(scene, rng.randrange(NUM_PHRASINGS)))
        return WorldDocument(kind, (" ".join(told),), (None,), (None,))
    pieces = [(text, np.asarray(render(shown)), shown) for text, shown in zip(told, scenes, strict=True)]
    return WorldDocument(
        kind,
        tuple(value for text, _, _ in pieces for value in (text, None)),
        tuple(value for _, picture, _ in pieces for value in (None, picture)),
        tuple(value for _, _, shown in pieces for value in (None, shown)),
    )


def _to_sample(key: str, document: WorldDocument, tokens: bool) -> dict[str, Any]:
    """A document as webdataset's writer takes it: `json` and one PNG per picture (lossless, so pixels stay exact). tokens: and `tokens.py`'s codes of
    every picture, and speech behind every document of text alone."""
    names: list[str | None] = []
    sample: dict[str, Any] = {"__key__": key}
    for picture in document.pictures:
        if picture is None:
            names.append(None)
            continue
        names.append(f"{len(sample) - 1}.png")
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, format="PNG")
        sample[str(names[-1])] = buffer.getvalue()
    texts = list(document.texts)
    if tokens:
        codes = {f"{place}.{CODES_SUFFIX}": to_npy(picture_codes(picture)) for place, picture in _named(names, document.pictures)}
        sample |= codes
    if tokens and document.kind == "text" and texts[0] is not None:
        sample[f"0.{UNITS_SUFFIX}"] = to_npy(spoken_units(texts[0]))
        texts.append(None)
        names.append(f"0.{UNITS_SUFFIX}")
    scenes = [None if scene is None else [asdict(item) for item in scene] for scene in document.scenes]
    fields = {"texts": texts, "images": names, "kind": document.kind, "scenes": scenes}
    sample["json"] = json.dumps(fields).encode()
    return sample


def _named(names: Sequence[str | None], pictures: Sequence[np.ndarray | None]) -> Iterator[tuple[str, np.ndarray]]:
    """The name of each picture without its suffix, and the picture."""
    return ((name.removesuffix(".png"), picture) for name, picture in zip(names, pictures, strict=True) if name is not None and picture is not None)


def make_world(
    directory: str | Path,
    num_documents: int,
    seed: int,
    documents_per_shard: int = 1000,
    validation_share: float = 0.1,
    tokens: bool = False,
) -> dict[str, Any]:
    """Write a world: directory/train/*.tar, directory/validation/*.tar and directory/world.json, whose content is returned.

    num_documents counts both splits; validation gets `validation_share` of them and at least one. The same arguments give
    byte-identical tars. tokens: with codes of the pictures and speech, for models of discrete tokens. A world that is already there is replaced;
    any other non-empty directory raises UserError.
    """
    directory = Path(directory)
    if num_documents < 2:
        raise UserError(f"documents={num_documents}: a world needs at least 2, one for training and one for validation")
    if directory.is_file() or (directory.is_dir() and any(directory.iterdir()) and _read_info(directory) is None):
        raise UserError(f"{directory}: is not empty and not a demo world; choose another directory or empty it")
    num_validation = min(max(1, round(num_documents * validation_share)), num_documents - 1)
    info: dict[str, Any] = {
        "name": _INFO_NAME,
        "version": 1,
        "complete": False,
        "seed": seed,
        "documents": {"train": num_documents - num_validation, "validation": num_validation},
        "documents_per_shard": documents_per_shard,
        "image_size": IMAGE_SIZE,
        "held_out_pairs": [list(pair) for pair in HELD_OUT_PAIRS],
    }
    directory.mkdir(parents=True, exist_ok=True)
    # written before the shards and again after them: a directory left half-made is known as a world, and as not complete
    _write_info(directory, info)
    for split in SPLITS:
        _write_split(directory / split, split, info["documents"][split], seed, documents_per_shard, tokens)
    info["complete"] = True
    _write_info(directory, info)
    logger.info("%s: %d training and %d validation documents", directory, num_documents - num_validation, num_validation)
    return info


def _write_split(folder: Path, split: str, num_documents: int, seed: int, documents_per_shard: int, tokens: bool) -> None:
    from webdataset.writer import TarWriter  # imports torch where there is one: only when shards are written

    folder.mkdir(exist_ok=True)
    for stale in folder.glob("*.tar"):
        stale.unlink()
    # a generator for every document, so that one depends on neither its neighbours nor the world's size
    numbered = ((number, random_document(Random(f"{seed}/{split}/{number}"), split == "validation")) for number in range(num_documents))
    with contextlib.ExitStack() as open_writers:
        writers: dict[str, TarWriter] = {}
        written = dict.fromkeys(SERIES, 0)
        for number, document in numbered:
            series = "texts" if document.kind == "text" else "pictures"
            shard, place = divmod(written[series], documents_per_shard)
            if place == 0:
                path = folder / f"{series}-{shard:05d}.tar"
                # time and owner are fixed: the bytes depend on the arguments alone
                writers[series] = open_writers.enter_context(TarWriter(str(path), mtime=0, user="world", group="world"))
            writers[series].write(_to_sample(f"{split}-{number:07d}", document, tokens))
            written[series] += 1


def world_info(directory: str | Path) -> dict[str, Any] | None:
    """The content of world.json of a complete world (seed, documents by split, ...); None where there is none."""
    info = _read_info(Path(directory))
    return info if info is not None and info["complete"] else None


def _read_info(directory: Path) -> dict[str, Any] | None:
    try:
        info = json.loads((directory / INFO_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return info if isinstance(info, dict) and info.get("name") == _INFO_NAME and "complete" in info else None


def _write_info(directory: Path, info: dict[str, Any]) -> None:
    (directory / INFO_FILE).write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")


def read_split(directory: str | Path, split: str) -> Iterator[WorldDocument]:
    """The documents of a complete world's split ("train" or "validation") in order, with the truth for the judge."""
    if world_info(directory) is None:
        raise UserError(f"{directory}: is not a complete demo world; make one with `fusiontrain data make-world`")
    for path in sorted((Path(directory) / split).glob("*.tar")):
        samples: dict[str, dict[str, bytes]] = {}
        with tarfile.open(path) as archive:
            for member in archive:
                key, field = member.name.split(".", 1)
                content = archive.extractfile(member)
                if content is not None:
                    samples.setdefault(key, {})[field] = content.read()
        yield from (_from_fields(fields) for fields in samples.values())


def _from_fields(members: dict[str, bytes]) -> WorldDocument:
    fields = json.loads(members["json"])
    return WorldDocument(
        kind=fields["kind"],
        texts=tuple(fields["texts"]),
        pictures=tuple(None if name is None or not name.endswith(".png") else np.asarray(Image.open(io.BytesIO(members[name]))) for name in fields["images"]),
        scenes=tuple(None if scene is None else tuple(SceneObject(**item) for item in scene) for scene in fields["scenes"]),
    )
