"""Text and units of speech behind a prompt: against whole forwards, and never a token of another kind."""

from __future__ import annotations

import pytest
import torch

from fusiontrain.config.schema import TokenizerConfig
from fusiontrain.data.tokenizer import byte_tokenizer
from fusiontrain.generate.speak import speak
from fusiontrain.generate.stream import Writing
from fusiontrain.generate.write import write
from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.documents import batch_of, document
from fusiontrain.testing.generation import BOI, BOS, EOI, EOS, TOKENIZER, lively_model
from fusiontrain.utils.errors import UserError

TEXT_CONFIG = tiny_config({"model.recipe": "dense", "data.modalities": ["text"]})
BEGIN, END, FIRST_UNIT, NUM_UNITS, MOST = 260, 261, 262 + 20, 9, 7
SPEECH = {
    "data.modalities": ["text", "image", "speech"], "data.speech.num_units": NUM_UNITS, "data.image": {"representation": "codes", "codebook_size": 20},
    "data.tokenizer": {"path": "bytes", "begin_speech_token": "<s>", "end_speech_token": "</s>"}, "model.recipe": "mot", "model.vocab_size": 300,
}  # fmt: skip


@pytest.fixture(scope="module")
def text_model():
    return lively_model(TEXT_CONFIG)


@pytest.fixture(scope="module")
def speaker():
    config = tiny_config(SPEECH)
    return config, lively_model(config), byte_tokenizer(TokenizerConfig(begin_speech_token="<s>", end_speech_token="</s>"))


def last_logits(model, config, *parts) -> torch.Tensor:
    batch = batch_of([document(*parts)], config)
    return model.text_logits(batch).detach()[int(torch.where(batch.doc_ids == 0, batch.order_ids, -1).argmax())]


def test_a_continuation_is_the_argmax_of_the_whole_forward(text_model):
    prompts, expected = ["a red", "b", "one", "a small blue square"], []
    for prompt in prompts:
        found: list[int] = []
        while len(found) < 8 and found[-1:] != [EOS]:
            logits = last_logits(text_model, TEXT_CONFIG, [BOS, *prompt.encode(), *found])
            logits[[BOS, BOI, EOI]] = -torch.inf
            found.append(int(logits.argmax()))
        expected.append(TOKENIZER.decode(found))
    assert write(text_model, TOKENIZER, prompts, writing=Writing(8)) == expected
    assert len(max(expected, key=len)) > 2 and len(set(expected)) > 1


def test_texts_do_not_depend_on_their_neighbours(text_model):
    prompts, writing = ["a", "a longer one", "b"], Writing(6, temperature=1.0, seed=4)
    together = write(text_model, TOKENIZER, prompts, writing=writing)
    assert together == write(text_model, TOKENIZER, prompts, writing=writing, batch_size=2)
    assert write(text_model, TOKENIZER, prompts[:1], writing=writing) == together[:1] and len(set(together)) == 3


def test_a_prompt_must_fit_with_what_follows(text_model):
    write(text_model, TOKENIZER, ["ab"], writing=Writing(7), context=10)
    with pytest.raises(UserError, match="needs 11 tokens"):
        write(text_model, TOKENIZER, ["abc"], writing=Writing(7), context=10)
    with pytest.raises(UserError, match=r"prompt 2: is empty"):
        write(text_model, byte_tokenizer(TokenizerConfig(begin_text_token=None)), ["a", ""], writing=Writing(2))


def test_speech_is_the_argmax_over_units_and_its_end(speaker):
    config, model, tokenizer = speaker
    (units,) = speak(model, tokenizer, ["hi"], config=config, writing=Writing(MOST))
    found: list[int] = []
    while len(found) < MOST:
        logits = last_logits(model, config, [BOS, *b"hi", BEGIN], *([("speech", *found)] if found else []))
        best = max((*range(FIRST_UNIT, FIRST_UNIT + NUM_UNITS), END), key=lambda token: float(logits[token]))
        if best == END:
            break
        found.append(best)
    assert units == [token - FIRST_UNIT for token in found] and len(units) > 1


def test_nothing_but_units_is_spoken_and_the_end_ends_it(speaker):
    config, model, tokenizer = speaker
    rows = speak(model, tokenizer, ["hi", "a longer one"] * 4, config=config, writing=Writing(40, temperature=3.0, seed=1))
    assert all(0 <= unit < NUM_UNITS for row in rows for unit in row)
    assert min(map(len, rows)) < 40, "the end of speech was drawn"
    assert rows[:2] == speak(model, tokenizer, ["hi", "a longer one"], config=config, writing=Writing(40, temperature=3.0, seed=1))


def test_a_prompt_of_speech_must_fit_too(speaker):
    config, model, tokenizer = speaker
    speak(model, tokenizer, ["hi"], config=config, writing=Writing(1))
    with pytest.raises(UserError, match="prompt 1 with max_new_tokens of speech: needs 97 tokens"):
        speak(model, tokenizer, ["hi"], config=config, writing=Writing(97 - 4))


def test_a_model_without_speech_says_so(text_model):
    with pytest.raises(UserError, match="learnt no speech"):
        speak(text_model, TOKENIZER, ["hi"], config=TEXT_CONFIG, writing=Writing(4))
