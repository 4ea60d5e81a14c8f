"""Chameleon against Hugging Face's own on random weights, and dropout that nothing but its keys decides."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fusiontrain.config.validate import cross_section_problems
from fusiontrain.data.collate import collate
from fusiontrain.data.tokenizer import load_tokenizer, require_room
from fusiontrain.generate.codes import code_space, paint_codes
from fusiontrain.generate.stream import Writing
from fusiontrain.generate.write import write
from fusiontrain.models.build import build_model
from fusiontrain.models.layers.dropout import keyed_dropout
from fusiontrain.models.llama_weights import export_llama
from fusiontrain.testing.chameleon import TOKEN_NAMES, code_names, write_tiny_chameleon
from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.documents import batch_of, document
from fusiontrain.testing.generation import lively_model
from fusiontrain.testing.models import write_tiny_llama
from fusiontrain.types import PackedSequence
from fusiontrain.utils.errors import UserError

BOI, EOI, FIRST_CODE, CODEBOOK = 258, 259, 260, 20
VOCAB = FIRST_CODE + CODEBOOK
SHAPE = ("vocab_size", "dim", "num_layers", "num_heads", "num_kv_heads", "ffn_dim")
CODES = [FIRST_CODE + i * 7 % CODEBOOK for i in range(12)]
TOKENS = [[256, 72, 101, BOI, *CODES[:6], EOI, 9, 257], [256, BOI, *CODES[4:], EOI, 33, 34, 257]]


def chameleon_config(**overrides):
    codes = {"data.image": {"representation": "codes", "codebook_size": CODEBOOK, "size": 8, "patch_size": 4}, "model.vocab_size": VOCAB}
    return tiny_config({"model.recipe": "chameleon", **codes, **overrides})


def documents() -> list:
    one, two = TOKENS
    return [
        document(one[:4], ("codes", *CODES[:6]), one[10:], seed=1),
        document(two[:2], ("codes", *CODES[4:]), two[10:], seed=2),
    ]


@pytest.mark.parametrize("swin_norm", [False, True], ids=["7B", "34B"])
def test_logits_equal_those_of_hugging_face_on_text_and_codes(tmp_path, swin_norm):
    from transformers import ChameleonForConditionalGeneration

    write_tiny_chameleon(tmp_path, CODEBOOK, swin_norm)
    theirs = ChameleonForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).eval()
    config = chameleon_config(**dict.fromkeys(f"model.{name}" for name in SHAPE), **{"model.base": str(tmp_path)})
    model = build_model(config)
    assert (model.shape.norm_position, model.shape.qk_norm) == ("post" if swin_norm else "pre", "layer")
    batch = batch_of(documents(), config)
    logits = model.text_logits(batch)
    for number, tokens in enumerate(TOKENS):
        (rows,) = (batch.doc_ids == number).nonzero(as_tuple=True)
        rows = rows[batch.order_ids[rows].argsort()]
        assert batch.token_ids[rows].tolist() == tokens
        with torch.no_grad():
            expected = theirs(input_ids=torch.tensor([tokens])).logits[0]
            hidden = theirs.model(input_ids=torch.tensor([tokens])).last_hidden_state[0]
        torch.testing.assert_close(logits[rows][:, :FIRST_CODE], expected[:, :FIRST_CODE], atol=1e-5, rtol=1e-5)
        # Theirs never says a code: its logits are masked behind the head.
        torch.testing.assert_close(logits[rows], hidden @ theirs.lm_head.weight.T, atol=1e-5, rtol=1e-5)


def test_a_training_starts_from_a_chameleon_with_its_own_tokens_for_codes(tmp_path):
    """Ids as Hugging Face's own table of the vocabulary has them, in the data, in what is written, and in the losses."""
    from transformers.models.chameleon.modeling_chameleon import ChameleonImageVocabularyMapping

    base = {"model.base": write_tiny_chameleon(tmp_path, CODEBOOK), "data.tokenizer": TOKEN_NAMES, **dict.fromkeys(f"model.{name}" for name in SHAPE)}
    config = chameleon_config(**base)
    assert cross_section_problems(config) == []
    tokenizer = load_tokenizer(config)
    theirs = ChameleonImageVocabularyMapping({"<image>": 7, **code_names(CODEBOOK)}).img2bpe
    assert tokenizer.code_ids == tuple(theirs[code] for code in range(CODEBOOK)) and tokenizer.vocab_size == VOCAB
    shape = build_model(chameleon_config(**base, **{"model.dropout": 0.1})).shape
    require_room(config, tokenizer, shape.vocab_size)
    assert shape.dropout == 0.1, "the base says nothing of it"
    assert tokenizer.image_ids(np.array([5, 0])).tolist() == [theirs[5], theirs[0]]
    assert not set(theirs.values()) & set(tokenizer.encode(f"a b {'IMGIMGBZ'}")), "what a text spells is no code"

    model = lively_model(config)
    space = code_space(config, tokenizer)
    assert space.ids == tokenizer.code_ids
    (written,) = paint_codes(model, tokenizer, ["a"], codes=replace(space, per_image=4), writing=Writing(1)).tolist()
    logits = model.text_logits(batch_of([document([256, *tokenizer.encode("a"), BOI])], config)).detach()[2]
    assert written[0] == max(range(CODEBOOK), key=lambda code: float(logits[theirs[code]]))
    for text in write(model, tokenizer, ["a b", "h"], writing=Writing(80, temperature=5.0)):
        assert len(text) > 80 and "IMGIMG" not in text


