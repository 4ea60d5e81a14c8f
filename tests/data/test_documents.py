"""What a document looks like, token by token, for every format and every choice that is made for it."""

from __future__ import annotations

import contextlib
import io
import json
import struct

import numpy as np
import pytest
from PIL import Image

from fusiontrain.data.documents import Draws, Place, arrange, build_document, draw
from fusiontrain.data.errors import BadSample
from fusiontrain.data.formats.read import read_sample
from fusiontrain.data.index.shard_index import IMAGE_PIECE, TEXT_PIECE
from fusiontrain.data.tokenizer import load_tokenizer
from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.shards import interleaved, png
from fusiontrain.types import SourceRef

BOS, EOS, BOI, EOI = 256, 257, 258, 259
PATCHES = "patches"
AS_IT_IS = Draws(image_first=False, drop_condition=False)
IMAGE_FIRST = Draws(image_first=True, drop_condition=False)
DROPPED = Draws(image_first=False, drop_condition=True)
SOURCE = SourceRef("test", "memory", 0, "key")


def built(members, draws=AS_IT_IS, kind="auto", **overrides):
    """The document of a sample whose pieces are measured here, as the index would."""
    config = tiny_config(overrides)
    tokenizer = load_tokenizer(config)
    sample = read_sample(kind, members, members.__getitem__, config.data.image.representation)
    kinds = [IMAGE_PIECE if piece.image else TEXT_PIECE for piece in sample.pieces]
    tokens = [4 if piece.image else len(tokenizer.encode(piece.text)) for piece in sample.pieces]
    ((places, length, cut),) = arrange(kinds, tokens, sample.is_pair, draws, config.data, tokenizer.begin_text_id is not None)
    document = build_document(sample, members.__getitem__, places, cut, config.data, tokenizer, SOURCE)
    assert document.num_tokens == length
    return document


def tokens_of(document):
    """Token ids, with "patches" for an image."""
    return [token for s in document.segments for token in (s.token_ids.tolist() if s.token_ids is not None else [PATCHES])]


PAIR = {"txt": b"ab", "png": png(0)}
FORMATS = {
    "txt": PAIR,
    "json caption": {"json": json.dumps({"caption": "ab", "url": "x", "width": 3}).encode(), "jpg": png(0)},
    "json text": {"json": json.dumps({"text": "ab"}).encode(), "webp": png(0)},
    "empty txt": {"txt": b" \n", "json": json.dumps({"caption": "ab"}).encode(), "png": png(0)},
    "interleaved": interleaved(["ab", None], [None, png(0)]),
    "interleaved in pieces": interleaved(["a", None, "b", None], [None, None, None, png(0)]),
    "other fields": {"json": json.dumps({"texts": ["ab", None], "images": [None, "X.PNG"], "score": [1]}).encode(), "x.png": png(0)},
}


@pytest.mark.parametrize("members", FORMATS.values(), ids=FORMATS.keys())
def test_every_format_gives_the_same_document(members):
    assert tokens_of(built(members)) == [BOS, 97, 98, BOI, PATCHES, EOI, EOS]


@pytest.mark.parametrize("members", [{"txt": b"ab"}, {"json": b'{"text": "ab"}'}, interleaved(["ab"], [None])])
def test_text_alone_is_a_document(members):
    assert tokens_of(built(members)) == [BOS, 97, 98, EOS]


def test_text_between_two_images_is_one_segment():
    document = built(interleaved([None, "a", "b", None], [png(0), None, None, png(1)]))
    assert tokens_of(document) == [BOS, BOI, PATCHES, EOI, 97, 98, BOI, PATCHES, EOI, EOS]
    assert [segment.modality for segment in document.segments] == ["text", "image", "text", "image", "text"]
    assert [segment.bidirectional for segment in document.segments] == [False, True, False, True, False]


@pytest.mark.parametrize(("cap", "is_target"), [(0.5, True), (0.0, False)])
def test_an_image_that_opens_its_document_gets_less_noise(cap, is_target):
    settings = {"data.image": {"size": 8, "patch_size": 4, "image_first_noise_cap": cap}}
    document = built(PAIR, IMAGE_FIRST, **settings)
    assert tokens_of(document) == [BOS, BOI, PATCHES, EOI, 97, 98, EOS]
    assert (document.segments[1].max_timestep, document.segments[1].is_target) == (cap, is_target)
    last = built(PAIR, **settings).segments[1]
    assert (last.max_timestep, last.is_target) == (1.0, True)


def test_a_dropped_condition_leaves_the_image_alone_with_all_of_its_noise():
    document = built(PAIR, DROPPED)
    assert tokens_of(document) == [BOS, BOI, PATCHES, EOI, EOS]
    assert document.segments[1].max_timestep == 1.0
    for members in (interleaved(["a", None, "b"], [None, png(0), None]), interleaved(["a", None, None], [None, png(0), png(1)]), {"txt": b"a"}):
        assert tokens_of(built(members, DROPPED)) == tokens_of(built(members)), "only text and then one image"


