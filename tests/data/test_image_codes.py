"""Images as codes of a vector quantiser: tokens of the one vocabulary, from `.vq.npy` members to a training step."""

from __future__ import annotations

import contextlib
import io
import json

import numpy as np
import pytest
import torch

from fusiontrain.cli.main import main
from fusiontrain.config.schema import ImageDataConfig
from fusiontrain.data.errors import DECODE, BadSample
from fusiontrain.data.formats.read import read_sample
from fusiontrain.data.index.build import build_index
from fusiontrain.data.loader import Loader
from fusiontrain.data.modalities.image import decode_codes, image_size
from fusiontrain.data.peek import peek
from fusiontrain.data.tokenizer import load_tokenizer
from fusiontrain.models.build import build_model
from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.shards import png, write_shard
from fusiontrain.train.optim import build_optimizer, embedding_names
from fusiontrain.train.step import global_counts, train_step
from fusiontrain.utils.errors import UserError

BOS, EOS, BOI, EOI = 256, 257, 258, 259
FIRST_CODE, CODEBOOK = 260, 50
CONFIG = ImageDataConfig(representation="codes", codebook_size=CODEBOOK)


def npy(array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def codes(seed: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, CODEBOOK, (height, width)).astype(np.uint16)


def interleaved(texts, images) -> dict:
    names = [None if image is None else f"{place}.png" for place, image in enumerate(images)]
    members = {f"{place}.vq.npy": npy(image) for place, image in enumerate(images) if image is not None}
    return {"json": json.dumps({"texts": texts, "images": names}).encode(), **members}


SHAPES = [(2, 3), (4, 4), (1, 1), (3, 2), (1, 7), (5, 3)]
SAMPLES = [interleaved([f"picture {n}", None, "and", None], [None, codes(n, *shape), None, codes(n + 100, 2, 2)]) for n, shape in enumerate(SHAPES)]


def make_loader(shard, **overrides):
    settings = {
        "model.recipe": "dense", "model.vocab_size": FIRST_CODE + CODEBOOK, "data.image": CONFIG.model_dump(), "data.condition_dropout": 0.0,
        "data.pack_window_documents": len(SAMPLES), "train.global_batch_sequences": 3, "data.sources": [{"path": str(shard)}], "data.max_bad_fraction": 1.0,
    }  # fmt: skip
    config = tiny_config({**settings, **overrides})
    return Loader(config, load_tokenizer(config), "train", 0, 1)


def first_batch(loader):
    with contextlib.closing(loader.iterate(0)) as steps:
        (batch,), _ = next(steps)
    return batch


def documents_of(batch) -> dict[int, tuple[list[int], list[int]]]:
    """Token ids and labels of each document by its number in the shard, in reading order."""
    found = {}
    for number, source in enumerate(batch.sources):
        mine = batch.doc_ids == number
        order = batch.order_ids[mine].argsort()
        found[source.index] = batch.token_ids[mine][order].tolist(), batch.labels[mine][order].tolist()
    return found


def test_codes_are_tokens_behind_the_tokenizers_own_in_raster_order(tmp_path):
    batch = first_batch(make_loader(write_shard(tmp_path / "a.tar", SAMPLES)))
    found = documents_of(batch)
    assert found.keys() == set(range(len(SAMPLES)))
    for number, shape in enumerate(SHAPES):
        one, two = codes(number, *shape), codes(number + 100, 2, 2)
        expected = [BOS, *f"picture {number}".encode(), BOI, *(FIRST_CODE + int(one[r, c]) for r in range(shape[0]) for c in range(shape[1])), EOI]
        expected += [*b"and", BOI, *(FIRST_CODE + int(code) for row in two for code in row), EOI, EOS]
        tokens, labels = found[number]
        assert tokens == expected
        assert labels == [*expected[1:], -100]
    assert (batch.segment_ids == -1).all(), "codes are causal"
    assert "image" not in batch.payloads
    num_codes = sum(height * width + 4 for height, width in SHAPES)
    assert batch.token_counts["image"] == batch.target_counts["image"] == num_codes
    low, high = batch.modality_bounds[1:3]
    assert high - low == num_codes and (batch.token_ids[low:high] >= FIRST_CODE).all() and (batch.token_ids[:low] < FIRST_CODE).all()


def test_labels_are_counted_by_their_own_modality_not_by_that_of_their_row(tmp_path):
    batch = first_batch(make_loader(write_shard(tmp_path / "a.tar", SAMPLES)))
    labelled = batch.labels != -100
    assert torch.equal(batch.label_modality_ids[labelled], (batch.labels[labelled] >= FIRST_CODE).to(torch.int8))
    assert batch.target_counts == {"text": int((batch.labels[labelled] < FIRST_CODE).sum()), "image": int((batch.labels >= FIRST_CODE).sum())}


def test_the_plan_knows_the_lengths_from_the_index(tmp_path):
    loader = make_loader(write_shard(tmp_path / "a.tar", SAMPLES))
    for sequence in loader.plan.step(0):
        for planned in sequence.documents:
            height, width = SHAPES[planned.sample]
            assert planned.image_tokens == height * width + 4
            assert planned.num_tokens == planned.image_tokens + len(f"picture {planned.sample}") + len("and") + 2 + 4
    (seen,) = {int(source.doc_ids.max()) + 1 for source in [first_batch(loader)]}
    assert seen == len(SAMPLES)
    assert loader.skipped == 0


def test_a_split_never_goes_through_the_codes_of_an_image(tmp_path):
    loader = make_loader(write_shard(tmp_path / "a.tar", SAMPLES), **{"data.sequence_length": 24, "data.oversize": "split"})
    for step in range(4):
        for planned in loader.plan.step(step):
            for document in loader.builder.read(planned, []).documents:
                ids = [token for segment in document.segments for token in segment.token_ids.tolist()]
                assert ids.count(BOI) == ids.count(EOI)
    assert loader.skipped == 0


def test_a_pair_has_its_codes_where_pixels_and_latents_lie_beside_them():
    members = {"txt": b"ab", "png": png(0), "latent.npy": npy(np.ones((4, 2, 2))), "vq.npy": npy(codes(0, 2, 2))}
    for representation, suffix in (("pixels", "png"), ("latents", "latent.npy"), ("codes", "vq.npy")):
        assert [piece.image for piece in read_sample("auto", members, members.__getitem__, representation).pieces] == [None, suffix]
    del members["vq.npy"]
    with pytest.raises(BadSample, match=r"has latent\.npy, png, but data\.image\.representation=codes"):
        read_sample("auto", members, members.__getitem__, "codes")


@pytest.mark.parametrize(("representation", "usable"), [("pixels", 0), ("codes", 3)])
def test_the_index_command_reads_what_a_training_does(tmp_path, capsys, representation, usable):
    write_shard(tmp_path / "x.tar", [{"txt": b"ab", "vq.npy": npy(codes(n, 2, 2))} for n in range(3)])
    assert main(["data", "index", str(tmp_path), "--representation", representation, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["samples"], report["unusable samples"], report["images"]) == (usable, 3 - usable, usable)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int64, ">i4"])
