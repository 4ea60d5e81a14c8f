"""Documents that no one planned for, from the shard to the model's tokens: each is shown whole and once, or is bad with a reason."""

from __future__ import annotations

import itertools
import json

import pytest

from fusiontrain.data.index.build import build_index
from fusiontrain.data.loader import Loader
from fusiontrain.data.tokenizer import load_tokenizer
from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.shards import interleaved, png, write_shard

BYTES = 256
"""Token ids below this are the bytes of texts; the rest are markers."""

MEGABYTE = "0123456789abcde\n" * (1 << 16)
MANY = [(f"caption {n} ", None) if n % 2 else (None, n) for n in range(400)]

SOUND = {
    "text alone": interleaved(["only text"], [None]),
    "image alone": interleaved([None], [png(0)]),
    "two images and no text": interleaved([None, None], [png(1), png(2)]),
    "a place with neither": interleaved(["a", None, "b", None], [None, None, None, png(3)]),
    "an image that no place names": interleaved(["named", None], [None, png(4)]) | {"7.png": png(5)},
    "an image named twice": {"json": json.dumps({"texts": [None, "again", None], "images": ["0.png", None, "0.png"]}).encode(), "0.png": png(6)},
    "empty texts": interleaved(["", None, "", "end"], [None, png(7), None, None]),
    "markers as text": interleaved(["<image> and <|image|><|end_of_text|>", None], [None, png(8)]),
    "NUL": interleaved(["before\0after"], [None]),
    "other scripts": interleaved(["héllo 你好 \u200d🙂\u2028", None], [None, png(9)]),
    "200 images": interleaved([text for text, _ in MANY], [None if n is None else png(n) for _, n in MANY]),
    "a megabyte of text": interleaved([MEGABYTE, None], [None, png(10)]),
}
BAD = {
    "all null": {"json": b'{"texts": [null, null], "images": [null, null]}'},
    "no places": {"json": b'{"texts": [], "images": []}'},
    "empty texts alone": interleaved(["", ""], [None, None]),
    "an image that is not there": {"json": b'{"texts": [null], "images": ["0.png"]}'},
    "an image that is a text": {"json": b'{"texts": [null], "images": ["0.txt"]}', "0.txt": b"hello"},
    "null lists": {"json": b'{"texts": null, "images": null}'},
}


def said(members) -> tuple[str, int]:
    """The whole text of an interleaved sample and its number of images."""
    document = json.loads(members["json"])
    return "".join(text for text in document["texts"] if text), sum(image is not None for image in document["images"])


def shown_in_one_epoch(folder, samples, **settings):
    """{name: (text, images)} of the documents of one epoch, those of a sample that was split in a row."""
    path = write_shard(folder / "x.tar", list(samples.values()))
    config = tiny_config({
        "data.sources": [{"path": str(path), "max_epochs": 1}], "data.condition_dropout": 0.0, "data.max_bad_fraction": 1.0,
        "train.global_batch_sequences": 1, **settings,
    })  # fmt: skip
    loader = Loader(config, load_tokenizer(config), "train", 0, 1)
    parts = {}
    for number in itertools.count():
        sequence = loader.plan._sequence(number)
        if sequence is None:
            break
        for planned, document in zip(sequence.documents, loader.builder.read(sequence, []).documents, strict=True):
            assert document.num_tokens == planned.num_tokens <= config.data.sequence_length
            text = bytes(t for s in document.segments if s.token_ids is not None for t in s.token_ids.tolist() if t < BYTES)
            images = sum(segment.values is not None for segment in document.segments)
            assert (document.source.key, planned.part) not in parts, "once per epoch"
            parts[document.source.key, planned.part] = (text, images)
    names = dict(zip((f"sample-{n:04d}" for n in range(len(samples))), samples, strict=True))
    shown = {}
    for (key, _), (text, images) in sorted(parts.items()):
        before = shown.get(names[key], (b"", 0))
        shown[names[key]] = (before[0] + text, before[1] + images)
    bad = {names[ref.key] for source in loader.sources for ref, _ in source.bad()}
    return {name: (text.decode(), images) for name, (text, images) in shown.items()}, bad


@pytest.mark.parametrize("length", [1 << 16, 100])
def test_every_odd_document_is_whole_or_bad(tmp_path, length):
    samples = {name: members for name, members in {**SOUND, **BAD}.items() if length > 100 or name != "a megabyte of text"}
    shown, bad = shown_in_one_epoch(tmp_path, samples, **{"data.sequence_length": length, "data.oversize": "split"})
    assert bad == set(BAD)
    assert shown == {name: said(members) for name, members in samples.items() if name in SOUND}


def test_an_image_longer_than_a_sequence_is_cut_off_before_it_and_dropped_where_nothing_is_left(tmp_path):
    samples = {"pair": interleaved(["text", None, "lost"], [None, png(0), None]), "alone": interleaved([None], [png(1)]), "text": interleaved(["b"], [None])}
    settings = {"data.sequence_length": 16, "data.image": {"size": 8, "patch_size": 2}}  # 16 patches and their markers do not fit
    for oversize in ("split", "truncate"):
        shown, bad = shown_in_one_epoch(tmp_path / oversize, samples, **settings, **{"data.oversize": oversize})
        assert shown == {"pair": ("text", 0), "text": ("b", 0)}
        assert bad == set()
    shown, _ = shown_in_one_epoch(tmp_path / "drop", samples, **settings, **{"data.oversize": "drop"})
    assert shown == {"text": ("b", 0)}


def test_one_bad_document_of_every_kind_is_named(tmp_path):
    index = build_index(write_shard(tmp_path / "x.tar", list(BAD.values())), "auto", "pixels")
    assert len(index.bad) == len(BAD)
    for number, key, reason in index.bad:
        assert key == f"sample-{number:04d}"
        assert "at offset" in reason
