"""Caption pairs and texts alone, in the layouts that img2dataset and webdataset users write."""

from __future__ import annotations

import collections
import json

import pytest

from fusiontrain.config.validate import cross_section_problems
from fusiontrain.data.errors import BadSample
from fusiontrain.data.formats.read import read_sample
from fusiontrain.data.index.cache import index_sources
from fusiontrain.data.loader import Loader
from fusiontrain.data.plan.lengths import num_tokens
from fusiontrain.data.plan.plan import Plan
from fusiontrain.data.tokenizer import load_tokenizer
from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.shards import png, write_shard

IMAGE = png(0)


def img2dataset(caption, **changes) -> bytes:
    """The .json that img2dataset writes beside an image (its README, "Output format"; `downloader.py`, `meta`)."""
    about = {
        "url": "https://a.b/c.jpg", "caption": caption, "key": "000000012", "status": "success", "error_message": None, "width": 256, "height": 256,
        "original_width": 640, "original_height": 480, "exif": "{}", "sha256": "0" * 64,
    }  # fmt: skip
    return json.dumps(about | changes, indent=4).encode()


def as_json(value) -> bytes:
    return json.dumps(value).encode()


def texts_of(sample):
    return [piece.text for piece in sample.pieces if piece.text is not None]


def read(members, kind="auto"):
    return read_sample(kind, members, members.__getitem__, "pixels")


PAIRS = {
    "img2dataset": {"jpg": IMAGE, "txt": b"ab", "json": img2dataset("ab")},
    "img2dataset without a txt": {"jpg": IMAGE, "json": img2dataset("ab")},
    "img2dataset with an empty txt": {"jpg": IMAGE, "txt": b"", "json": img2dataset("ab")},
    "cc12m-wds": {"jpg": IMAGE, "txt": b"ab", "json": as_json({"caption": "other", "url": "x"})},
    "a text with a byte order mark": {"jpg": IMAGE, "txt": b"\xef\xbb\xbfab\r\n"},
    ".text": {"png": IMAGE, "text": b"ab"},
    ".caption": {"webp": IMAGE, "caption": b"ab"},
    "a name of its own": {"image.png": IMAGE, "caption.txt": b" ab "},
    "a class in words": {"png": IMAGE, "cls": b"ab\n"},
    "txt beside a class number": {"png": IMAGE, "txt": b"ab", "cls": b"7"},
    "json text": {"png": IMAGE, "json": as_json({"text": "ab"})},
    "a list of one": {"png": IMAGE, "json": as_json({"captions": ["ab", " ", None, 3]})},
    "blank caption, then text": {"png": IMAGE, "json": as_json({"caption": " ", "text": "ab"})},
    "broken json beside a txt": {"png": IMAGE, "txt": b"ab", "json": b"{"},
}


@pytest.mark.parametrize("members", PAIRS.values(), ids=PAIRS.keys())
def test_every_layout_of_a_pair_gives_its_caption_and_image(members):
    sample = read(members)
    assert texts_of(sample) == ["ab"]
    assert [piece.image for piece in sample.pieces][1:] == [next(iter(members))]
    assert sample.is_pair


TEXTS = [{"txt": b"ab"}, {"json": as_json({"text": "ab"})}, {"text": b"ab"}, {"json": as_json({"text": "ab", "status": "published", "url": "x"})}]


@pytest.mark.parametrize("members", TEXTS)
def test_text_alone_has_no_order_to_draw(members):
    sample = read(members)
    assert texts_of(sample) == ["ab"]
    assert not sample.is_pair


@pytest.mark.parametrize("key", ["content", "meta.content", "a.b"])
def test_a_text_key_names_the_field_wherever_it_is(key):
    document = {"text": "wrong", "content": "ab", "meta": {"content": "ab"}, "a.b": "ab"}
    assert texts_of(read({"png": IMAGE, "txt": b"wrong", "json": as_json(document)}, f"captions:{key}")) == ["ab"]


BAD = {
    "no text at all": ({"png": IMAGE}, "has no text"),
    "a class number": ({"png": IMAGE, "cls": b"42"}, "class number 42"),
    "caption null": ({"jpg": IMAGE, "txt": b"", "json": img2dataset(None)}, "has no text"),
    "not utf-8": ({"png": IMAGE, "txt": b"\xff\xfe"}, "not UTF-8"),
    "two texts": ({"png": IMAGE, "a.txt": b"a", "b.txt": b"b"}, "several texts"),
    "two images": ({"png": IMAGE, "jpg": IMAGE, "txt": b"ab"}, "a caption pair has one"),
    "download failed": ({"json": img2dataset("ab", status="failed_to_download", error_message="HTTP 404")}, "was not fetched.*HTTP 404"),
    "half of a surrogate pair": ({"json": b'{"text": "\\ud83d"}'}, "not Unicode"),
    "a json of another kind": ({"json": b'["ab"]'}, "has no text"),
}


