"""Norm of heads and rotary positions against complex numbers in float64, forward and backward, and against Hugging Face."""

from __future__ import annotations

import importlib.util
from itertools import accumulate

import pytest
import torch

from fusiontrain.testing.kernels import guarded_outputs
from fusiontrain_kernels.qk_norm_rope import qk_norm_rope

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
IMPLS = ["reference", "eager", pytest.param("triton", marks=needs_triton)]
LAYOUTS = [(21,), (1,), (9, 0, 12), (0, 17), (17, 0), (1, 16), (8, 16), (0, 0), (0, 1, 0)]
"""Rows of each modality. A block of the backward has 8."""
EPS = 1e-2
TOLERANCES = [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class Case:
    """Leaves; `normed` says which of q and k have weights, `frozen` which modalities' need no gradient."""

    def __init__(
        self,
        counts: tuple[int, ...],
        dtype: torch.dtype = torch.float64,
        heads: tuple[int, int] = (3, 1),
        dim: int = 12,
        normed: tuple[bool, bool] = (True, True),
        frozen: tuple[int, ...] = (),
    ) -> None:
        num_rows, self.counts, self.bounds = sum(counts), counts, (0, *accumulate(counts))
        self.offsets = torch.tensor(self.bounds, dtype=torch.int32)
        self.owners = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        self.q, self.k = (normal(num_rows, count, dim, seed=count, dtype=dtype).requires_grad_() for count in heads)
        self.angles = 3 * normal(num_rows, dim // 2, seed=7)
        self.cos, self.sin = (values.repeat(1, 2).to(dtype) for values in (self.angles.cos(), self.angles.sin()))

        def gains(seed: int) -> list[torch.Tensor]:
            return [(1 + normal(dim, seed=seed + m)).to(dtype).requires_grad_(m not in frozen) for m in range(len(counts))]

        self.q_weights, self.k_weights = (gains(20 + 10 * i) if has else None for i, has in enumerate(normed))
        self.leaves = [leaf for leaf in (self.q, self.k, *(self.q_weights or []), *(self.k_weights or [])) if leaf.requires_grad]

    def call(self, impl: str, **options) -> tuple[torch.Tensor, torch.Tensor]:
        return qk_norm_rope(self.q, self.k, self.q_weights, self.k_weights, self.cos, self.sin, self.bounds, EPS, impl=impl, **options)

    def formula(self, x: torch.Tensor, weights: list[torch.Tensor] | None) -> torch.Tensor:
        """Each head's pairs as complex numbers, times exp(i * angle); the weight by the row's owner."""
        x = x.double()
        if weights is not None:
            x = torch.stack(weights).double()[self.owners][:, None] * x / (x.square().sum(-1, keepdim=True) / x.shape[-1] + EPS).sqrt()
        half = x.shape[-1] // 2
        turn = torch.complex(self.cos.double(), self.sin.double())[:, None, :half]
        pairs = torch.complex(x[..., :half], x[..., half:]) * turn
        return torch.cat([pairs.real, pairs.imag], dim=-1)

    def gradients(self, outs: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        grads = [normal(*out.shape, seed=90 + i, dtype=self.q.dtype).to(out.dtype) for i, out in enumerate(outs)]
        return torch.autograd.grad(outs, self.leaves, grads)


def assert_same(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    if actual.numel():
        actual, expected = actual.detach().double(), expected.detach().double()
        assert actual.isfinite().all()
        assert float((actual - expected).abs().max()) <= tolerance * max(1.0, float(expected.abs().max()))


def check(case: Case, impl: str, tolerance: float) -> None:
    if impl == "triton":
        with guarded_outputs():
            outs = case.call(impl)
            grads = case.gradients(outs)
    else:
        outs = case.call(impl)
        grads = case.gradients(outs)
    wanted = case.formula(case.q, case.q_weights), case.formula(case.k, case.k_weights)
    for actual, expected in zip([*outs, *grads], [*wanted, *case.gradients(wanted)], strict=True):
        assert_same(actual, expected, tolerance)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("counts", LAYOUTS, ids=str)
def test_layouts_in_float64(impl: str, counts: tuple[int, ...]) -> None:
    check(Case(counts, frozen=(0,) if len(counts) > 1 else ()), impl, 1e-12)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("normed", [(False, False), (True, False), (False, True)], ids=str)
def test_either_may_go_without_a_norm(impl: str, normed: tuple[bool, bool]) -> None:
    check(Case((9, 0, 12), normed=normed), impl, 1e-12)


@needs_triton
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES, ids=str)
@pytest.mark.parametrize(("heads", "dim"), [((4, 2), 16), ((5, 1), 2), ((3, 3), 24)], ids=str)
def test_precisions(dtype: torch.dtype, tolerance: float, heads: tuple[int, int], dim: int) -> None:
    check(Case((9, 0, 12), dtype, heads, dim), "triton", tolerance)


@needs_triton
def test_heads_in_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusiontrain_kernels.qk_norm_rope.triton_ops.ELEMENTS", 16)
    check(Case((9, 0, 12), heads=(5, 2), dim=12), "triton", 1e-12)


@needs_triton
def test_heads_may_be_slices_of_one_projection() -> None:
    case = Case((9, 12), heads=(3, 3))
    fused = torch.stack([case.q.detach(), case.k.detach(), torch.full_like(case.q, float("nan"))], 2)  # [T, 3, qkv, Dh]
    q, k = (fused[:, :, i].requires_grad_() for i in range(2))
    angles = [torch.cat([values, torch.full_like(values, float("nan"))], 1)[:, :12] for values in (case.cos, case.sin)]
    outs = qk_norm_rope(q, k, case.q_weights, case.k_weights, *angles, case.bounds, EPS, impl="triton")
    for actual, expected in zip(outs, case.call("triton"), strict=True):
        assert torch.equal(actual, expected)


@needs_triton
def test_one_rounding_more_than_the_reference_is_rare_in_bfloat16() -> None:
    case = Case((33,), torch.bfloat16, (4, 2), 16)
    for actual, expected in zip(case.call("triton"), case.call("reference"), strict=True):
        assert_same(actual, expected, 2**-6)


@needs_triton
def test_the_gradient_of_a_weight_takes_the_rounded_head() -> None:
    """One row of one head and no turn, so that nothing is summed: the product of what the forward multiplied."""
    x, grad = (normal(1, 1, 512, seed=seed, dtype=torch.bfloat16) for seed in (1, 2))
    weight, still = torch.ones(512, dtype=torch.bfloat16, requires_grad=True), torch.ones(1, 512, dtype=torch.bfloat16)
    out, _ = qk_norm_rope(x, x, [weight], None, still, 0 * still, (0, 1), EPS, impl="triton")
    out.backward(grad)
    exact = x.double() / (x.double().square().mean() + EPS).sqrt()
    rounded, unrounded = ((grad.double() * head).flatten().to(torch.bfloat16) for head in (exact.to(torch.bfloat16).double(), exact))
    assert (weight.grad == rounded).float().mean() > 0.99
    assert (unrounded == rounded).float().mean() < 0.9


@pytest.mark.parametrize("impl", ["reference", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_bits_of_hugging_face(dtype: torch.dtype, impl: str) -> None:
    """Qwen3 norms the heads of q and k, then turns them."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    case = Case((21,), dtype, (4, 2), 16)
    normed = []
    for x, weights in [(case.q, case.q_weights), (case.k, case.k_weights)]:
        theirs = Qwen3RMSNorm(16, eps=EPS).to(dtype)
        theirs.weight.data.copy_(weights[0])
        normed.append(theirs(x).transpose(0, 1)[None])
    expected = apply_rotary_pos_emb(*normed, case.cos[None], case.sin[None])
    for actual, wanted in zip(case.call(impl), expected, strict=True):
        assert torch.equal(actual, wanted[0].transpose(0, 1))


@pytest.mark.parametrize("impl", ["eager", pytest.param("triton", marks=needs_triton)])
def test_without_a_norm_nothing_but_the_angles_is_kept(impl: str) -> None:
    case = Case((21,), normed=(False, False))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(tuple(x.shape)), x)[1], lambda x: x):
        case.call(impl)
    assert set(kept) == {(21, 12)}


@needs_triton
def test_frozen_weights_make_no_partial_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusiontrain_kernels.qk_norm_rope.triton_ops.add_partials", None)
    case = Case((9, 12), frozen=(0, 1))
    assert len(case.gradients(case.call("triton"))) == 2


@needs_triton
def test_the_operators_keep_their_contracts() -> None:
    from fusiontrain_kernels.qk_norm_rope import triton_ops

    case = Case((5, 0, 4), dim=4)
    torch.library.opcheck(triton_ops.norm_rope, (case.q, case.q_weights, case.cos, case.sin, case.offsets, EPS))
    torch.library.opcheck(triton_ops.norm_rope, (case.k, [], case.cos, case.sin, None, EPS))
    detached = [weight.detach() for weight in case.q_weights]
    x = case.q.detach()
    torch.library.opcheck(triton_ops.norm_rope_backward, (x, x, detached, case.cos, case.sin, case.offsets, EPS, [True, False, True]))
    torch.library.opcheck(triton_ops.norm_rope_backward, (x, None, [], case.cos, case.sin, None, EPS, []))


@pytest.mark.parametrize("impl", IMPLS)
def test_gradcheck(impl: str) -> None:
    case = Case((3, 0, 2), heads=(2, 1), dim=4)

    def function(q: torch.Tensor, k: torch.Tensor, *weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return qk_norm_rope(q, k, weights[:3], weights[3:], case.cos, case.sin, case.bounds, EPS, impl=impl)

    assert torch.autograd.gradcheck(function, (case.q, case.k, *case.q_weights, *case.k_weights), fast_mode=True)


@needs_triton
def test_a_new_routing_does_not_recompile() -> None:
    compiles = 0

    def backend(graph, inputs):
        nonlocal compiles
        compiles += 1
        return graph

    def layer(q, k, q_weights, k_weights, cos, sin, bounds, offsets):
        return qk_norm_rope(q, k, q_weights, k_weights, cos, sin, bounds, EPS, offsets=offsets, impl="triton")

    compiled, trained = torch.compile(layer, fullgraph=True, backend=backend), torch.compile(layer, fullgraph=True, backend="aot_eager")
    for counts in [(9, 0, 12), (0, 21, 0), (10, 10, 1)]:
        case = Case(counts)
        arguments = (case.q, case.k, case.q_weights, case.k_weights, case.cos, case.sin, case.bounds, case.offsets)
        wanted = case.formula(case.q, case.q_weights), case.formula(case.k, case.k_weights)
        for actual, expected in zip(compiled(*arguments), wanted, strict=True):
            assert_same(actual, expected, 1e-12)
        for actual, expected in zip(case.gradients(trained(*arguments)), case.gradients(wanted), strict=True):
            assert_same(actual, expected, 1e-12)
    assert compiles == 1


@needs_triton
def test_what_does_not_fit_is_refused() -> None:
    case = Case((9, 12))
    names = ("q", "k", "q_weights", "k_weights", "cos", "sin", "bounds")
    arguments = {"eps": EPS, **{name: getattr(case, name) for name in names}}

    def call(impl: str = "triton", **changed) -> None:
        qk_norm_rope(**{**arguments, **changed}, impl=impl)

    with pytest.raises(ValueError, match="impl='fast': choose one of auto, reference, eager, triton"):
        call("fast")
    with pytest.raises(ValueError, match="bounds="):
        call(bounds=(0, 9, 20))
    with pytest.raises(ValueError, match="bounds="):
        call("reference", bounds=(0, 9, 20))
    with pytest.raises(ValueError, match="cos: must be"):
        call(cos=case.cos[:, :6])
    with pytest.raises(ValueError, match=r"weights\[0\]: must be"):
        call(k_weights=[case.cos[0, :6]] * 2)
    with pytest.raises(ValueError, match="offsets: must be int32"):
        call(offsets=case.offsets.long())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("odd", ["q", "k"])
def test_an_odd_head_is_refused(impl: str, odd: str) -> None:
    x = {"q": torch.zeros(6, 2, 8), "k": torch.zeros(6, 1, 8)}
    x[odd] = x[odd][..., :7]
    with pytest.raises(ValueError, match=f"qk_norm_rope: {odd}: must be .* with an even Dh"):
        qk_norm_rope(**x, q_weights=None, k_weights=None, cos=torch.ones(6, 8), sin=torch.ones(6, 8), bounds=(0, 6), eps=EPS, impl=impl)
