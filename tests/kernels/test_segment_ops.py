"""Per-modality GEMM and RMS norm, SwiGLU and RoPE: against loops, against Hugging Face's Llama, and with empty modalities."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fusiontrain_kernels.modality_gemm import modality_gemm
from fusiontrain_kernels.rms_norm import rms_norm
from fusiontrain_kernels.rope import rope
from fusiontrain_kernels.swiglu import swiglu

PLAIN = ["reference", "eager"]
BOUNDS = [(0, 3, 7), (0, 0, 7), (0, 7, 7), (0, 2, 2, 7), (0, 7)]


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


def owner(bounds: tuple[int, ...], row: int) -> int:
    return next(m for m in range(len(bounds) - 1) if bounds[m] <= row < bounds[m + 1])


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_gemm_equals_loops(bounds: tuple[int, ...], with_bias: bool) -> None:
    x, weights = normal(7, 5), list(normal(len(bounds) - 1, 3, 5))
    biases = list(normal(len(bounds) - 1, 3)) if with_bias else None
    out = modality_gemm(x, weights, bounds, biases)
    for row in range(7):
        for column in range(3):
            m = owner(bounds, row)
            expected = sum(float(x[row, i] * weights[m][column, i]) for i in range(5)) + (float(biases[m][column]) if biases else 0)
            assert math.isclose(float(out[row, column]), expected, rel_tol=0, abs_tol=1e-12)


@pytest.mark.parametrize("impl", PLAIN)
@pytest.mark.parametrize("bounds", BOUNDS)
def test_norm_equals_loops(bounds: tuple[int, ...], impl: str) -> None:
    x, weights = normal(7, 5), list(normal(len(bounds) - 1, 5))
    out = rms_norm(x, weights, bounds, 0.01, impl=impl)
    for row in range(7):
        scale = 1 / math.sqrt(sum(float(v) ** 2 for v in x[row]) / 5 + 0.01)
        for column in range(5):
            expected = float(weights[owner(bounds, row)][column] * x[row, column]) * scale
            assert math.isclose(float(out[row, column]), expected, rel_tol=0, abs_tol=1e-12)


@pytest.mark.parametrize("bounds", BOUNDS)
def test_gradients(bounds: tuple[int, ...]) -> None:
    count = len(bounds) - 1
    x = normal(7, 5).requires_grad_()
    matrices = [w.clone().requires_grad_() for w in normal(count, 3, 5)]
    gains = [w.clone().requires_grad_() for w in normal(count, 5)]
    assert torch.autograd.gradcheck(lambda x, *w: modality_gemm(x, w, bounds), (x, *matrices))
    for impl in PLAIN:
        assert torch.autograd.gradcheck(lambda x, *w, impl=impl: rms_norm(x, w, bounds, 0.01, impl=impl), (x, *gains))


@pytest.mark.parametrize("x_needs_grad", [False, True])
@pytest.mark.parametrize("bounds", [(0, 4, 4), (0, 0, 4), (0, 0, 0)])
def test_a_modality_without_rows_has_zero_gradients_and_not_none(bounds: tuple[int, ...], x_needs_grad: bool) -> None:
    x = normal(bounds[-1], 5).requires_grad_(x_needs_grad)
    matrices = [w.clone().requires_grad_() for w in normal(2, 3, 5)]
    gains = [w.clone().requires_grad_() for w in normal(2, 5)]
    (modality_gemm(x, matrices, bounds).square().sum() + rms_norm(x, gains, bounds, 0.01).square().sum()).backward()
    for m in range(2):
        is_empty = bounds[m] == bounds[m + 1]
        for weight in (matrices[m], gains[m]):
            assert weight.grad is not None
            assert bool((weight.grad == 0).all()) == is_empty


def test_the_output_needs_grad_when_only_an_empty_modality_learns() -> None:
    """Text frozen, no image on this rank: the image weights must still be reached."""
    frozen, live = normal(3, 5), normal(3, 5).requires_grad_()
    out = modality_gemm(normal(4, 5), [frozen, live], (0, 4, 4))
    out.sum().backward()
    assert live.grad is not None and not live.grad.any()
    assert torch.equal(out.detach(), normal(4, 5) @ frozen.T)


@pytest.mark.parametrize("count", [1, 37, 300])
def test_text_rows_keep_their_bits_beside_an_empty_modality(count: int) -> None:
    x, weight, gain = normal(count, 64, dtype=torch.float32), normal(96, 64, dtype=torch.float32), normal(64, dtype=torch.float32)
    assert torch.equal(modality_gemm(x, [weight, -weight], (0, count, count)), modality_gemm(x, [weight], (0, count)))
    assert torch.equal(rms_norm(x, [gain, -gain], (0, count, count), 1e-5), rms_norm(x, [gain], (0, count), 1e-5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bounds", [(0, 13, 37), (0, 0, 37), (0, 20, 20, 37)])
@pytest.mark.parametrize("x_is_live", [True, False])
def test_segments_have_the_bits_of_the_reference(dtype: torch.dtype, bounds: tuple[int, ...], x_is_live: bool) -> None:
    """Output and gradients, with a frozen weight and a modality without a bias."""
    count = len(bounds) - 1
    x = normal(37, 24, dtype=dtype).requires_grad_(x_is_live)
    weights = [weight.clone().requires_grad_(m > 0) for m, weight in enumerate(normal(count, 40, 24, dtype=dtype))]
    biases = [normal(40, dtype=dtype).requires_grad_(), *[None] * (count - 1)]
    grad, leaves = normal(37, 41, dtype=dtype)[:, 1:], [*([x] if x_is_live else []), *weights[1:], biases[0]]
    for given in (None, biases):
        wanted, actual = (modality_gemm(x, weights, bounds, given, impl=impl) for impl in ("reference", "segments"))
        inputs = leaves if given else leaves[:-1]
        both = [torch.autograd.grad(out, inputs, grad) for out in (wanted, actual)]
        assert torch.equal(wanted, actual) and all(torch.equal(a, b) for a, b in zip(*both, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("live", [(True, True, True), (False, True, False), (True, False, False), (False, False, True)], ids=str)
def test_eager_norm_and_turn_have_the_bits_and_gradients_of_the_reference(dtype: torch.dtype, live: tuple[bool, ...]) -> None:
    """live: which of x and two weights need a gradient; the others get none."""
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    x, *weights = (leaf.requires_grad_(needed) for leaf, needed in zip([3 * normal(37, 24, dtype=dtype), *normal(2, 24, dtype=dtype)], live, strict=True))
    grad, leaves, angles = normal(37, 25, dtype=dtype)[:, 1:], [leaf for leaf in (x, *weights) if leaf.requires_grad], normal(37, 4, dtype=dtype).repeat(1, 2)
    found = []
    for impl in PLAIN:
        normed = rms_norm(x, weights, (0, 13, 37), 0.01, impl=impl)
        turned = rope(normed.unflatten(1, (3, 8)), angles.cos(), angles.sin(), impl=impl).flatten(1)
        found.append(((normed, turned), torch.autograd.grad(turned, leaves, grad)))
    for wanted, actual in zip(found[0][0], found[1][0], strict=True):
        assert torch.equal(wanted, actual)
    for wanted, actual in zip(found[0][1], found[1][1], strict=True):
        assert actual.dtype == dtype and float((wanted - actual).abs().max()) <= tolerance * float(wanted.abs().max())


def test_eager_norm_keeps_its_rows_once() -> None:
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(tuple(x.shape)), x)[1], lambda x: x):
        rms_norm(normal(7, 5).requires_grad_(), list(normal(2, 5)), (0, 3, 7), 0.01, impl="eager")
    assert sorted(kept) == [(5,), (5,), (7, 1), (7, 5)]


@pytest.mark.parametrize("bounds", [(0, 3), (1, 3, 7), (0, 5, 3, 7), (0, 3, 6), (0, 9, 7)])
def test_bounds_that_do_not_fit_are_refused(bounds: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="modality_gemm: bounds="):
        modality_gemm(normal(7, 5), list(normal(2, 3, 5)), bounds)
    for impl in PLAIN:
        with pytest.raises(ValueError, match="rms_norm: bounds="):
            rms_norm(normal(7, 5), list(normal(2, 5)), bounds, 0.01, impl=impl)


@pytest.mark.parametrize("impl", PLAIN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_arithmetic_of_hugging_face(dtype: torch.dtype, impl: str) -> None:
    """Equal to the bit, so that only the order of sums inside GEMMs and attention separates our logits from theirs."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

    x, gain = 3 * normal(9, 16, dtype=dtype), normal(16, dtype=dtype)
    theirs = LlamaRMSNorm(16, eps=1e-5).to(dtype)
    theirs.weight.data.copy_(gain)
    assert torch.equal(rms_norm(x, [gain], (0, 9), 1e-5, impl=impl), theirs(x).detach())

    q, k = normal(9, 4, 8, dtype=dtype), normal(9, 2, 8, dtype=dtype)
    angles = torch.arange(9)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.01]).repeat(2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    expected = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos[None], sin[None])
    assert torch.equal(rope(q, cos, sin, impl=impl), expected[0][0].transpose(0, 1))
    assert torch.equal(rope(k, cos, sin, impl=impl), expected[1][0].transpose(0, 1))

    gate, up = normal(9, 24, dtype=dtype), normal(9, 25, dtype=dtype)[:, 1:]
    assert torch.equal(swiglu(gate, up), torch.nn.SiLU()(gate) * up)


