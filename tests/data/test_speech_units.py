"""Speech as a third, discrete modality: from `.units.npy` members over index, plan and batch to a training step."""

from __future__ import annotations

import contextlib
import io
import json

import numpy as np
import pytest
import torch

from fusiontrain.data.errors import BadSample
from fusiontrain.data.loader import Loader
from fusiontrain.data.modalities.speech import decode_units
from fusiontrain.data.tokenizer import load_tokenizer
from fusiontrain.models.build import build_model
from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.shards import write_shard
from fusiontrain.train.optim import build_optimizer, embedding_names
from fusiontrain.train.step import global_counts, train_step
from fusiontrain.utils.errors import UserError

BOS, EOS, BOI, EOI, BEGIN, END = 256, 257, 258, 259, 260, 261
CODEBOOK, UNITS = 50, 30
FIRST_CODE = 262
FIRST_UNIT = FIRST_CODE + CODEBOOK


def npy(array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def units(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, UNITS, count).astype(np.uint16)


def codes(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, CODEBOOK, (2, 3)).astype(np.uint16)


def document(seed: int) -> dict:
    """text, image, text, speech."""
    place = {"texts": [f"say {seed}", None, "so", None], "images": [None, "1.png", None, "3.units.npy"]}
    return {"json": json.dumps(place).encode(), "1.vq.npy": npy(codes(seed)), "3.units.npy": npy(units(seed, 5 + seed))}


SAMPLES = [*(document(seed) for seed in range(5)), {"txt": b"heard", "units.npy": npy(units(9, 7))}, {"txt": b"text alone"}]


def make_loader(shard, rank: int = 0, world_size: int = 1, **overrides):
    settings = {
        "model.recipe": "mot", "model.vocab_size": FIRST_UNIT + UNITS, "data.image": {"representation": "codes", "codebook_size": CODEBOOK},
        "data.modalities": ["text", "image", "speech"], "data.speech.num_units": UNITS, "data.tokenizer.begin_speech_token": "<s>",
        "data.tokenizer.end_speech_token": "</s>", "data.condition_dropout": 0.0, "data.pack_window_documents": len(SAMPLES),
        "train.global_batch_sequences": 2, "data.sources": [{"path": str(shard), "image_first_probability": 0.0}], "data.max_bad_fraction": 1.0,
    }  # fmt: skip
    config = tiny_config({**settings, **overrides})
    return Loader(config, load_tokenizer(config), "train", rank, world_size)


def first_batch(loader):
    with contextlib.closing(loader.iterate(0)) as steps:
        (batch,), _ = next(steps)
    return batch


def read(batch) -> dict[int, list[int]]:
    """Token ids of each document by its number in the shard, in reading order."""
    found = {}
    for number, source in enumerate(batch.sources):
        mine = batch.doc_ids == number
        found[source.index] = batch.token_ids[mine][batch.order_ids[mine].argsort()].tolist()
    return found


def test_units_are_tokens_behind_those_of_images_between_their_markers(tmp_path):
    loader = make_loader(write_shard(tmp_path / "a.tar", SAMPLES))
    batch = first_batch(loader)
    found = read(batch)
    for seed in range(5):
        image, speech = (FIRST_CODE + codes(seed).ravel().astype(int)).tolist(), (FIRST_UNIT + units(seed, 5 + seed).astype(int)).tolist()
        assert found[seed] == [BOS, *f"say {seed}".encode(), BOI, *image, EOI, *b"so", BEGIN, *speech, END, EOS]
    assert found[5] == [BOS, *b"heard", BEGIN, *(FIRST_UNIT + units(9, 7).astype(int)).tolist(), END, EOS]
    assert found[6] == [BOS, *b"text alone", EOS]
    low, high = batch.modality_bounds[2:4]
    assert (batch.token_ids[low:high] >= FIRST_UNIT).all() and high - low == batch.token_counts["speech"] == sum(range(5, 10)) + 7
    assert batch.target_counts["speech"] == batch.token_counts["speech"]
    assert batch.modality_bounds == batch.slice_bounds and batch.key_ranges.shape[1] == 3
    planned = loader.plan.counts(0, 1)[0]
    assert {name: planned[name] for name in batch.token_counts} == batch.token_counts


def test_speech_comes_first_as_often_as_images_do(tmp_path):
    shard = write_shard(tmp_path / "a.tar", SAMPLES)
    batch = first_batch(make_loader(shard, **{"data.sources": [{"path": str(shard), "image_first_probability": 1.0}]}))
    assert read(batch)[5][1] == BEGIN


def test_data_that_do_not_name_speech_leave_it_out_with_its_markers(tmp_path):
    names = {"data.modalities": ["text", "image"], "data.tokenizer": {"path": "bytes"}, "model.vocab_size": 260 + CODEBOOK}
    batch = first_batch(make_loader(write_shard(tmp_path / "a.tar", SAMPLES), **names))
    found = read(batch)
    assert found[5] == [BOS, *b"heard", EOS]
    assert "speech" not in batch.token_counts and len(batch.modality_bounds) == 3


def test_every_rank_plans_the_same_tokens_of_speech(tmp_path):
    shard = write_shard(tmp_path / "a.tar", SAMPLES)
    counted = [first_batch(make_loader(shard, rank, 2)).token_counts["speech"] for rank in range(2)]
    assert [counts["speech"] for counts in make_loader(shard).plan.counts(0, 2)] == counted


def test_weights_by_tokens_count_units(tmp_path):
    from fusiontrain.data.plan.lengths import num_tokens

    loader = make_loader(write_shard(tmp_path / "a.tar", SAMPLES))
    (source,) = loader.plan.sources
    total = num_tokens(source.indexes[0], source.tokens[0].counts, source.rows(0), loader.config.data)
    assert total == sum(len(tokens) for tokens in read(first_batch(loader)).values())


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.array([0, 30]), "units from 0 to 30, data.speech.num_units=30"),
        (np.array([-1, 3]), "units from -1 to 3"),
        (np.zeros((2, 2), int), r"int64 \[2, 2\], expected whole numbers \[n\]"),
        (np.array([0.5]), "float64"),
        (np.zeros(0, int), r"\[0\]"),
    ],
)
def test_units_that_are_none_are_refused_in_one_sentence(array, words):
    with pytest.raises(BadSample, match=words):
        decode_units(npy(array), UNITS)