def test_what_a_base_has_no_tokens_for_is_one_sentence(tmp_path):
    base = write_tiny_llama(tmp_path / "llama")
    config = chameleon_config(**{"model.base": base, **dict.fromkeys(f"model.{name}" for name in SHAPE)})
    with pytest.raises(UserError, match="the codes of images need 280; start without a base"):
        require_room(config, load_tokenizer(config), build_model(config).shape.vocab_size)
    path = write_tiny_chameleon(tmp_path / "chameleon", CODEBOOK)
    few = chameleon_config(**{"data.tokenizer": {"path": path, **TOKEN_NAMES}, "data.image": {"representation": "codes", "codebook_size": 21}})
    with pytest.raises(UserError, match=r"codebook_size=21: .* has tokens for 20 codes"):
        load_tokenizer(few)


def test_a_chameleon_is_no_llama(tmp_path):
    for overrides in ({"model.norm_position": "post"}, {"model.qk_norm": "layer"}):
        with pytest.raises(UserError, match="export it with --format fusiontrain"):
            export_llama(build_model(chameleon_config(**overrides)), str(tmp_path))


def test_losses_are_told_apart_by_what_is_predicted_and_add_up_to_one_mean_over_all_tokens():
    config = chameleon_config()
    model, batch = build_model(config), batch_of(documents(), config)
    terms = model(batch)
    logits = model.text_logits(batch)
    wanted = batch.labels >= 0
    losses = torch.nn.functional.cross_entropy(logits[wanted], batch.labels[wanted], reduction="none")
    is_code = batch.labels[wanted] >= FIRST_CODE
    assert int(terms["image"].count) == len(CODES[:6]) + len(CODES[4:]) and int(terms["text"].count) == int((~is_code).sum())
    torch.testing.assert_close(terms["image"].sum, losses[is_code].sum())
    torch.testing.assert_close(terms["text"].sum, losses[~is_code].sum())


# ---------------------------------------------------------------- dropout