def test_whole_numbers_of_any_width_are_codes(dtype):
    array = codes(3, 3, 5)
    assert image_size("0.vq.npy", npy(array.astype(dtype))) == (3, 5)
    assert decode_codes("0.vq.npy", npy(array.astype(dtype)), CONFIG).tolist() == array.ravel().tolist()


OUT_OF_RANGE = {"too large": [[0, CODEBOOK]], "negative": [[0, -1]], "far": [[2**40, 0]]}


@pytest.mark.parametrize("array", OUT_OF_RANGE.values(), ids=OUT_OF_RANGE.keys())
def test_codes_that_the_codebook_lacks_are_a_bad_sample(array):
    with pytest.raises(BadSample, match=rf"codebook_size={CODEBOOK} allows 0 to {CODEBOOK - 1}") as caught:
        decode_codes("vq.npy", npy(np.array(array)), CONFIG)
    assert caught.value.reason == DECODE
    assert decode_codes("vq.npy", npy(np.array([[0, CODEBOOK - 1]])), CONFIG).tolist() == [0, CODEBOOK - 1]


DAMAGED = {
    "floats": npy(np.ones((2, 2))),
    "flat": npy(np.ones(4, int)),
    "deep": npy(np.ones((1, 2, 2), int)),
    "empty": npy(np.ones((0, 2), int)),
    "truth": npy(np.ones((2, 2), bool)),
    "cut": npy(np.ones((2, 2), int))[:-3],
    "no array": b"\x93NUMPX",
}


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED.keys())
def test_what_is_no_array_of_codes_is_found_by_the_index(data, tmp_path):
    with pytest.raises(BadSample, match=r"vq\.npy"):
        image_size("0.vq.npy", data)
    shard = write_shard(tmp_path / "a.tar", [{"txt": b"a", "vq.npy": data}, {"txt": b"b", "vq.npy": npy(codes(0, 2, 2))}])
    index = build_index(shard, "auto", "codes")
    assert [number for number, *_ in index.bad] == [0]
    assert index.heights.tolist() == [0, 2]