@pytest.mark.parametrize("impl", PLAIN)
def test_rope_turns_pairs_by_the_angle(impl: str) -> None:
    x, angles = normal(5, 2, 6), normal(5, 3)
    out = rope(x, angles.repeat(1, 2).cos(), angles.repeat(1, 2).sin(), impl=impl)
    for row in range(5):
        for i in range(3):
            pair = torch.complex(x[row, :, i], x[row, :, i + 3]) * torch.polar(torch.tensor(1.0).double(), angles[row, i])
            torch.testing.assert_close(torch.stack([out[row, :, i], out[row, :, i + 3]]), torch.stack([pair.real, pair.imag]))


def test_swiglu_equals_its_formula_and_gradients() -> None:
    gate, up = normal(4, 3).requires_grad_(), normal(4, 4)[:, :3].clone().requires_grad_()
    torch.testing.assert_close(swiglu(gate, up), gate / (1 + torch.exp(-gate)) * up)
    assert torch.autograd.gradcheck(swiglu, (gate, up))


@pytest.mark.parametrize(
    "call",
    [
        lambda: modality_gemm(normal(2, 2), [normal(2, 2)], (0, 2), impl="fast"),
        lambda: rms_norm(normal(2, 2), [normal(2)], (0, 2), 0.1, impl="fast"),
        lambda: swiglu(normal(2, 2), normal(2, 2), impl="fast"),
        lambda: rope(normal(2, 2, 2), normal(2, 2), normal(2, 2), impl="fast"),
    ],
)
def test_unknown_impl_names_the_choices(call) -> None:
    with pytest.raises(ValueError, match=r"impl='fast': choose one of auto, reference"):
        call()


