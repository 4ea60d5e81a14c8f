"""Constrained decoding: exactly n codes between BOI and EOI, text outside, and the same numbers as a whole forward."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fusiontrain.generate.caption import caption
from fusiontrain.generate.codes import CodeSpace, caption_codes, code_space, load_codes, paint_codes, write_document
from fusiontrain.generate.paint import paint
from fusiontrain.generate.stream import Writing
from fusiontrain.modality import IMAGE
from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.documents import batch_of, document
from fusiontrain.testing.generation import BOI, BOS, EOI, TOKENIZER, lively_model
from fusiontrain.utils.errors import UserError

CODEBOOK, PER_IMAGE, FIRST = 20, 6, 260
SPACE = CodeSpace(tuple(range(FIRST, FIRST + CODEBOOK)), PER_IMAGE)


def config_of(recipe: str = "mot"):
    return tiny_config(
        {"model.recipe": recipe, "model.vocab_size": FIRST + CODEBOOK, "data.image": {"representation": "codes", "codebook_size": CODEBOOK}}
    )


class Reader:
    """The model, with what goes into its cache written down as (token, modality), and logits that a test can bend."""

    def __init__(self, model, bend=lambda logits, read: logits) -> None:
        self.model, self.bend, self.read = model, bend, []

    def __getattr__(self, name):
        return getattr(self.model, name)

    def decode_text(self, token_ids, cache, lengths=None, modality=0):
        logits = self.model.decode_text(token_ids, cache, lengths, modality)
        count = token_ids.shape[1] if lengths is None else int(lengths[0])
        self.read += [(token, modality) for token in token_ids[0, :count].tolist()]
        return self.bend(logits, self.read)


def eager(logits, read):
    """Asks for an image after three tokens, and for text in the middle of images and codes in the middle of texts."""
    bent = logits.clone()
    inside = any(token == BOI for token, _ in read) and max(i for i, (t, _) in enumerate(read) if t == BOI) > max(
        [i for i, (t, _) in enumerate(read) if t == EOI], default=-1
    )
    bent[..., 65 if inside else FIRST + 3] += 100  # never allowed there
    if not inside and len(read) % 4 == 0:
        bent[..., BOI] += 50
    return bent


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_document_has_exactly_n_codes_in_every_image_and_text_alone_outside(temperature):
    reader = Reader(lively_model(config_of()), eager)
    pieces = write_document(reader, TOKENIZER, ["hi"], codes=SPACE, writing=Writing(20, temperature, seed=5), max_images=3, context=96)
    images = [piece for piece in pieces if not isinstance(piece, str)]
    assert len(images) == 3 and all(image.shape == (PER_IMAGE,) and image.min() >= 0 and image.max() < CODEBOOK for image in images)
    tokens = [token for token, _ in reader.read]
    starts = [place for place, token in enumerate(tokens) if token == BOI]
    assert tokens[0] == BOS and len(starts) == 3
    for start, image in zip(starts, images, strict=True):
        assert tokens[start + 1 : start + 1 + PER_IMAGE] == (FIRST + image).tolist()
        assert tokens[start + 1 + PER_IMAGE] == EOI
    assert all((modality == IMAGE.id) == (token >= FIRST) for token, modality in reader.read)
    assert sum(token >= FIRST for token in tokens) == 3 * PER_IMAGE


def test_codes_are_the_most_likely_ones_of_a_forward_over_the_whole_document():
    config = config_of()
    model = lively_model(config)
    (image,) = paint_codes(model, TOKENIZER, ["red"], codes=SPACE, writing=Writing(1)).tolist()
    found: list[int] = []
    for _ in range(PER_IMAGE):
        parts = [[BOS, *b"red", BOI], ("codes", *(FIRST + code for code in found))] if found else [[BOS, *b"red", BOI]]
        batch = batch_of([document(*parts)], config)
        last = int(torch.where(batch.doc_ids == 0, batch.order_ids, -1).argmax())
        found.append(int(model.text_logits(batch)[last, FIRST : FIRST + CODEBOOK].argmax()))
    assert image == found


def test_a_row_does_not_depend_on_its_neighbours():
    model, writing = lively_model(config_of("chameleon")), Writing(1, temperature=1.0, seed=2)
    alone = paint_codes(model, TOKENIZER, ["a"], codes=SPACE, writing=writing)
    both = paint_codes(model, TOKENIZER, ["a", "a longer one"], codes=SPACE, writing=writing)
    assert torch.equal(alone[0], both[0]) and both.shape == (2, PER_IMAGE)


def test_an_image_that_does_not_fit_is_not_begun():
    reader = Reader(lively_model(config_of()), eager)
    pieces = write_document(reader, TOKENIZER, ["hi"], codes=SPACE, writing=Writing(20), max_images=9, context=3 + 2 * (PER_IMAGE + 2) + 4)
    assert sum(not isinstance(piece, str) for piece in pieces) <= 2
    assert [token for token, _ in reader.read].count(BOI) == [token for token, _ in reader.read].count(EOI)


def test_a_document_has_room_for_the_text_that_is_asked_for():
    model, settings = lively_model(config_of()), {"codes": SPACE, "max_images": 0, "context": 23}
    assert write_document(model, TOKENIZER, ["hi"], writing=Writing(20), **settings)
    with pytest.raises(UserError, match="the prompt with max_new_tokens of text: needs 24 tokens"):
        write_document(model, TOKENIZER, ["hi"], writing=Writing(21), **settings)


def test_places_kept_for_an_image_go_to_text_when_none_comes():
    def letters(logits, read):
        bent = torch.zeros_like(logits)
        bent[..., 65] = 1
        return bent

    reader = Reader(lively_model(config_of()), letters)
    assert write_document(reader, TOKENIZER, ["hi"], codes=SPACE, writing=Writing(20), max_images=1, context=23) == ["A" * 20]


def test_an_image_in_the_prompt_is_read_as_codes_and_a_wrong_one_is_refused():
    model = lively_model(config_of())
    reader, image = Reader(model), np.arange(PER_IMAGE)
    write_document(reader, TOKENIZER, ["a", image, "b"], codes=SPACE, writing=Writing(1), max_images=0, context=96)
    expected = [(token, 0) for token in (BOS, 97, BOI)] + [(FIRST + code, 1) for code in image] + [(EOI, 0), (98, 0)]
    assert reader.read[: len(expected)] == expected
    for wrong in (np.arange(PER_IMAGE - 1), np.full(PER_IMAGE, CODEBOOK)):
        with pytest.raises(UserError, match=f"must be {PER_IMAGE} codes from 0 to {CODEBOOK - 1}"):
            write_document(model, TOKENIZER, [wrong], codes=SPACE, writing=Writing(1), max_images=0, context=96)


def test_a_caption_is_the_most_likely_text_of_a_forward_over_the_whole_document():
    config = config_of()
    model, images = lively_model(config), [np.arange(PER_IMAGE), np.arange(PER_IMAGE)[::-1] + 7]
    texts = caption_codes(model, TOKENIZER, images, codes=SPACE, writing=Writing(5), context=64)
    allowed = torch.zeros(FIRST + CODEBOOK, dtype=torch.bool)
    allowed[:256] = allowed[[257, BOI]] = True  # bytes, EOS, and another image, which end the caption
    for image, text in zip(images, texts, strict=True):
        found: list[int] = []
        while len(found) < 5:
            batch = batch_of([document([BOS, BOI], ("codes", *(FIRST + image)), [EOI, *found])], config)
            last = int(torch.where(batch.doc_ids == 0, batch.order_ids, -1).argmax())
            token = int(model.text_logits(batch)[last].masked_fill(~allowed, -torch.inf).argmax())
            if token > 255:
                break
            found.append(token)
        assert text == TOKENIZER.decode(found).strip()
    assert texts[0] != texts[1], "what is told depends on the picture"
    with pytest.raises(UserError, match="a picture and max_new_tokens of caption: needs 14 tokens"):
        caption_codes(model, TOKENIZER, images, codes=SPACE, writing=Writing(5), context=13)
    with pytest.raises(UserError, match=f"must be {PER_IMAGE} codes"):
        caption_codes(model, TOKENIZER, [np.arange(4)], codes=SPACE, writing=Writing(5))


def test_a_caption_ends_where_the_model_begins_another_image():
    def two_letters(logits, read):
        bent = torch.zeros_like(logits)
        bent[..., BOI if len(read) > len((BOS, BOI, EOI)) + PER_IMAGE + 1 else 65] = 1
        return bent

    reader = Reader(lively_model(config_of()), two_letters)
    assert caption_codes(reader, TOKENIZER, [np.arange(PER_IMAGE)], codes=SPACE, writing=Writing(5)) == ["AA"]


@pytest.mark.parametrize(
    ("array", "sentence"),
    [
        (np.full((2, 3), CODEBOOK), f"codes from {CODEBOOK} to {CODEBOOK}, data.image.codebook_size={CODEBOOK} allows 0 to {CODEBOOK - 1}"),
        (np.full((2, 3), -1), "codes from -1 to -1"),
        (np.zeros((2, 3), np.float32), "is float32 \\[2, 3\\], expected whole numbers \\[height, width\\]"),
        (np.zeros(6, np.int64), "is int64 \\[6\\], expected whole numbers"),
        (None, "cannot be read"),
    ],
    ids=str,
)
def test_files_that_are_no_codes_of_the_model_are_refused(array, sentence, tmp_path):
    path = tmp_path / "x.vq.npy"
    if array is not None:
        np.save(path, array)
    with pytest.raises(UserError, match=f"x.vq.npy: .*{sentence}"):
        load_codes(str(path), config_of().data.image)
    np.save(path, np.arange(6, dtype=np.uint16).reshape(2, 3))
    assert load_codes(str(path), config_of().data.image).tolist() == [0, 1, 2, 3, 4, 5]


def test_a_model_of_codes_asked_for_a_picture_says_why_not():
    image = config_of().data.image
    with pytest.raises(UserError, match="nothing here makes codes of a picture"):
        caption(lively_model(config_of()), TOKENIZER, [np.zeros((8, 8, 3), np.uint8)], image=image, writing=Writing(2))
    with pytest.raises(UserError, match="a picture of codes"):
        paint(lively_model(config_of()), TOKENIZER, ["red"], image=image, steps=1, guidance=1.0, seed=0)


def test_a_model_of_patches_writes_no_codes():
    with pytest.raises(UserError, match="writes no codes"):
        code_space(tiny_config(), TOKENIZER)
    image = config_of().data.image.model_copy(update={"size": 32, "patch_size": 16})
    config = config_of()
    config = config.model_copy(update={"data": config.data.model_copy(update={"image": image})})
    assert code_space(config, TOKENIZER) == CodeSpace(SPACE.ids, 4)
