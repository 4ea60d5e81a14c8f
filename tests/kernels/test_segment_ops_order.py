"""Programs of a launch may run in any order on a GPU: the interpreter, which runs them one by one, must give the same bits from last to first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.interpreter import interpreter_builder

from fusiontrain_kernels.linear_cross_entropy import linear_cross_entropy
from fusiontrain_kernels.modality_gemm import modality_gemm, modality_swiglu
from fusiontrain_kernels.qk_norm_rope import qk_norm_rope
from fusiontrain_kernels.rms_norm import add_rms_norm
from fusiontrain_kernels.swiglu import swiglu

BOUNDS = (0, 21, 21, 37)
"""Ragged tiles before a border, which a program must not write across."""


@contextmanager
def from_last_to_first() -> Iterator[None]:
    """Programs see their place counted from the end of the grid."""
    place = interpreter_builder.set_grid_idx

    def mirrored(x: int, y: int, z: int) -> None:
        width, height, depth = interpreter_builder.grid_dim
        place(width - 1 - x, height - 1 - y, depth - 1 - z)

    with mock.patch.object(interpreter_builder, "set_grid_idx", mirrored):
        yield


ROWS, MATRIX = (37, 24), (40, 24)
CALLS: dict[str, tuple[list[tuple[int, ...]], Callable[..., tuple[torch.Tensor, ...]]]] = {
    "gemm": ([ROWS, *[MATRIX] * 3, *[(40,)] * 3], lambda x, *w: (modality_gemm(x, w[:3], BOUNDS, w[3:], impl="triton"),)),
    "gemm swiglu": ([ROWS, *[MATRIX] * 6], lambda x, *w: (modality_swiglu(x, w[:3], w[3:], BOUNDS, impl="triton"),)),
    "norm": ([ROWS, ROWS, *[(24,)] * 3], lambda x, residual, *w: add_rms_norm(x, residual, w, BOUNDS, 1e-5, impl="triton")),
    "heads": (
        [(37, 3, 8), (37, 2, 8), *[(8,)] * 6],
        lambda q, k, *w: qk_norm_rope(q, k, w[:3], w[3:], torch.ones(37, 8), torch.ones(37, 8), BOUNDS, 1e-5, impl="triton"),
    ),
    "swiglu": ([ROWS, ROWS], lambda gate, up: (swiglu(gate, up, impl="triton"),)),
    "loss": ([ROWS, (30, 24)], lambda h, w: (linear_cross_entropy(h, w, torch.arange(37) % 33 - 3, torch.ones(37), impl="triton"),)),
}


@pytest.mark.parametrize("name", list(CALLS))
def test_the_order_of_programs_does_not_matter(name: str) -> None:
    shapes, call = CALLS[name]
    generator = torch.Generator().manual_seed(1)
    leaves = [torch.randn(*shape, generator=generator).requires_grad_() for shape in shapes]

    def run() -> list[torch.Tensor]:
        outs = call(*leaves)
        return [*outs, *torch.autograd.grad(outs, leaves, [torch.full_like(out, 0.3) for out in outs])]

    forwards = run()
    with from_last_to_first():
        backwards = run()
    assert all(torch.equal(a, b) for a, b in zip(forwards, backwards, strict=True))
