"""The head and its loss against the formula written as loops."""

from __future__ import annotations

import math

import pytest
import torch

from fusiontrain_kernels.linear_cross_entropy import linear_cross_entropy


def case(count: int = 6, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(n, 4, generator=generator, dtype=torch.float64).to(dtype) for n in (count, 11))
    return hidden, weight, torch.randint(11, (count,), generator=generator), torch.rand(count, generator=generator)


def by_loops(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, loss_weights: torch.Tensor) -> float:
    total = 0.0
    for row in range(len(hidden)):
        logits = [float(hidden[row] @ token) for token in weight]
        total += float(loss_weights[row]) * (math.log(sum(math.exp(logit) for logit in logits)) - logits[int(labels[row])])
    return total


def test_equals_loops_and_gradients() -> None:
    hidden, weight, labels, loss_weights = case()
    assert math.isclose(float(linear_cross_entropy(hidden, weight, labels, loss_weights)), by_loops(hidden, weight, labels, loss_weights))
    leaves = (hidden.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, labels, loss_weights), leaves)


def test_the_sum_is_float32_even_of_bfloat16() -> None:
    hidden, weight, labels, loss_weights = case(dtype=torch.bfloat16)
    loss = linear_cross_entropy(hidden, weight, labels, loss_weights)
    assert loss.dtype == torch.float32 and loss.shape == ()
    logits = (hidden @ weight.T).float()  # the model's dtype, then float32 from there on
    expected = (-logits.log_softmax(-1)[torch.arange(6), labels] * loss_weights).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


def test_large_logits_stay_finite() -> None:
    hidden, weight, labels, loss_weights = case(dtype=torch.float32)
    assert linear_cross_entropy(hidden * 1e4, weight, labels, loss_weights).isfinite()


def test_no_rows_give_zero_and_zero_gradients() -> None:
    hidden, weight, labels, loss_weights = case(count=0, dtype=torch.float32)
    hidden.requires_grad_(), weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels, loss_weights)
    loss.backward()
    assert loss == 0 and weight.grad is not None and not weight.grad.any()


def test_unknown_impl_names_the_choices() -> None:
    with pytest.raises(ValueError, match=r"impl='fast': choose one of auto, reference"):
        linear_cross_entropy(*case(), impl="fast")