def test_dropout_keeps_the_mean_and_drops_its_share_of_every_row_and_feature():
    x = torch.ones(2000, 30)
    dropped = keyed_dropout(x, torch.arange(2000), 3, 0.25)
    kept = dropped != 0
    assert sorted(dropped.unique().tolist()) == pytest.approx([0.0, 4 / 3], rel=1e-4)
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.01)
    assert (kept.float().mean(0) - 0.75).abs().max() < 0.06  # 6 standard deviations of 2000 draws
    assert (kept.float().mean(1) - 0.75).abs().max() < 0.45
    correlation = torch.corrcoef(kept.T.float()) - torch.eye(30)
    assert correlation.abs().max() < 0.12, "features of a row are dropped independently"
    other = keyed_dropout(x, torch.arange(2000), 4, 0.25) != 0
    assert (kept == other).float().mean().item() == pytest.approx(0.75**2 + 0.25**2, abs=0.02), "places are independent"


def in_reading_order(values, batch, number):
    (rows,) = (batch.doc_ids == number).nonzero(as_tuple=True)
    return values[rows[batch.order_ids[rows].argsort()]]


def test_what_is_dropped_of_a_token_does_not_depend_on_what_lies_beside_its_sequence():
    config = chameleon_config(**{"model.dropout": 0.3})
    model = build_model(config)
    one, two = (PackedSequence((found,), 96, key) for found, key in zip(documents(), (11, 12), strict=True))
    alone, together = collate([two], config.data), collate([one, two], config.data)
    hidden = [model._hidden(batch, drops=True)[1] for batch in (alone, together)]
    torch.testing.assert_close(in_reading_order(hidden[0], alone, 0), in_reading_order(hidden[1], together, 1))
    plain = model._hidden(alone)[1]
    assert not torch.allclose(in_reading_order(hidden[0], alone, 0), in_reading_order(plain, alone, 0), atol=1e-2)


@pytest.mark.parametrize("place", [0, 3, 4, 6, 7, 63, 191])
def test_dropout_of_deep_models_follows_the_formula(place):
    """splitmix64 in whole numbers of any size, as deep as 96 blocks."""
    key, wanted = 12345, []
    stream = splitmix(splitmix(key) + place * 0x2545F4914F6CDD1D)
    for word in range(2):
        bits = splitmix(stream + word * 0x632BE59BD9B4E019)
        draws = [((bits >> 16 * part) & 0xFFFF) ^ 0x8000 for part in range(4)]  # from -2^15 on
        wanted += [draw >= round(0.25 * 2**16) for draw in draws]
    assert (keyed_dropout(torch.ones(1, 8), torch.tensor([key]), place, 0.25)[0] != 0).tolist() == wanted


def splitmix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) % 2**64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) % 2**64
    return value ^ (value >> 31)


def test_dropout_is_for_training_alone_and_another_key_drops_others():
    config = chameleon_config(**{"model.dropout": 0.3})
    model, batch = build_model(config), batch_of(documents(), config)
    losses = [model(batch)["text"].sum.item() for _ in range(2)]
    assert losses[0] == losses[1]
    assert model(replace(batch, row_keys=batch.row_keys + 5))["text"].sum.item() != losses[0]
    still = build_model(chameleon_config())
    assert model.eval()(batch)["text"].sum.item() == still(batch)["text"].sum.item() != losses[0]


@pytest.mark.parametrize("position", ["pre", "post"])
def test_each_sublayer_of_each_block_drops_at_a_place_of_its_own(position):
    config = chameleon_config(**{"model.dropout": 0.3, "model.norm_position": position})
    model, batch = build_model(config), batch_of(documents(), config)
    calls = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _, given, made, name=name: calls.__setitem__(name, (given, made)))
    model(batch)
    for number in range(2):
        at = f"blocks.{number}"
        (x, layout, *_), (found, _) = calls[at]
        updates = {"attention": calls[f"{at}.attention"][1][0], "feed_forward": calls[f"{at}.feed_forward"][1]}
        for sublayer, (name, update) in enumerate(updates.items()):
            dropped = keyed_dropout(update, batch.row_keys, 2 * number + sublayer, 0.3)
            x = x + (model.get_submodule(f"{at}.{name}_norm")(dropped, layout) if position == "post" else dropped)
        torch.testing.assert_close(found, x)
