"""Text that no image comes before runs forward only: which rows that is, that nothing comes out differently, and that it costs no backward."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusiontrain.config.schema import Config
from fusiontrain.config.validate import has_frozen_prefix
from fusiontrain.data.collate import collate
from fusiontrain.data.ranges import dense_mask
from fusiontrain.models.build import build_model
from fusiontrain.models.fusion import FusionModel
from fusiontrain.testing.batches import random_documents
from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.documents import batch_of, document
from fusiontrain.testing.training import BOI, EOI, lmfusion_config, write_base
from fusiontrain.types import Batch, PackedSequence

IMAGE = ("image", 2, 3)
CAPTION = [document([256, 72, 101, 108, BOI], IMAGE, [EOI, 257], seed=1), document([256, 5, BOI], IMAGE, [EOI, 257], seed=2)]
IMAGE_FIRST = [document([BOI], IMAGE, [EOI, 33, 34, 35, 257], seed=3), document(IMAGE, [EOI, 8, 9, 257], seed=4)]
INTERLEAVED = [document([256, 7, 8, BOI], IMAGE, [EOI, 5, 6, BOI], ("image", 1, 2), [EOI, 7, 257], seed=5)]
TEXT = [document([256, 9, 8, 7, 257], seed=6), document([256, 1, 2, 257], seed=7)]
LAYOUTS = {
    "everything": [*CAPTION, *TEXT, *IMAGE_FIRST, *INTERLEAVED],
    "captions": CAPTION,
    "nothing is frozen but padding": IMAGE_FIRST,
    "all is frozen": TEXT,
    "images alone": [document(IMAGE, seed=8)],
    "nothing": [],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return write_base(tmp_path_factory.mktemp("base"))


def config_of(base: str, frozen_prefix: bool = True, **others: Any) -> Config:
    return lmfusion_config(base, {"parallel.frozen_prefix": frozen_prefix, **others})


def woken(config: Config, dtype: torch.dtype = torch.float64) -> FusionModel:
    """Every trainable weight has a value of its own, so that copies and zeros hide nothing."""
    model, generator = build_model(config).to(dtype), torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


# ---------------------------------------------------------------- which rows


def check_slices(batch: Batch, expected_sources: int) -> None:
    """The prefix holds the rows that are no image and see none, by the dense rule."""
    doc_ids, order_ids, segment_ids = batch.doc_ids.numpy(), batch.order_ids.numpy(), batch.segment_ids.numpy()
    is_image = np.arange(batch.num_tokens) >= batch.modality_bounds[1]
    sees_image = dense_mask(doc_ids, order_ids, segment_ids)[:, is_image].any(1)
    first, prefix_end, text_end, last = batch.slice_bounds
    assert (first, text_end, last) == batch.modality_bounds and prefix_end == batch.num_prefix_rows
    assert batch.slice_offsets.tolist() == list(batch.slice_bounds)
    assert np.array_equal(np.flatnonzero(~is_image & ~sees_image), np.arange(prefix_end))
    assert batch.num_prefix_labels == int((batch.labels[:prefix_end] >= 0).sum())
    assert not batch.key_ranges[:prefix_end, 1:].diff(dim=-1).any(), "prefix rows see no other slice"
    assert len(batch.sources) == expected_sources


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 7), st.booleans())
def test_the_prefix_is_what_sees_no_image(seed, count, document_mask):
    data = tiny_config({"data.document_mask": document_mask, "data.sequence_length": 48}).data
    documents = random_documents(seed, count)
    half = len(documents) // 2
    sequences = [PackedSequence(tuple(part), 200, seed + i) for i, part in enumerate((documents[:half], documents[half:]))]
    check_slices(collate(sequences, data, frozen_prefix=True), count)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_rows_are_those_of_the_plain_batch_in_another_order(layout, base):
    apart, plain = batch_of(layout, config_of(base)), batch_of(layout, config_of(base, frozen_prefix=False))
    check_slices(apart, len(layout))
    assert plain.num_prefix_rows == plain.num_prefix_labels == 0 and plain.slice_bounds == plain.modality_bounds == apart.modality_bounds
    assert (apart.target_counts, apart.token_counts, apart.sources) == (plain.target_counts, plain.token_counts, plain.sources)
    columns = ("doc_ids", "order_ids", "token_ids", "labels", "segment_ids", "position_ids")
    rows = [sorted(zip(*(getattr(batch, name).tolist() for name in columns), strict=True)) for batch in (apart, plain)]
    assert rows[0] == rows[1]
    for name in ("values", "image_ids", "timesteps", "noise_keys", "is_target"):
        assert torch.equal(getattr(apart.payloads["image"], name), getattr(plain.payloads["image"], name)), name


def test_only_frozen_text_beside_images_is_told_apart(base):
    assert has_frozen_prefix(config_of(base))
    assert not has_frozen_prefix(config_of(base, frozen_prefix=False))
    assert not has_frozen_prefix(config_of(base, **{"model.freeze_text": False}))
    assert not has_frozen_prefix(config_of(base, **{"data.modalities": ["text"]}))
    assert not has_frozen_prefix(tiny_config())


# ---------------------------------------------------------------- the same numbers


def losses_and_gradients(model: FusionModel, batch: Batch, name: str) -> tuple[dict[str, float], dict[str, torch.Tensor | None]]:
    model.zero_grad()
    terms = model(batch)
    terms[name].sum.backward()
    return {key: (term.sum.item(), term.count.item()) for key, term in terms.items()}, {key: p.grad for key, p in model.named_parameters()}


@pytest.mark.parametrize("separation", ["deep", "shallow", "dense"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_losses_and_gradients_equal_those_of_the_plain_path(layout, separation, base):
    model = woken(config_of(base, **{"model.separation": separation}))
    # Image losses are float32 whatever the model's dtype.
    for name, tolerance in (("text", 1e-11), ("image", 2e-6)):
        got, gradients = losses_and_gradients(model, batch_of(layout, config_of(base)), name)
        wanted, plain_gradients = losses_and_gradients(model, batch_of(layout, config_of(base, frozen_prefix=False)), name)
        for objective, (total, count) in wanted.items():
            assert got[objective] == (pytest.approx(total, rel=1e-12 if objective == "text" else 1e-6), count)
        for key, gradient in plain_gradients.items():
            assert (gradients[key] is None) == (gradient is None), key
            if gradient is not None:
                torch.testing.assert_close(gradients[key], gradient, rtol=tolerance, atol=tolerance, msg=lambda text, at=f"{name}, {key}": f"{at}: {text}")


def test_documents_that_see_each_other_share_one_prefix(base):
    config = {"data.document_mask": False}
    model = woken(config_of(base, **config))
    batches = [batch_of(LAYOUTS["everything"], config_of(base, frozen, **config)) for frozen in (True, False)]
    assert 0 < batches[0].num_prefix_rows < batches[0].modality_bounds[1]
    (got, gradients), (wanted, plain) = (losses_and_gradients(model, batch, "text") for batch in batches)
    assert got["text"][0] == pytest.approx(wanted["text"][0], rel=1e-12)
    torch.testing.assert_close(gradients, plain, rtol=1e-11, atol=1e-11)


def test_text_that_trains_has_its_gradients_wherever_it_lies(base):
    """A batch whose prefix is apart, given to a model whose text trains: it must not take the prefix for frozen."""
    model = woken(config_of(base, **{"model.freeze_text": False}))
    batches = [batch_of(LAYOUTS["everything"], config_of(base, frozen)) for frozen in (True, False)]
    assert batches[0].num_prefix_rows > 0 == model.num_forward_only(batches[0])
    (got, gradients), (wanted, plain) = (losses_and_gradients(model, batch, "text") for batch in batches)
    assert got["text"][0] == pytest.approx(wanted["text"][0], rel=1e-12)
    torch.testing.assert_close(gradients, plain, rtol=1e-10, atol=1e-11)


# ---------------------------------------------------------------- no backward


def saved_numbers(model: FusionModel, batch: Batch) -> int:
    """How many numbers autograd keeps for the backward of a forward, every memory counted once and weights left out."""
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.setdefault(tensor.data_ptr(), tensor), lambda tensor: tensor):
        model(batch)
    return sum(tensor.numel() for pointer, tensor in kept.items() if pointer not in weights and tensor.is_floating_point())


@pytest.mark.parametrize("layout", ["all is frozen", "captions", "everything"])
def test_prefix_rows_keep_keys_and_values_alone(layout, base):
    """And, behind live rows, a blank query and its blank answer each, which the operator asks for. More padding is more rows of the prefix."""
    model = woken(config_of(base), torch.float32)
    kept = {}
    for frozen_prefix in (True, False):
        configs = (config_of(base, frozen_prefix, **{"data.sequence_length": length}) for length in (96, 196))
        few, many = (saved_numbers(model, batch_of(LAYOUTS[layout], config)) for config in configs)
        kept[frozen_prefix] = (many - few) / 100
    shape = model.shape
    of_row = shape.num_layers * (2 * (shape.num_heads + shape.num_kv_heads) * shape.head_dim + shape.num_heads)  # the last is the log of a sum
    assert kept[True] <= of_row < kept[False] / 3


def rows_with_gradient(model: FusionModel, batch: Batch) -> list[tuple[int, ...]]:
    """Shapes of the gradients that reach what each block's feed-forward puts out."""
    shapes: list[tuple[int, ...]] = []

    def watch(_module: Any, _args: Any, out: torch.Tensor) -> None:
        if out.requires_grad:
            out.register_hook(lambda gradient: shapes.append(tuple(gradient.shape)))

    for block in model.blocks:
        block.feed_forward.register_forward_hook(watch)
    sum(term.sum for term in model(batch).values()).backward()
    return shapes


def test_no_gradient_reaches_a_row_of_the_prefix(base):
    config = config_of(base)
    batch = batch_of(LAYOUTS["everything"], config)
    live = batch.num_tokens - batch.num_prefix_rows
    assert rows_with_gradient(woken(config), batch) == [(live, 32)] * 2
    assert rows_with_gradient(woken(config), batch_of(TEXT, config)) == [(0, 32)] * 2