def test_a_document_with_codes_out_of_range_leaves_padding_and_moves_nothing(tmp_path):
    sound = first_batch(make_loader(write_shard(tmp_path / "a.tar", SAMPLES)))
    wrong = codes(3, *SHAPES[3]).astype(np.int64)
    wrong[0, 0] = CODEBOOK
    samples = list(SAMPLES)
    samples[3] = interleaved(["picture 3", None, "and", None], [None, wrong, None, codes(103, 2, 2)])
    loader = make_loader(write_shard(tmp_path / "b" / "a.tar", samples))
    batch = first_batch(loader)
    assert loader.log.counts == {(str(tmp_path / "b" / "a.tar"), DECODE): 1}
    expected = documents_of(sound)
    assert documents_of(batch) == {number: tokens for number, tokens in expected.items() if number != 3}
    assert batch.num_tokens == sound.num_tokens


def test_a_vocabulary_without_room_for_the_codes_is_refused():
    settings = {"model.recipe": "dense", "data.image": CONFIG.model_dump()}
    with pytest.raises(UserError, match=r"^model\.vocab_size=309: .* need 310; raise it"):
        load_tokenizer(tiny_config({**settings, "model.vocab_size": 309}))
    assert load_tokenizer(tiny_config({**settings, "model.vocab_size": 310})).vocab_size == FIRST_CODE


def test_codes_are_learned_as_text_is(tmp_path):
    loader = make_loader(write_shard(tmp_path / "a.tar", SAMPLES), **{"optimizer.learning_rate": 1e-2})
    model = build_model(loader.config)
    assert model.image is None
    optimizer = build_optimizer(dict(model.named_parameters()), embedding_names(model), loader.config.optimizer)
    batch = first_batch(loader)
    counts = global_counts([batch])
    losses = [train_step(model, optimizer, [batch], counts, {"text": 1.0, "image": 5.0}, 1.0, 1, torch.device("cpu")).loss for _ in range(15)]
    assert losses[-1] < 0.8 * losses[0]


def test_peek_spells_codes_out(tmp_path):
    loader = make_loader(write_shard(tmp_path / "a.tar", SAMPLES))
    sequences = [s for s in loader.plan.step(0) if any(d.sample == 0 for d in s.documents)]
    peek(sequences, loader.plan, loader.config, loader.tokenizer, tmp_path / "out")
    rows = json.loads((tmp_path / "out" / "sources.json").read_text())
    files = next(row["files"] for row in rows if row["sample"] == 0)
    one, two = (" ".join(map(str, array.ravel())) for array in (codes(0, 2, 3), codes(100, 2, 2)))
    assert "".join((tmp_path / "out" / file).read_text() for file in files) == f"picture 0[{one}]and[{two}]"
