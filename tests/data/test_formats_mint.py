"""MINT-1T-PDF and MINT-1T-ArXiv: the images of a document are the pages of one TIFF."""

from __future__ import annotations

import contextlib
import io
import json

import numpy as np
import pytest
from PIL import Image

from fusiontrain.data.errors import BadSample
from fusiontrain.data.formats.pieces import is_image, page_name, split_page
from fusiontrain.data.formats.read import read_sample
from fusiontrain.data.index.build import build_index
from fusiontrain.data.index.shard_index import IMAGE_PIECE, member_reader
from fusiontrain.data.index.verify import verify_shard
from fusiontrain.data.loader import Loader
from fusiontrain.data.peek import peek
from fusiontrain.data.storage.files import LocalFile
from fusiontrain.data.tokenizer import load_tokenizer
from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.shards import mixed_samples, write_shard

SIZES = [(8, 8), (20, 12), (9, 31)]


def pictures(seed, sizes):
    """Pictures of one colour each, so that a crop and a resize leave them as they are."""
    colours = np.random.default_rng(seed).integers(0, 256, (len(sizes), 3))
    return [Image.new("RGB", size, tuple(colour.tolist())) for size, colour in zip(sizes, colours, strict=True)]


def tiff(images, **settings) -> bytes:
    buffer = io.BytesIO()
    images[0].save(buffer, format="TIFF", save_all=True, append_images=images[1:], **settings)
    return buffer.getvalue()


def mint(texts, images, tiff_bytes, suffix="tiff"):
    """The members of a sample as in the dataset's card (huggingface.co/datasets/mlfoundations/MINT-1T-PDF-CC-2023-23)."""
    named = [image for image in images if image is not None]
    about = [{"height": 1, "page": 0, "sha256": "0", "width": 1, "xref": place} for place, _ in enumerate(named)]
    document = {"bff_contained_ngram_count_before_dedupe": 2, "image_metadata": about, "images": images, "texts": texts, "pdf_name": "x.pdf", "url": "u"}
    return {"json": json.dumps(document).encode(), suffix: tiff_bytes}


TEXTS = [None, "between", None, "and", "more", None]
NAMES = ["page_0_image_85", None, "page_0_image_86", None, None, "page_3_image_131"]


@pytest.mark.parametrize("suffix", ["tiff", "tif"])
def test_each_image_is_the_next_page(suffix):
    members = mint(TEXTS, NAMES, tiff(pictures(0, SIZES)), suffix)
    sample = read_sample("auto", members, members.__getitem__, "pixels")
    images = [piece.image for piece in sample.pieces if piece.image is not None]
    assert images == [f"{suffix}#page=0", f"{suffix}#page=1", f"{suffix}#page=2"]
    assert [piece.text for piece in sample.pieces] == [None, "between", None, "and", "more", None]


@pytest.mark.parametrize("settings", [{}, {"compression": "tiff_lzw"}, {"compression": "tiff_adobe_deflate"}], ids=["raw", "lzw", "deflate"])
def test_pages_keep_their_own_sizes_and_pixels_through_index_and_loader(tmp_path, settings):
    sets = {f"sample-{n:04d}": pictures(n, SIZES[: n % 3 + 1]) for n in range(6)}
    names = ["page_0_image_1", None, "page_1_image_2", None, "page_1_image_3"]
    samples = []
    for number, images in enumerate(sets.values()):
        places = names[: 2 * len(images) - 1]
        samples.append(mint([None if name else f"text {number}" for name in places], places, tiff(images, **settings)))
    path = write_shard(tmp_path / "x.tar", [*samples, *mixed_samples(2)])
    index = build_index(path, "auto", "pixels")
    for row, images in enumerate(sets.values()):
        pieces = index.pieces(row)
        is_image = index.kinds[pieces] == IMAGE_PIECE
        assert list(zip(index.widths[pieces][is_image], index.heights[pieces][is_image], strict=True)) == [image.size for image in images]
    assert verify_shard(path, index) == []
    config = tiny_config({"data.sources": [{"path": str(path)}], "data.condition_dropout": 0.0})
    loader = Loader(config, load_tokenizer(config), "train", 0, 1)
    seen = 0
    for step in range(12):
        for sequence in loader.plan.step(step):
            for document in loader.builder.read(sequence, []).documents:
                if document.source.key in sets and len(sets[document.source.key]) > 1:
                    shown = [segment.values for segment in document.segments if segment.values is not None]
                    for values, image in zip(shown, sets[document.source.key], strict=True):
                        colour = np.asarray(image)[0, 0]
                        assert np.allclose(values.reshape(-1, 3, 16), colour[:, None], atol=1)
                        seen += 1
    assert seen > 10
    assert loader.skipped == 0
    report = peek(loader.plan.step(0), loader.plan, config, loader.tokenizer, tmp_path / "peek")
    assert report["bad samples"] == 0


