"""Free generation: order of pieces, what is in the cache, and the limits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fusiontrain.generate import interleave as interleave_module
from fusiontrain.generate.interleave import interleave
from fusiontrain.generate.paint import paint_into
from fusiontrain.generate.pictures import to_pictures
from fusiontrain.generate.stream import Writing
from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.documents import batch_of
from fusiontrain.testing.generation import BOI, BOS, EOI, EOS, TOKENIZER, ScriptedModel, lively_model
from fusiontrain.types import Document, Segment, SourceRef
from fusiontrain.utils.errors import UserError

CONFIG = tiny_config({"objective.image": "flow_matching"})
PICTURE = np.random.default_rng(0).integers(0, 256, size=(8, 8, 3), dtype=np.uint8)
A, B, C = 65, 66, 67


@pytest.fixture(scope="module")
def model():
    return lively_model(CONFIG)


def continued(model, prompt, **settings):
    settings = {"max_images": 2, "steps": 2, "guidance": 3.0, "context": 64, "writing": Writing(8), **settings}
    return interleave(model, TOKENIZER, prompt, image=CONFIG.data.image, **settings)


def kinds(pieces) -> list[str]:
    return [piece if isinstance(piece, str) else "picture" for piece in pieces]


def logits_of(model, read) -> torch.Tensor:
    """Logits of the whole forward behind the last token of a document given as token ids and images."""
    segments: list[Segment] = []
    tokens: list[int] = []
    for item in read:
        if isinstance(item, torch.Tensor):
            segments.append(Segment("text", token_ids=np.array(tokens)))
            segments.append(Segment("image", values=item.numpy(), grid=(2, 2), bidirectional=True, max_timestep=0.0))
            tokens = []
        else:
            tokens.append(item)
    segments.append(Segment("text", token_ids=np.array(tokens)))
    num_text = sum(segment.num_tokens for segment in segments if segment.modality == "text")
    return model.text_logits(batch_of([Document(tuple(segments), SourceRef("t", "m", 0, "d"))], CONFIG))[num_text - 1]


def without_values(read) -> list:
    return ["image" if isinstance(item, torch.Tensor) else item for item in read]


def test_a_document_of_text_and_two_pictures(model, monkeypatch) -> None:
    keys = []
    monkeypatch.setattr(interleave_module, "paint_into", lambda m, t, c, key, *rest, **more: keys.append(key) or paint_into(m, t, c, key, *rest, **more))
    scripted = ScriptedModel(model, [[A, B, BOI, C, BOI, A, EOS]])
    pieces = continued(scripted, ["hi"])
    assert kinds(pieces) == ["AB", "picture", "C", "picture", "A"]
    (read,) = scripted.read
    assert without_values(read) == [BOS, *b"hi", A, B, BOI, "image", EOI, C, BOI, "image", EOI, A]
    # The pictures that are returned are those that were read back, and the stream stands where one forward over it would stand.
    images = [item for item in read if isinstance(item, torch.Tensor)]
    for image, picture in zip(images, (pieces[1], pieces[3]), strict=True):
        assert np.array_equal(to_pictures(model, image[None], (2, 2))[0], picture)
    assert len(keys) == 2 and keys[0] != keys[1], "every picture has noise of its own"
    torch.testing.assert_close(scripted.logits[0, -1], logits_of(model, read), atol=1e-5, rtol=1e-5)


def test_a_prompt_of_pictures_and_text_in_any_order(model) -> None:
    for prompt, before in (
        ([PICTURE], [BOS, BOI, "image", EOI]),
        ([PICTURE, "x"], [BOS, BOI, "image", EOI, *b"x"]),
        (["x", "y", PICTURE, PICTURE, "z"], [BOS, *b"xy", BOI, "image", EOI, BOI, "image", EOI, *b"z"]),
    ):
        scripted = ScriptedModel(model, [[C, EOS]])
        assert continued(scripted, prompt) == ["C"]
        assert without_values(scripted.read[0]) == [*before, C]
        torch.testing.assert_close(scripted.logits[0, -1], logits_of(model, scripted.read[0]), atol=1e-5, rtol=1e-5)


def test_the_same_words_and_picture_as_with_the_real_model(model) -> None:
    first = continued(model, ["tell", PICTURE, "more"], writing=Writing(8, temperature=1.0, seed=4))
    again = continued(model, ["tell", PICTURE, "more"], writing=Writing(8, temperature=1.0, seed=4))
    assert kinds(first) == kinds(again)
    assert all(isinstance(a, str) or np.array_equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(
    ("script", "settings", "expected"),
    [
        ([BOI], {"max_images": 3}, 3),  # asks for pictures only: after the last one the marker is not allowed, and other text follows
        ([BOI], {"max_images": 0}, 0),
        ([BOI], {"max_images": 9, "context": 20}, 2),  # 3 + 2 * (4 + 2) = 15, and a third would need 6 more
        ([BOI], {"max_images": 9, "context": 21}, 2),  # no place for a token after it
        ([BOI], {"max_images": 9, "context": 22}, 3),
        ([A], {"writing": Writing(5)}, 0),
        ([A], {"writing": Writing(27), "context": 30}, 0),
        ([A, A, BOI, A], {"writing": Writing(4)}, 1),
    ],
)
def test_limits_hold(model, script, settings, expected) -> None:
    scripted = ScriptedModel(model, [script])
    pieces = continued(scripted, ["hi"], **settings)
    assert kinds(pieces).count("picture") == expected
    context, budget = settings.get("context", 64), settings.get("writing", Writing(8)).max_new_tokens
    assert sum(4 if isinstance(item, torch.Tensor) else 1 for item in scripted.read[0]) <= context
    written = sum(len(piece) for piece in pieces if isinstance(piece, str))
    assert written <= budget
    if script == [A]:
        assert written == min(budget, context - 3)


def test_places_kept_for_a_picture_go_to_text_when_none_comes(model) -> None:
    letters = "abcdefghijklmnopqrstuvwxyz"
    scripted = ScriptedModel(model, [list(letters.encode())])
    assert continued(scripted, ["hi"], writing=Writing(22), context=25) == [letters[:22]], "one text, to the end of the context, nothing twice"


TOO_LONG = "the prompt with max_new_tokens of text: needs"


@pytest.mark.parametrize(("prompt", "word"), [([], "needs a prompt"), (["x" * 56], f"{TOO_LONG} 65 tokens"), ([PICTURE] * 11, f"{TOO_LONG} 75 tokens")])
def test_mistakes_are_one_sentence(model, prompt, word) -> None:
    with pytest.raises(UserError, match=word):
        continued(model, prompt)