def test_draws_are_shares_of_documents():
    config = tiny_config({"data.condition_dropout": 0.3, "data.sources": [{"path": "x", "image_first_probability": 0.2}]})
    made = [draw(config.data, config.data.sources[0], (0, 0, 0, sample, 13), True, True) for sample in range(4000)]
    assert abs(np.mean([d.image_first for d in made]) - 0.2) < 0.02
    assert abs(np.mean([d.drop_condition for d in made]) - 0.3) < 0.02
    assert abs(np.mean([d.drop_condition and d.image_first for d in made]) - 0.06) < 0.015, "independent of each other"


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (10, [BOS, 97, 98, BOI, PATCHES, EOI, EOS]),
        (9, [BOS, 97, 98]),  # the image does not fit: no EOS, for the document goes on
        (8, [BOS, 97, 98]),
    ],
)
def test_a_cut_never_goes_through_an_image_and_leaves_no_end(length, expected):
    assert tokens_of(built(PAIR, **{"data.sequence_length": length})) == expected


def test_a_cut_text_fills_the_sequence():
    document = built({"txt": b"abcdefghijkl"}, **{"data.sequence_length": 8})
    assert tokens_of(document) == [BOS, *b"abcdefg"]
    assert tokens_of(built({"txt": b"abcdef"}, **{"data.sequence_length": 8})) == [BOS, *b"abcdef", EOS]


def test_a_sample_that_is_not_the_indexed_one_is_bad():
    config = tiny_config()
    tokenizer = load_tokenizer(config)
    for places in ([Place(0, TEXT_PIECE, 3)], [Place(0, IMAGE_PIECE, 4)], [Place(5, TEXT_PIECE, 2)], [Place(0, TEXT_PIECE, 1)], [Place(1, IMAGE_PIECE, 9)]):
        with pytest.raises(BadSample, match="since it was indexed"):
            build_document(read_sample("auto", PAIR, PAIR.__getitem__, "pixels"), PAIR.__getitem__, places, False, config.data, tokenizer, SOURCE)


# ---------------------------------------------------------------- latents and damage


def npy(array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


LATENTS = {"data.image": {"size": 8, "patch_size": 2, "representation": "latents", "channels": 4}}


@pytest.mark.parametrize(
    "members",
    [
        {"txt": b"ab", "png": png(0), "latent.npy": npy(np.ones((4, 4, 4), np.float16))},
        {"json": json.dumps({"texts": ["ab", None], "images": [None, "0.png"]}).encode(), "0.png": png(0), "0.latent.npy": npy(np.ones((4, 4, 4)))},
    ],
)
def test_latents_stand_in_for_pixels(members):
    document = built(members, **LATENTS)
    assert tokens_of(document) == [BOS, 97, 98, BOI, PATCHES, EOI, EOS]
    assert document.segments[1].values.dtype == np.float32
    assert document.segments[1].values.shape == (4, 16)
    assert built(members).segments[1].values.shape == (4, 48), "the same sample as pixels"


DAMAGED_LATENTS = {
    "a zip": b"PK\x03\x04 and no more",
    "cut": npy(np.ones((4, 4, 4)))[:-9],
    "text": npy(np.array([[["a"]]])),
    "flat": npy(np.ones((4, 4))),
    "not finite": npy(np.full((4, 4, 4), np.nan)),
    "too large": npy(np.full((4, 4, 4), 1e300)),
    "a huge shape": npy(np.ones((4, 4, 4))).replace(b"(4, 4, 4)", b"(4, 4, 9**9)"[:9]),
}


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("data", DAMAGED_LATENTS.values(), ids=DAMAGED_LATENTS.keys())
def test_damaged_latents_are_bad_samples(data):
    with pytest.raises(BadSample, match="latent"):
        built({"txt": b"ab", "latent.npy": data}, **LATENTS)


@pytest.mark.parametrize(
    ("members", "settings"), [({"txt": b"ab", "png": png(0)}, LATENTS), ({"txt": b"ab", "latent.npy": npy(np.ones((4, 4, 4)))}, {})]
)
def test_a_pair_whose_image_is_there_in_the_other_form_is_no_text(members, settings):
    with pytest.raises(BadSample, match=r"but data\.image\.representation="):
        built(members, **settings)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow on damaged TIFF tags
def test_any_bytes_are_an_image_or_a_bad_sample():
    """Damage anywhere in files of several formats: decoders raise all kinds of errors, and none may get out."""
    random = np.random.default_rng(0)
    for format in ("PNG", "JPEG", "TIFF", "GIF", "BMP", "WEBP"):
        sound = png(1, (16, 12), format=format)
        for _ in range(25):
            data = bytearray(sound)
            for place in random.integers(0, len(data), 3):
                data[place] = random.integers(256)
            with contextlib.suppress(BadSample):
                assert built({"txt": b"ab", "png": bytes(data)}).segments[1].values.dtype == np.uint8
    with pytest.raises(BadSample):
        built({"txt": b"ab", "png": b"\x89PNG\r\n\x1a\n" + struct.pack(">I4s", 13, b"IHDR") + bytes(4)})


def test_pictures_stand_upright_and_32_bit_grey_is_scaled():
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4] = 255
    exif = Image.Exif()
    exif[274] = 3  # orientation: upside down
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", exif=exif)
    values = built({"txt": b"ab", "png": buffer.getvalue()}).segments[1].values
    assert (values[:2] == 0).all()
    assert (values[2:] == 255).all()
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8), 0x8000, np.int32)).save(buffer, format="TIFF")
    assert np.allclose(built({"txt": b"ab", "tiff": buffer.getvalue()}).segments[1].values, 128)