@pytest.mark.parametrize("bounds", [(0, 3, 7), (0, 0, 7)])
def test_segments_seen_by_a_mode_are_one_operator_of_the_same_bits(bounds: tuple[int, ...]) -> None:
    """Selective recomputation keeps an operator's result: a product into a buffer it would compute again."""
    x, weights = normal(7, 5).requires_grad_(), [weight.clone().requires_grad_() for weight in normal(2, 3, 5)]
    plain = modality_gemm(x, weights, bounds, impl="segments")
    with FlopCounterMode(display=False) as counter:
        seen = modality_gemm(x, weights, bounds, impl="segments")
        grads = torch.autograd.grad(seen.square().sum(), [x, *weights])
    assert [str(operator) for operator in counter.get_flop_counts()["Global"]] == ["fusiontrain.segments_gemm", "fusiontrain.segments_gemm_backward"]
    assert torch.equal(plain, seen)
    for actual, wanted in zip(torch.autograd.grad(plain.square().sum(), [x, *weights]), grads, strict=True):
        assert torch.equal(actual, wanted)


def test_segments_compile_without_a_break() -> None:
    x, weights = normal(7, 5).requires_grad_(), [weight.clone().requires_grad_() for weight in normal(2, 3, 5)]
    compiled = torch.compile(lambda x, weights: modality_gemm(x, weights, (0, 3, 7), impl="segments"), fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(f.square().sum(), [x, *weights]) for f in (compiled(x, weights), modality_gemm(x, weights, (0, 3, 7), impl="reference"))]
    for actual, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(actual, wanted)