def test_a_tiff_is_read_once_for_all_of_its_pages(tmp_path):
    """Its bytes, and so its CRC32: a scanned book has hundreds of pages in one file."""
    path = write_shard(tmp_path / "x.tar", [mint(TEXTS, NAMES, tiff(pictures(0, SIZES)))])
    members, reads = build_index(path, "auto", "pixels").members(0), []

    class Counted(LocalFile):
        def read(self, offset, size):
            reads.append(offset)
            return super().read(offset, size)

    with contextlib.closing(Counted(path)) as file:
        read = member_reader(members, file)
        pages = [read(page_name("tiff", page)) for page in (0, 1, 2)]
        assert pages == [tiff(pictures(0, SIZES))] * 3 and len(reads) == 1
        assert read("json") and len(reads) == 2


def test_images_as_members_win_over_a_tiff_that_lies_beside_them():
    members = {"json": json.dumps({"texts": [None], "images": ["0.tiff"]}).encode(), "0.tiff": tiff(pictures(0, SIZES))}
    (piece,) = read_sample("auto", members, members.__getitem__, "pixels").pieces
    assert piece.image == "0.tiff"


WRONG = {
    "a page missing": (NAMES, tiff(pictures(0, SIZES[:2])), "names 3 images, but its .tiff has 2 pages"),
    "a page too many": (NAMES, tiff(pictures(0, [*SIZES, (3, 3)])), "names 3 images, but its .tiff has 4 pages"),
    "no tiff": (NAMES, b"II*\0 and no more", "not an image"),
    "another file": (NAMES, b"%PDF-1.7", "not an image"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow on damaged TIFF tags
@pytest.mark.parametrize(("names", "data", "reason"), WRONG.values(), ids=WRONG.keys())
def test_a_tiff_of_other_pages_is_a_bad_sample(tmp_path, names, data, reason):
    index = build_index(write_shard(tmp_path / "x.tar", [mint(TEXTS, names, data), *mixed_samples(1)]), "auto", "pixels")
    assert len(index) == 1
    ((number, _, why),) = index.bad
    assert number == 0
    assert reason in why


def test_latents_are_no_pages():
    members = mint(TEXTS, NAMES, tiff(pictures(0, SIZES)))
    with pytest.raises(BadSample, match="representation=latents"):
        read_sample("auto", members, members.__getitem__, "latents")


def test_a_document_without_images_needs_no_tiff():
    members = {"json": json.dumps({"texts": ["a", None, "b"], "images": [None, None, None]}).encode()}
    assert [piece.text for piece in read_sample("auto", members, members.__getitem__, "pixels").pieces] == ["a", "b"]


@pytest.mark.parametrize(("name", "parts"), [("tiff", ("tiff", 0)), ("tiff#page=3", ("tiff", 3)), ("0.png", ("0.png", 0))])
def test_names_of_pages(name, parts):
    assert split_page(name) == parts
    assert split_page(page_name(parts[0], 7)) == (parts[0], 7)
    assert is_image(name)
