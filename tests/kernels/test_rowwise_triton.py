"""RMS norm, SwiGLU and RoPE in Triton against their formulas in float64, forward and backward."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import accumulate

import pytest
import torch

pytest.importorskip("triton")

from fusiontrain.testing.kernels import guarded_outputs
from fusiontrain_kernels._launch import interpreting
from fusiontrain_kernels.choices import obstacle
from fusiontrain_kernels.qk_norm_rope import qk_norm_rope
from fusiontrain_kernels.rms_norm import add_rms_norm, rms_norm
from fusiontrain_kernels.rms_norm import triton_ops as norm_ops
from fusiontrain_kernels.rope import rope
from fusiontrain_kernels.swiglu import swiglu
from fusiontrain_kernels.swiglu import triton_ops as swiglu_ops

LAYOUTS = [(50,), (1,), (13, 0, 37), (0, 33), (33, 0), (1, 40), (16, 32), (0, 0)]
"""Rows of each modality. A block of the norm's backward has 16."""
EPS = 1e-5


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_same(actual: torch.Tensor | None, expected: torch.Tensor | None, tolerance: float) -> None:
    assert (actual is None) == (expected is None)
    if actual is None or not actual.numel():
        return
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.isfinite().all()
    assert float((actual - expected).abs().max()) <= tolerance * max(1.0, float(expected.abs().max()))


def check(function: Callable, formula: Callable, leaves: list[torch.Tensor], tolerance: float) -> None:
    """Both give a tuple of outputs; `formula` is handed float64. Outputs and gradients of all leaves agree."""
    with guarded_outputs():
        outs = function(*leaves)
        grads = [normal(*out.shape, seed=90 + i, dtype=out.dtype) for i, out in enumerate(outs)]
        actual = torch.autograd.grad(outs, [leaf for leaf in leaves if leaf.requires_grad], grads)
    wanted_outs = formula(*(leaf.double() for leaf in leaves))
    wanted = torch.autograd.grad(wanted_outs, [leaf for leaf in leaves if leaf.requires_grad], [grad.double() for grad in grads])
    for a, b in zip([*outs, *actual], [*wanted_outs, *wanted], strict=True):
        assert_same(a, b, tolerance)


