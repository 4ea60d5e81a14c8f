"""With the borders given as a tensor, no operator asks the device for a number, copies one there, or takes a shape from data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from fusiontrain_kernels.linear_cross_entropy import linear_cross_entropy
from fusiontrain_kernels.modality_gemm import modality_gemm, modality_swiglu
from fusiontrain_kernels.rms_norm import add_rms_norm

OFFSETS = torch.tensor([0, 5, 5, 16], dtype=torch.int32)
BOUNDS = (0, 5, 5, 16)
WAITS = {"_local_scalar_dense", "lift_fresh", "nonzero", "masked_select", "is_nonzero", "equal", "unique_consecutive", "_unique2"}


class NoWaiting(TorchDispatchMode):
    """AssertionError at an operator for which the host waits on a GPU. lift_fresh is `torch.tensor(numbers)`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in WAITS, func
        return func(*args, **(kwargs or {}))


def leaves(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(*shape, generator=generator).requires_grad_() for shape in shapes]


X, MATRIX, GAIN = (16, 8), (12, 8), (8,)
CALLS: dict[str, tuple[tuple[tuple[int, ...], ...], Callable[..., torch.Tensor]]] = {
    "gemm": ((X, *[MATRIX] * 3), lambda x, *w: modality_gemm(x, w, BOUNDS, offsets=OFFSETS, impl="triton")),
    "gemm without offsets": ((X, *[MATRIX] * 3), lambda x, *w: modality_gemm(x, w, BOUNDS, impl="triton")),
    "grouped_mm": ((X, *[MATRIX] * 3), lambda x, *w: modality_gemm(x, w, BOUNDS, offsets=OFFSETS, impl="grouped_mm")),
    "bias": ((X, *[MATRIX] * 3, *[(12,)] * 3), lambda x, *w: modality_gemm(x, w[:3], BOUNDS, w[3:], offsets=OFFSETS, impl="triton")),
    "swiglu": ((X, *[MATRIX] * 6), lambda x, *w: modality_swiglu(x, w[:3], w[3:], BOUNDS, offsets=OFFSETS, impl="triton")),
    "norm": ((X, X, *[GAIN] * 3), lambda x, r, *w: sum(add_rms_norm(x, r, w, BOUNDS, 1e-5, offsets=OFFSETS, impl="triton"))),
    "loss": ((X, (30, 8)), lambda h, w: linear_cross_entropy(h, w, torch.arange(16) - 4, torch.ones(16), z_loss=0.1, impl="triton")),
    "loss in torch": ((X, (30, 8)), lambda h, w: linear_cross_entropy(h, w, torch.arange(16) - 4, torch.ones(16), z_loss=0.1, impl="chunked")),
}


@pytest.mark.parametrize("name", list(CALLS))
def test_the_host_never_waits(name: str) -> None:
    shapes, call = CALLS[name]
    tensors = leaves(*shapes)
    refuse = mock.Mock(side_effect=AssertionError("the host read a tensor"))
    reads = mock.patch.multiple(torch.Tensor, item=refuse, tolist=refuse, __bool__=refuse, __int__=refuse)
    with reads, mock.patch.object(torch, "tensor", refuse), NoWaiting():
        out = call(*tensors)
        torch.autograd.grad(out, tensors, torch.ones_like(out))


def test_the_watch_sees_a_read() -> None:
    with NoWaiting(), pytest.raises(AssertionError):
        OFFSETS[1].item()
    with NoWaiting(), pytest.raises(AssertionError):
        torch.tensor(BOUNDS)
