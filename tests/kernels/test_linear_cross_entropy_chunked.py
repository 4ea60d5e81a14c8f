"""The chunked head and loss, in torch and with Triton's softmax, against the formula in float64."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from fusiontrain.testing.kernels import guarded_outputs
from fusiontrain_kernels.linear_cross_entropy import chunked, linear_cross_entropy

HAS_TRITON = importlib.util.find_spec("triton") is not None
IMPLS = ["chunked", pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="needs triton"))]
DIM, VOCAB = 12, 37


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """8 rows, and for Triton 16 of the 37 logits, at a time."""
    monkeypatch.setattr(chunked, "ROWS", {"chunked": 8, "triton": 8})
    if HAS_TRITON:
        monkeypatch.setattr("fusiontrain_kernels.linear_cross_entropy.triton_kernels.BLOCK", 16)


def case(count: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """A third of the rows has no label; some have the first or the last of the vocabulary."""
    generator = torch.Generator().manual_seed(count)
    hidden, weight = (torch.randn(n, DIM, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for n in (count, VOCAB))
    labels = torch.randint(VOCAB, (count,), generator=generator)
    labels[::3] = -100
    labels[1::5] = torch.tensor([0, VOCAB - 1]).repeat(count)[: len(labels[1::5])]
    return hidden, weight, labels, torch.rand(count, generator=generator)


def formula(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, loss_weights: torch.Tensor, z_loss: float) -> torch.Tensor:
    """Row by row, rows without a label left out."""
    total = hidden.double().sum() * 0 + weight.double().sum() * 0
    for row in (labels >= 0).nonzero()[:, 0].tolist():
        logits = weight.double() @ hidden[row].double()
        lse = logits.exp().sum().log()
        total = total + loss_weights[row].double() * (lse - logits[labels[row]] + z_loss * lse**2)
    return total


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("count", [0, 1, 8, 21])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_equals_the_formula(impl: str, count: int, dtype: torch.dtype, tolerance: float, z_loss: float) -> None:
    hidden, weight, labels, loss_weights = case(count, dtype)
    with guarded_outputs():
        loss = linear_cross_entropy(hidden, weight, labels, loss_weights, z_loss=z_loss, impl=impl)
        actual = torch.autograd.grad(0.5 * loss, (hidden, weight))
    wanted_loss = formula(hidden, weight, labels, loss_weights, z_loss)
    wanted = torch.autograd.grad(0.5 * wanted_loss, (hidden, weight))
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for a, b in zip((loss, *actual), (wanted_loss, *wanted), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
def test_rows_without_a_label_count_for_nothing(impl: str) -> None:
    hidden, weight, labels, loss_weights = case(21)
    rows = labels >= 0
    kept = (hidden.detach()[rows], weight, labels[rows], loss_weights[rows])
    loss = linear_cross_entropy(hidden, weight, labels, loss_weights, impl=impl)
    torch.testing.assert_close(loss, linear_cross_entropy(*kept, impl="reference"), rtol=1e-12, atol=0)
    (grad,) = torch.autograd.grad(loss, hidden)
    assert not grad[~rows].any() and bool(grad[rows].any(-1).all())


@pytest.mark.parametrize("impl", IMPLS)
def test_a_frozen_head_gets_no_gradient(impl: str) -> None:
    hidden, weight, labels, loss_weights = case(21)
    linear_cross_entropy(hidden, weight.detach(), labels, loss_weights, impl=impl).backward()
    assert hidden.grad is not None and weight.grad is None
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, labels, loss_weights, impl=impl).requires_grad


@pytest.mark.parametrize("impl", IMPLS)
def test_large_logits_stay_finite(impl: str) -> None:
    hidden, weight, labels, loss_weights = case(21, torch.float32)
    loss = linear_cross_entropy(hidden * 1e4, weight, labels, loss_weights, impl=impl)
    loss.backward()
    assert loss.isfinite() and weight.grad.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_labels_and_their_weights_may_be_views(impl: str) -> None:
    hidden, weight, labels, _ = case(21)
    apart, one = torch.stack([labels, labels + 5], 1)[:, 0], torch.tensor(0.5).expand(21)
    loss = linear_cross_entropy(hidden, weight, apart, one, impl=impl)
    torch.testing.assert_close(loss, formula(hidden, weight, labels, one.contiguous(), 0.0), rtol=1e-12, atol=0)


def test_a_label_beyond_the_vocabulary_is_never_a_number() -> None:
    hidden, weight, labels, loss_weights = case(21)
    labels[4] = VOCAB
    with pytest.raises((IndexError, RuntimeError)):
        linear_cross_entropy(hidden, weight, labels, loss_weights, impl="chunked")
    if HAS_TRITON:
        assert linear_cross_entropy(hidden, weight, labels, loss_weights, impl="triton").isnan()


@pytest.mark.parametrize("impl", IMPLS)
def test_the_operator_keeps_its_contract(impl: str) -> None:
    hidden, weight, labels, loss_weights = case(9)
    torch.library.opcheck(chunked.linear_cross_entropy, (hidden, weight, labels, loss_weights, 0.1, True, True, impl))
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, labels, loss_weights, impl=impl), (hidden, weight), fast_mode=True)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(hidden, weight, labels, loss_weights, impl=impl), linear_cross_entropy(hidden, weight, labels, loss_weights, impl=impl))


def test_no_more_than_a_chunk_of_logits_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = chunked._softmax_torch
    monkeypatch.setattr(chunked, "_softmax_torch", lambda logits, *rest: (seen.append(tuple(logits.shape)), original(logits, *rest)))
    linear_cross_entropy(*case(21), impl="chunked")
    assert seen == [(8, VOCAB), (8, VOCAB), (5, VOCAB)]


def test_the_gradient_of_the_head_is_summed_in_float32() -> None:
    """400 equal chunks of bfloat16. Their sum is exact in float32 and rounded once; a bfloat16 sum loses a bit at every doubling and stops
    growing at 256 of them."""
    hidden, weight, _, _ = case(8, torch.bfloat16)
    labels, loss_weights = torch.full((8,), 3), torch.ones(8)
    (one,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels, loss_weights, impl="chunked"), weight)
    many = (hidden.detach().repeat(400, 1), weight, labels.repeat(400), loss_weights.repeat(400))
    (actual,) = torch.autograd.grad(linear_cross_entropy(*many, impl="chunked"), weight)
    torch.testing.assert_close(actual, (400 * one.double()).to(torch.bfloat16), rtol=0, atol=0)
    (exact,) = torch.autograd.grad(formula(hidden, weight, labels, loss_weights, 0.0), weight)
    error = (actual.double() - 400 * exact.double()).abs()
    assert float(error.max()) <= 2**-7 * 400 * float(exact.double().abs().max())


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(3, 2, 4)}, r"hidden: must be \[n, D\], not \[3, 2, 4\]"),
        ({"weight": torch.zeros(0, 4)}, "weight: must be .* V > 0"),
        ({"weight": torch.zeros(7, 5)}, r"weight: must be torch.float32 \[7, 4\]"),
        ({"weight": torch.zeros(7, 4).double()}, "weight: must be torch.float32"),
        ({"labels": torch.zeros(3, dtype=torch.int32)}, "labels: must be torch.int64"),
        ({"labels": torch.zeros(4, dtype=torch.int64)}, r"labels: must be torch.int64 \[3\]"),
        ({"loss_weights": torch.zeros(1)}, r"loss_weights: must be torch.float32 \[3\]"),
    ],
    ids=["hidden", "vocabulary", "width", "dtype", "labels", "number", "loss_weights"],
)
def test_what_does_not_fit_is_refused(impl: str, change: dict[str, torch.Tensor], message: str) -> None:
    tensors = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(7, 4), "labels": torch.zeros(3, dtype=torch.int64), "loss_weights": torch.ones(3)}
    with pytest.raises(ValueError, match=f"linear_cross_entropy: {message}"):
        linear_cross_entropy(**{**tensors, **change}, impl=impl)


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
def test_loss_weights_get_no_gradient(impl: str) -> None:
    hidden, weight, labels, loss_weights = case(9)
    linear_cross_entropy(hidden, weight, labels, loss_weights.requires_grad_(), impl=impl).backward()
    assert loss_weights.grad is None


@pytest.mark.parametrize("impl", IMPLS)
def test_a_second_derivative_is_refused_and_not_dropped(impl: str) -> None:
    hidden, weight, labels, loss_weights = case(5)
    loss = linear_cross_entropy(hidden, weight, labels, loss_weights, impl=impl)
    with pytest.raises(RuntimeError, match="no second derivative: choose impl='reference'"):
        torch.autograd.grad(loss, hidden, create_graph=True)