@pytest.mark.parametrize(("members", "reason"), BAD.values(), ids=BAD.keys())
def test_what_is_no_pair_and_no_text_says_why(members, reason):
    with pytest.raises(BadSample, match=reason):
        read(members)


@pytest.mark.parametrize("document", [{"text": "ab"}, {"content": 3}, {"content": {"text": "ab"}}, ["ab"]])
def test_a_text_key_that_is_not_there_never_falls_back(document):
    with pytest.raises(BadSample, match="field 'content'"):
        read({"png": IMAGE, "txt": b"ab", "json": as_json(document)}, "captions:content")


# ---------------------------------------------------------------- several captions


def test_one_of_several_captions_is_drawn_anew_for_each_visit(tmp_path):
    captions = [["a", "bb", "cccc"], ["dd"]]
    samples = [{"png": png(i), "json": as_json({"caption": texts if len(texts) > 1 else texts[0]})} for i, texts in enumerate(captions)]
    samples.append({"json": as_json({"captions": ["ee", "ff"]})})
    write_shard(tmp_path / "x.tar", samples)
    settings = {"data.sources": [{"path": str(tmp_path)}], "data.condition_dropout": 0.0, "data.pack_window_documents": 8}
    config = tiny_config(settings)
    tokenizer = load_tokenizer(config)
    loader = Loader(config, tokenizer, "train", 0, 1)
    shown = collections.Counter()
    for step in range(120):
        for sequence in loader.plan.step(step):
            for planned, document in zip(sequence.documents, loader.builder.read(sequence, []).documents, strict=True):
                assert document.num_tokens == planned.num_tokens
                text = "".join(tokenizer.decode([t for t in s.token_ids.tolist() if t < 256]) for s in document.segments if s.token_ids is not None)
                shown[planned.sample, text] += 1
    assert {text for sample, text in shown if sample == 0} == {"a", "bb", "cccc"}
    assert {text for sample, text in shown if sample == 1} == {"dd"}
    assert {text for sample, text in shown if sample == 2} == {"ee", "ff"}
    first = [count for (sample, _), count in shown.items() if sample == 0]
    assert min(first) > sum(first) / 3 * 0.7, "each caption about as often as the others"
    again = Plan(config, loader.sources, tokenizer, training=True)
    assert again.step(7) == loader.plan.step(7)


def test_the_mean_length_counts_the_mean_caption(tmp_path):
    texts = ["a" * 3, "b" * 8, "c" * 4]
    write_shard(tmp_path / "x.tar", [{"png": png(0), "json": as_json({"caption": texts})}, {"txt": b"dddd"}])
    config = tiny_config({"data.sources": [{"path": str(tmp_path)}]})
    (source,) = index_sources(config.data.sources, config.data, load_tokenizer(config))
    patches = (config.data.image.size // config.data.image.patch_size) ** 2
    assert num_tokens(source.indexes[0], source.tokens[0].counts, source.rows(0), config.data) == (5 + 2 + patches + 2) + (4 + 2)


# ---------------------------------------------------------------- the configuration


def test_a_text_key_of_a_source_reaches_index_tokens_and_batches(tmp_path):
    samples = [{"png": png(i), "txt": b"wrong", "json": as_json({"recaption": f"right {i}"})} for i in range(6)]
    write_shard(tmp_path / "x.tar", samples)
    config = tiny_config({"data.sources": [{"path": str(tmp_path), "text_key": "recaption"}], "data.condition_dropout": 0.0})
    tokenizer = load_tokenizer(config)
    loader = Loader(config, tokenizer, "train", 0, 1)
    (batch,), _ = next(loader.iterate(0))
    text = tokenizer.decode([t for t in batch.token_ids.tolist() if t < 256])
    assert "right" in text
    assert "wrong" not in text


def test_a_text_key_for_interleaved_documents_is_refused():
    config = tiny_config({"data.sources": [{"path": "x", "format": "interleaved", "text_key": "text"}]})
    (problem,) = cross_section_problems(config)
    assert problem.key == "data.sources.0.text_key"