def norm_case(counts: tuple[int, ...], dim: int, dtype: torch.dtype, residual: bool, frozen: bool) -> tuple[Callable, Callable, list[torch.Tensor]]:
    bounds, num_rows = (0, *accumulate(counts)), sum(counts)
    owners = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    rows = [normal(num_rows, dim, seed=seed, dtype=dtype).requires_grad_() for seed in ([1, 2] if residual else [1])]
    gains = [normal(dim, seed=10 + m, dtype=dtype).requires_grad_(m > 0 or not frozen) for m in range(len(counts))]

    def function(*leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if residual:
            return add_rms_norm(leaves[0], leaves[1], leaves[2:], bounds, EPS, impl="triton")
        return (rms_norm(leaves[0], leaves[1:], bounds, EPS, impl="triton"),)

    def formula(*leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        summed = leaves[0] + leaves[1] if residual else leaves[0]
        gain = torch.stack(leaves[len(rows) :])[owners]
        out = gain * summed / (summed.square().mean(-1, keepdim=True) + EPS).sqrt()
        return (out, summed) if residual else (out,)

    return function, formula, [*rows, *gains]


@pytest.mark.parametrize("counts", LAYOUTS, ids=str)
@pytest.mark.parametrize("residual", [False, True])
def test_rms_norm_in_float64(counts: tuple[int, ...], residual: bool) -> None:
    check(*norm_case(counts, (24, 32, 7)[sum(counts) % 3], torch.float64, residual, frozen=len(counts) > 1), 1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
@pytest.mark.parametrize("residual", [False, True])
def test_rms_norm_in_lower_precision(dtype: torch.dtype, tolerance: float, residual: bool) -> None:
    check(*norm_case((13, 0, 37), 24, dtype, residual, frozen=False), tolerance)


def test_a_norm_whose_weights_are_all_frozen_makes_no_partial_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm_ops.triton_kernels, "add_partials", None)
    x, gain = normal(20, 8, seed=1).requires_grad_(), normal(8, seed=2)
    rms_norm(x, [gain, gain], (0, 5, 20), EPS, impl="triton").sum().backward()
    assert x.grad is not None


def test_the_bits_of_the_reference_in_bfloat16() -> None:
    """Same rounding between norm and weight, and in the activation, as in Hugging Face's Llama."""
    x, gain = normal(33, 24, seed=1, dtype=torch.bfloat16), normal(24, seed=2, dtype=torch.bfloat16)
    same = rms_norm(x, [gain], (0, 33), EPS, impl="triton") == rms_norm(x, [gain], (0, 33), EPS, impl="reference")
    assert same.float().mean() > 0.99
    other = normal(33, 24, seed=3, dtype=torch.bfloat16)
    assert (swiglu(x, other, impl="triton") == swiglu(x, other, impl="reference")).float().mean() > 0.99


def test_the_gradient_of_the_gain_takes_the_rounded_row() -> None:
    """One row, so that nothing is summed: the product of what the forward multiplied, where an unrounded row differs in every second number."""
    x, gain, grad = (normal(*shape, seed=seed, dtype=torch.bfloat16) for seed, shape in ((1, (1, 512)), (2, (512,)), (3, (1, 512))))
    gain.requires_grad_()
    rms_norm(x, [gain], (0, 1), EPS, impl="triton").backward(grad)
    exact = x.double() / (x.double().square().mean() + EPS).sqrt()
    rounded, unrounded = ((grad.double() * row)[0].to(torch.bfloat16) for row in (exact.to(torch.bfloat16).double(), exact))
    assert (gain.grad == rounded).float().mean() > 0.99
    assert (unrounded == rounded).float().mean() < 0.9


def test_tensors_that_a_kernel_would_read_beside_are_refused() -> None:
    x, gain = normal(6, 8, seed=1), normal(8, seed=2)
    with pytest.raises(ValueError, match=r"rms_norm: weights\[1\]: must be torch.float64 \[8\]"):
        rms_norm(x, [gain, gain[:7]], (0, 2, 6), EPS, impl="triton")
    with pytest.raises(ValueError, match="add_rms_norm: residual: must be"):
        add_rms_norm(x, x.float(), [gain], (0, 6), EPS, impl="triton")
    with pytest.raises(ValueError, match="swiglu: up: must be"):
        swiglu(x, x[:, :7], impl="triton")


@pytest.mark.parametrize(
    ("operator", "call"),
    [
        ("rms_norm", lambda x, impl: rms_norm(x, [x[0]], (0, 5), EPS, impl=impl)),
        ("add_rms_norm", lambda x, impl: add_rms_norm(x, x, [x[0]], (0, 5), EPS, impl=impl)),
        ("qk_norm_rope", lambda x, impl: qk_norm_rope(x[:, None], x[:, None], [x[0]], [x[0]], x, x, (0, 5), EPS, impl=impl)),
        ("rope", lambda x, impl: rope(x[:, None], x, x, impl=impl)),
        ("swiglu", lambda x, impl: swiglu(x, x, impl=impl)),
    ],
)
def test_an_error_names_the_operator_that_was_called(operator: str, call: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where triton cannot run, and for bounds of five rows where there are four."""
    x = normal(4, 8, seed=1)
    if "norm" in operator:
        for impl in ("reference", "triton"):
            with pytest.raises(ValueError, match=f"^{operator}: bounds="):
                call(x, impl)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=f"^{operator}: impl='triton': Triton kernels run on a GPU, not on cpu"):
        call(x[[0, 1, 2, 3, 0]], "triton")


@pytest.mark.parametrize("shape", [(8,), (2, 3, 8)], ids=str)
def test_a_norm_takes_a_matrix(shape: tuple[int, ...]) -> None:
    x, gain = normal(*shape, seed=1), normal(8, seed=2)
    with pytest.raises(ValueError, match=rf"^rms_norm: x: must be \[T, D\], not {re.escape(str(list(shape)))}"):
        rms_norm(x, [gain], (0, 2), EPS, impl="triton")
    with pytest.raises(ValueError, match=r"^add_rms_norm: x: must be \[T, D\]"):
        add_rms_norm(x, x, [gain], (0, 2), EPS, impl="triton")


def test_weights_of_a_norm_may_be_columns_of_a_table() -> None:
    x, table = normal(6, 8, seed=1), normal(8, 2, seed=2)
    columns, copies = [table[:, 0], table[:, 1]], [table[:, 0].clone(), table[:, 1].clone()]
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    outs = [rms_norm(leaf, weights, (0, 2, 6), EPS, impl="triton") for leaf, weights in zip(leaves, (columns, copies), strict=True)]
    assert torch.equal(*outs)
    for out in outs:
        out.square().sum().backward()
    assert torch.equal(leaves[0].grad, leaves[1].grad)


TOLERANCES = [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES, ids=str)
@pytest.mark.parametrize("size", [(33, 40), (1, 5), (0, 8), (2, 1030)], ids=str)
def test_swiglu(dtype: torch.dtype, tolerance: float, size: tuple[int, int]) -> None:
    fused = normal(size[0], 2 * size[1], seed=1, dtype=dtype).requires_grad_()

    def formula(both: torch.Tensor) -> tuple[torch.Tensor]:
        gate, up = both.chunk(2, dim=1)
        return (gate / (1 + torch.exp(-gate)) * up,)

    check(lambda both: (swiglu(*both.chunk(2, dim=1), impl="triton"),), formula, [fused], tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES, ids=str)
@pytest.mark.parametrize(("heads", "dim"), [(3, 12), (4, 16), (1, 2)])
def test_rope(dtype: torch.dtype, tolerance: float, heads: int, dim: int) -> None:
    x, angles = normal(21, heads, dim, seed=1, dtype=dtype).requires_grad_(), normal(21, dim // 2, seed=2).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def formula(x: torch.Tensor) -> tuple[torch.Tensor]:
        pairs = torch.complex(*x.chunk(2, dim=-1)) * torch.complex(cos.double(), sin.double())[:, None, : dim // 2]
        return (torch.cat([pairs.real, pairs.imag], dim=-1),)

    check(lambda x: (rope(x, cos, sin, impl="triton"),), formula, [x], tolerance)


def test_the_operators_keep_their_contracts() -> None:
    x, other, gain = normal(20, 8, seed=1).requires_grad_(), normal(20, 8, seed=2).requires_grad_(), normal(8, seed=3).requires_grad_()
    offsets = torch.tensor([0, 5, 5, 20], dtype=torch.int32)
    torch.library.opcheck(norm_ops.rms_norm, (x, None, [gain] * 3, offsets, EPS))
    torch.library.opcheck(norm_ops.rms_norm, (x, other, [gain] * 3, offsets, EPS))
    torch.library.opcheck(swiglu_ops.swiglu, (x, other))
    assert torch.autograd.gradcheck(
        lambda *leaves: add_rms_norm(*leaves[:2], leaves[2:], (0, 5, 20), EPS, impl="triton"), (x, other, gain, gain), fast_mode=True
    )


def test_a_new_routing_does_not_recompile() -> None:
    compiles = 0

    def backend(graph, inputs):
        nonlocal compiles
        compiles += 1
        return graph

    def layer(x: torch.Tensor, residual: torch.Tensor, gains: list[torch.Tensor], bounds: tuple[int, ...], offsets: torch.Tensor) -> torch.Tensor:
        normed, summed = add_rms_norm(x, residual, gains, bounds, EPS, offsets=offsets, impl="triton")
        return swiglu(normed, summed, impl="triton")

    compiled, trained = torch.compile(layer, fullgraph=True, backend=backend), torch.compile(layer, fullgraph=True, backend="aot_eager")
    for counts in [(13, 0, 37), (0, 50, 0), (20, 20, 10)]:
        function, _, leaves = norm_case(counts, 24, torch.float64, True, frozen=False)
        bounds = (0, *accumulate(counts))
        arguments = (*leaves[:2], leaves[2:], bounds, torch.tensor(bounds, dtype=torch.int32))
        expected = swiglu(*function(*leaves), impl="reference")
        assert_same(compiled(*arguments), expected, 1e-12)
        wanted = torch.autograd.grad(expected.sum(), leaves)
        for a, b in zip(torch.autograd.grad(trained(*arguments).sum(), leaves), wanted, strict=True):
            assert_same(a, b, 1e-12)
    assert compiles == 1


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_swiglu_takes_two_alike_matrices(impl: str) -> None:
    x = normal(6, 8, seed=1)
    with pytest.raises(ValueError, match=r"swiglu: gate: must be \[T, F\], not \[2, 3, 8\]"):
        swiglu(x.view(2, 3, 8), x.view(2, 3, 8), impl=impl)
    with pytest.raises(ValueError, match=r"swiglu: up: must be torch.float64 \[6, 8\]"):
        swiglu(x, x[:1], impl=impl)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_rope_refuses_an_odd_head(impl: str) -> None:
    x = normal(6, 2, 7, seed=1)
    with pytest.raises(ValueError, match=r"rope: x: must be \[T, H, Dh\] with an even Dh, not \[6, 2, 7\]"):
        rope(x, x[:, 0], x[:, 0], impl=impl)


def test_bfloat16_is_refused_where_the_interpreter_would_get_it_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    if not interpreting():
        pytest.skip("kernels run on a GPU here")
    monkeypatch.delattr("triton.runtime.interpreter.InterpreterBuilder.rounds_bfloat16")
    x = torch.randn(3, 8)
    swiglu(x, x, impl="triton")
    with pytest.raises(ValueError, match="interpreter computes bfloat16 wrongly"):
        swiglu(x.bfloat16(), x.bfloat16(), impl="triton")
    assert obstacle("swiglu", "triton", torch.device("cpu"), torch.bfloat16) == "Triton's interpreter computes bfloat16 wrongly"
