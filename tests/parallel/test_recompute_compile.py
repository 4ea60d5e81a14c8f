"""Activation checkpointing and torch.compile change no number, and cost what they say, together with a frozen prefix and without."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch.fx.experimental import _config as symbolic_shapes
from torch.utils.flop_counter import FlopCounterMode

from fusiontrain.config.schema import Config
from fusiontrain.models.build import build_model
from fusiontrain.models.fusion import FusionModel
from fusiontrain.parallel.activation import recompute_activations
from fusiontrain.parallel.apply import parallelize
from fusiontrain.parallel.compile import compile_units
from fusiontrain.testing.documents import batch_of, document
from fusiontrain.testing.training import BOI, EOI, lmfusion_config, write_base
from fusiontrain.types import Batch, Document

IMAGE = ("image", 2, 3)


def captioned(count: int) -> Document:
    return document([256, *range(count), BOI], IMAGE, [EOI, 257], seed=count)


MIXES = {
    "one caption": [captioned(3)],
    "two captions": [captioned(9), captioned(4)],
    "text alone": [document([256, 1, 2, 257])],
    "image first": [document([BOI], IMAGE, [EOI, 5, 6]), captioned(2)],
    "three captions": [captioned(1), captioned(2), captioned(3)],
    "text without padding": [document([256, *range(95)])],
    "no prefix": [document(IMAGE, list(range(90)))],
    "a prefix of one row": [document([1], ("image", 5, 19))],
    "images without padding": [document(("image", 8, 12))],
    "a long caption": [captioned(30)],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return write_base(tmp_path_factory.mktemp("base"))


def woken(config: Config) -> FusionModel:
    model, generator = build_model(config).double(), torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def numbers(model: FusionModel, batch: Batch, name: str = "text") -> tuple[dict[str, float], dict[str, torch.Tensor | None]]:
    model.zero_grad()
    terms = model(batch)
    (sum(term.sum for term in terms.values()) if name == "all" else terms[name].sum).backward()
    return {key: term.sum.item() for key, term in terms.items()}, {key: parameter.grad for key, parameter in model.named_parameters()}


def assert_same(got: Any, wanted: Any, tolerance: float = 1e-11) -> None:
    assert got[0] == pytest.approx(wanted[0], rel=1e-6)
    torch.testing.assert_close(got[1], wanted[1], rtol=tolerance, atol=tolerance)


def flops(model: FusionModel, batch: Batch) -> tuple[int, int]:
    """Of forward and of backward, all operators that torch's counter knows."""
    counts = []
    counter = FlopCounterMode(display=False)
    with counter:
        loss = sum(term.sum for term in model(batch).values())
    counts.append(counter.get_total_flops())
    with counter:
        loss.backward()
    return counts[0], counter.get_total_flops()


# ---------------------------------------------------------------- recomputation


@pytest.mark.parametrize("frozen_prefix", [True, False])
@pytest.mark.parametrize(("mode", "every"), [("full", 1), ("full", 2), ("selective", 1), ("selective", 2)])
@pytest.mark.parametrize("mix", ["image first", "text alone"])
def test_recomputation_changes_no_gradient(mix, mode, every, frozen_prefix, base):
    config = lmfusion_config(base, {"parallel.frozen_prefix": frozen_prefix})
    batch, plain, recomputing = batch_of(MIXES[mix], config), woken(config), woken(config)
    recompute_activations(recomputing, recomputing.plan().recompute, mode, every)
    assert_same(numbers(recomputing, batch), numbers(plain, batch))
    assert [name for name, _ in recomputing.named_parameters()] == [name for name, _ in plain.named_parameters()]


def test_full_computes_live_rows_twice_and_selective_no_product(base):
    """Of the prefix nothing is computed again, and of every second block only its own."""
    config = lmfusion_config(base)
    batch = batch_of(MIXES["image first"], config)

    def backward_flops(mode: str, every: int = 1) -> int:
        model = woken(config)
        recompute_activations(model, model.plan().recompute, mode, every)
        return flops(model, batch)[1]

    plain, full, half = backward_flops("none"), backward_flops("full"), backward_flops("full", 2)
    assert backward_flops("selective") == plain
    per_row = sum(2 * p.numel() for name, p in build_model(config).named_parameters() if name.startswith("blocks.") and ".text." in name and p.ndim == 2)
    assert full - plain == (batch.num_tokens - batch.num_prefix_rows) * per_row, "torch's counter knows no products of attention"
    assert half - plain == (full - plain) // 2


# ---------------------------------------------------------------- compiled


@pytest.fixture
def fresh_compiler():
    with symbolic_shapes.patch(backed_size_oblivious=False, use_duck_shape=True):
        torch.compiler.reset()
        counters.clear()
        yield
    torch.compiler.reset()


@pytest.mark.parametrize("mode", ["none", "full", "selective"])
def test_one_compilation_takes_every_mix(mode, base, fresh_compiler):
    """Of both blocks together, and for any split of the same number of rows between prefix, text and images, none of some included."""
    config = lmfusion_config(base)
    plain, compiled = woken(config), woken(config)
    recompute_activations(compiled, compiled.plan().recompute, mode, 1)
    compile_units(compiled, compiled.plan().shard_units, any_number_of_rows=True, backend="aot_eager")
    graphs = []
    for mix in MIXES.values():
        batch = batch_of(mix, config)
        assert_same(numbers(compiled, batch, "all"), numbers(plain, batch, "all"), 2e-6)
        graphs.append(counters["stats"]["unique_graphs"])
    assert not counters["graph_break"]
    assert [later - sooner for sooner, later in itertools.pairwise([0, *graphs])] == [1] + [0] * (len(MIXES) - 1)


@pytest.mark.slow
def test_parallelize_combines_them_in_order(base, fresh_compiler):
    """The configuration's way to all three at once, with torch's own compiler."""
    settings = {"parallel.activation_checkpointing": "selective", "parallel.activation_checkpointing_every": 2, "parallel.compile": True}
    config = lmfusion_config(base, settings)
    plain, model = woken(config), woken(config)
    parallelize(model, model.plan(), config.parallel, None, torch.device("cpu"))
    for mix in ("two captions", "no prefix"):
        batch = batch_of(MIXES[mix], config)
        assert_same(numbers(model, batch, "all"), numbers(plain, batch, "all"), 2e-6)
