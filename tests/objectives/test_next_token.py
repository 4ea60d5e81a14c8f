"""The language-model loss: rows without a label cost nothing, and splitting changes nothing."""

from __future__ import annotations

import math

import pytest
import torch

from fusiontrain.objectives.next_token import NextToken
from fusiontrain.types import IGNORE_INDEX


def case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([3, IGNORE_INDEX, 0, 10, IGNORE_INDEX])
    return torch.randn(5, 4, generator=generator), torch.randn(11, 4, generator=generator), labels, torch.rand(5, generator=generator)


def test_sum_over_labelled_rows_and_their_count() -> None:
    hidden, weight, labels, loss_weights = case()
    term = NextToken()(hidden, weight, labels, loss_weights, 3)
    expected = 0.0
    for row in (0, 2, 3):
        probabilities = (hidden[row].double() @ weight.double().T).softmax(-1)
        expected -= float(loss_weights[row]) * float(probabilities[labels[row]].log())
    torch.testing.assert_close(term.sum, torch.tensor(expected), rtol=1e-5, atol=0)
    assert term.sum.dtype == torch.float32
    assert term.count.dtype == torch.int64 and int(term.count) == 3


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_z_loss_is_the_squared_log_of_the_denominator_in_training_alone(impl: str) -> None:
    """A loop in float64, and its gradient by differences."""
    hidden, weight, labels, loss_weights = (tensor.double() if tensor.is_floating_point() else tensor for tensor in case())
    objective = NextToken(impl, z_loss=0.3)

    def by_loop(hidden: torch.Tensor, z_loss: float) -> float:
        total = 0.0
        for row in (0, 2, 3):
            scores = [float(hidden[row] @ weight[word]) for word in range(len(weight))]
            log_denominator = math.log(sum(math.exp(score) for score in scores))
            total += float(loss_weights[row]) * (log_denominator - scores[labels[row]] + z_loss * log_denominator**2)
        return total

    hidden.requires_grad_()
    term = objective(hidden, weight, labels, loss_weights, 3)
    (grad,) = torch.autograd.grad(term.sum, hidden)
    hidden = hidden.detach()
    assert term.sum.item() == pytest.approx(by_loop(hidden, 0.3), rel=1e-9)
    for place in ((0, 1), (3, 2)):
        change = torch.zeros_like(hidden)
        change[place] = 1e-5
        slope = (by_loop(hidden + change, 0.3) - by_loop(hidden - change, 0.3)) / 2e-5
        assert float(grad[place]) == pytest.approx(slope, rel=1e-6)
    assert float(objective.eval()(hidden, weight, labels, loss_weights, 3).sum) == pytest.approx(by_loop(hidden, 0.0), rel=1e-9)


def test_rows_without_a_label_have_no_influence() -> None:
    hidden, weight, labels, loss_weights = case()
    hidden[1], loss_weights[1] = float("nan"), float("nan")
    hidden.requires_grad_()
    term = NextToken()(hidden, weight, labels, loss_weights, 3)
    assert term.sum.isfinite()
    (grad,) = torch.autograd.grad(term.sum, hidden)
    assert not grad[[1, 4]].any() and grad[[0, 2, 3]].any(dim=1).all()


def test_splitting_changes_nothing() -> None:
    arguments = case()
    hidden, weight, labels, loss_weights = arguments
    whole = NextToken()(*arguments, 3)
    parts = [NextToken()(hidden[rows], weight, labels[rows], loss_weights[rows], count) for rows, count in ((slice(0, 2), 1), (slice(2, 5), 2))]
    torch.testing.assert_close(parts[0].sum + parts[1].sum, whole.sum)
    assert parts[0].count + parts[1].count == whole.count


def test_no_labels_at_all() -> None:
    hidden, weight, labels, loss_weights = case()
    hidden.requires_grad_(), weight.requires_grad_()
    term = NextToken()(hidden, weight, torch.full_like(labels, IGNORE_INDEX), loss_weights, 0)
    term.sum.backward()
    assert term.sum == 0 and term.count == 0
    assert hidden.grad is not None and not hidden.grad.any()
    assert weight.grad is not None and not weight.grad.any()
