"""Captioning and the writing of text: against the whole forward, ragged ends, markers that are never written, draws at a temperature."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fusiontrain.generate import stream
from fusiontrain.generate.caption import caption
from fusiontrain.generate.pictures import from_pictures
from fusiontrain.generate.stream import Writing, choose, read_tokens, write_text
from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.documents import batch_of
from fusiontrain.testing.generation import BOI, BOS, EOI, EOS, TOKENIZER, ScriptedModel, lively_model
from fusiontrain.types import Document, Segment, SourceRef
from fusiontrain.utils.errors import UserError

CONFIG = tiny_config()
BRIEF = Writing(8)
PICTURES = list(np.random.default_rng(0).integers(0, 256, size=(3, 8, 8, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def model():
    return lively_model(CONFIG)


def told(model, pictures=PICTURES, writing=BRIEF, **settings) -> list[str]:
    return caption(model, TOKENIZER, pictures, image=CONFIG.data.image, writing=writing, **settings)


def test_a_greedy_caption_is_the_argmax_of_the_whole_forward(model) -> None:
    values = from_pictures(model, PICTURES[:1], CONFIG.data.image)[0].numpy()
    image = Segment("image", values=values, grid=(2, 2), bidirectional=True, max_timestep=0.0)
    written: list[int] = []
    for _ in range(8):
        segments = (Segment("text", token_ids=np.array([BOS, BOI])), image, Segment("text", token_ids=np.array([EOI, *written])))
        logits = model.text_logits(batch_of([Document(segments, SourceRef("t", "m", 0, "d"))], CONFIG))[2 + len(written)]
        logits[[BOS, EOI]] = -torch.inf
        written.append(int(logits.argmax()))
        if written[-1] in (EOS, BOI):
            break
    assert told(model)[0] == TOKENIZER.decode(written).strip()
    assert len(written) > 2


def test_rows_end_where_they_end_and_the_cache_holds_what_was_written(model) -> None:
    scripts = [[65, 66, 67, EOS], [EOS], [68, BOI], [69, 70, 71, 72, 73, 74, 75]]
    scripted = ScriptedModel(model, scripts)
    cache = model.new_cache(4, 20)
    prompts = [[BOS, 1], [BOS], [BOS, 2, 3], [BOS, 4]]
    logits = read_tokens(scripted, cache, prompts)
    result = write_text(scripted, TOKENIZER, cache, logits, Writing(5), stop_ids=(EOS, BOI), row_numbers=range(4))
    assert result.tokens == [[65, 66, 67], [], [68], [69, 70, 71, 72, 73]]
    assert result.ended_by == [EOS, EOS, BOI, None]
    assert scripted.read == [prompt + row for prompt, row in zip(prompts, result.tokens, strict=True)]
    assert cache.lengths.tolist() == [len(row) for row in scripted.read]


@pytest.mark.parametrize("marker", [BOS, EOI, BOI])
def test_markers_and_ids_without_a_token_are_never_written(model, marker) -> None:
    logits = torch.zeros(1, 260)
    logits[0, marker], logits[0, 80] = 2, 1
    written = write_text(model, TOKENIZER, model.new_cache(1, 8), logits, Writing(1), stop_ids=(EOS,), row_numbers=[0])
    assert written.tokens == [[80]]
    padded = torch.zeros(1, 300)
    padded[0, 290], padded[0, 81] = 2, 1
    written = write_text(model, TOKENIZER, model.new_cache(1, 8), padded, Writing(1), stop_ids=(EOS,), row_numbers=[0])
    assert written.tokens == [[81]]


def test_a_caption_does_not_depend_on_its_neighbours(model) -> None:
    for writing in (Writing(8), Writing(8, temperature=1.0, seed=3)):
        assert told(model, writing=writing) == told(model, writing=writing, batch_size=1)
    warm = told(model, writing=Writing(8, temperature=1.0, seed=3))
    assert warm != told(model, writing=Writing(8, temperature=1.0, seed=4))
    assert warm != told(model)
    twice = told(model, [PICTURES[0]] * 2, Writing(8, temperature=1.0))
    assert twice[0] != twice[1], "two captions of one picture have draws of their own"


def test_draws_follow_the_probabilities() -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.2, 0.3])
    logits = probabilities.log().expand(4000, -1)
    drawn = choose(logits, Writing(1, temperature=1.0), range(4000), 0)
    shares = np.bincount(drawn, minlength=4) / 4000
    np.testing.assert_allclose(shares, probabilities, atol=0.03)
    assert shares[1] == 0
    sharper = np.bincount(choose(logits, Writing(1, temperature=0.5), range(4000), 0), minlength=4) / 4000
    np.testing.assert_allclose(sharper, probabilities**2 / (probabilities**2).sum(), atol=0.03)


def test_a_draw_of_zero_passes_over_tokens_of_no_probability(monkeypatch) -> None:
    monkeypatch.setattr(stream, "keyed_uniform", lambda *keys: 0.0)
    logits = torch.tensor([[-torch.inf, -torch.inf, 1.0, 1.0]])
    assert choose(logits, Writing(1, temperature=1.0), [0], 0) == [2]


def test_a_budget_beyond_the_context_is_refused(model) -> None:
    told(model, context=2 + 4 + 1 + 8)
    with pytest.raises(UserError, match=r"needs 15 tokens, but the model's context .* is 14"):
        told(model, context=14)