def test_a_bad_recording_is_counted_and_the_others_come(tmp_path):
    bad = {"txt": b"too high", "units.npy": npy(np.array([UNITS, 1]))}
    loader = make_loader(write_shard(tmp_path / "a.tar", [*SAMPLES, bad]), **{"data.pack_window_documents": len(SAMPLES) + 1})
    assert first_batch(loader).token_counts["speech"] == sum(range(5, 10)) + 7
    assert loader.skipped == 1


def test_speech_needs_markers_and_room_in_the_vocabulary(tmp_path):
    shard = write_shard(tmp_path / "a.tar", SAMPLES)
    with pytest.raises(UserError, match="begin_speech_token: is not set"):
        make_loader(shard, **{"data.tokenizer": {"path": "bytes"}})
    with pytest.raises(UserError, match=f"the codes of images and the units of speech need {FIRST_UNIT + UNITS}"):
        make_loader(shard, **{"model.vocab_size": FIRST_UNIT + UNITS - 1})


def test_three_modalities_are_learned_together(tmp_path):
    loader = make_loader(write_shard(tmp_path / "a.tar", SAMPLES), **{"model.norm_position": "post", "model.qk_norm": "rms"})
    model = build_model(loader.config)
    optimizer = build_optimizer(dict(model.named_parameters()), embedding_names(model), loader.config.optimizer)
    batch = first_batch(loader)
    counts, weights = global_counts([batch]), dict.fromkeys(("text", "image", "speech"), 1.0)
    results = [train_step(model, optimizer, [batch], counts, weights, 1.0, 1, torch.device("cpu")) for _ in range(15)]
    for name in weights:
        assert results[-1].losses[name] < 0.9 * results[0].losses[name], name
    total = sum(results[0].losses[name] * counts.targets[name] for name in weights) / sum(counts.targets.values())
    assert results[0].loss == pytest.approx(total, rel=1e-5), "the mean over all tokens, whatever their modality"
