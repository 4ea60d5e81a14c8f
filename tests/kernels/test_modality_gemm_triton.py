"""modality_gemm in Triton against a sum in float64 over rows that know their modality, forward and backward."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch

pytest.importorskip("triton")

from fusiontrain.testing.kernels import guarded_outputs
from fusiontrain_kernels.modality_gemm import modality_gemm, modality_swiglu, triton_ops

LAYOUTS = [(50,), (1,), (13, 0, 37), (0, 33), (33, 0), (1, 49), (16, 32), (17, 31, 2), (0, 0), (0, 1, 0)]
"""Rows of each modality, one behind the other. A tile has 16."""
SIZES = [(24, 40), (32, 16), (7, 19)]
"""Inner and outer width: ragged, multiples of the tile, inner below it."""


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class Case:
    """Leaves of one product; the modalities in `frozen` need no gradient."""

    def __init__(self, counts: tuple[int, ...], sizes: tuple[int, int] = (24, 40), dtype: torch.dtype = torch.float64, frozen: tuple[int, ...] = ()) -> None:
        inner, width = sizes
        self.counts, self.bounds = counts, (0, *accumulate(counts))
        self.owners = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        self.offsets = torch.tensor(self.bounds, dtype=torch.int32)
        self.x = normal(sum(counts), inner, seed=1, dtype=dtype).requires_grad_()

        def leaves(seed: int, *shape: int) -> list[torch.Tensor]:
            return [normal(*shape, seed=seed + m, dtype=dtype).requires_grad_(m not in frozen) for m in range(len(counts))]

        self.weights, self.more, self.biases = leaves(10, width, inner), leaves(20, width, inner), leaves(30, width)
        self.grad = normal(sum(counts), width, seed=2, dtype=dtype)

    def dense(self, weights: list[torch.Tensor], biases: list[torch.Tensor] | None = None) -> torch.Tensor:
        """Every row against its own weight in float64, by gathering: no ranges, no tiles."""
        table = torch.stack(weights).double()[self.owners]  # [T, N, K]
        out = torch.einsum("tk,tnk->tn", self.x.double(), table)
        return out if biases is None else out + torch.stack(biases).double()[self.owners]

    def gradients(self, out: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor | None]:
        for leaf in leaves:
            leaf.grad = None
        out.backward(self.grad.to(out.dtype))
        return [leaf.grad for leaf in leaves]


def assert_same(actual: torch.Tensor | None, expected: torch.Tensor | None, tolerance: float) -> None:
    """Within `tolerance` of the largest element; None only where None is expected."""
    assert (actual is None) == (expected is None)
    if actual is None or not actual.numel():
        return
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.isfinite().all()
    assert float((actual - expected).abs().max()) <= tolerance * max(1.0, float(expected.abs().max()))


def check(case: Case, out: torch.Tensor, expected: torch.Tensor, leaves: list[torch.Tensor], tolerance: float) -> None:
    assert_same(out, expected, tolerance)
    with guarded_outputs():
        actual_grads = case.gradients(out, leaves)
    for actual, wanted in zip(actual_grads, case.gradients(expected, leaves), strict=True):
        assert_same(actual, wanted, tolerance)


@pytest.mark.parametrize("counts", LAYOUTS, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_gemm_in_float64(counts: tuple[int, ...], with_bias: bool) -> None:
    case = Case(counts, SIZES[sum(counts) % 3], frozen=(0,) if len(counts) > 1 else ())
    biases = case.biases if with_bias else None
    with guarded_outputs():
        out = modality_gemm(case.x, case.weights, case.bounds, biases, impl="triton")
    check(case, out, case.dense(case.weights, biases), [case.x, *case.weights, *(biases or [])], 1e-12)


@pytest.mark.parametrize("counts", LAYOUTS, ids=str)
def test_swiglu_epilogue_in_float64(counts: tuple[int, ...]) -> None:
    case = Case(counts, SIZES[sum(counts) % 3], frozen=(0,) if len(counts) > 1 else ())
    with guarded_outputs():
        out = modality_swiglu(case.x, case.weights, case.more, case.bounds, impl="triton")
    gate, up = case.dense(case.weights), case.dense(case.more)
    check(case, out, gate / (1 + torch.exp(-gate)) * up, [case.x, *case.weights, *case.more], 1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
def test_lower_precision(dtype: torch.dtype, tolerance: float) -> None:
    case = Case((13, 0, 37), dtype=dtype)
    leaves = [case.x, *case.weights]
    check(case, modality_gemm(case.x, case.weights, case.bounds, impl="triton"), case.dense(case.weights), leaves, tolerance)
    gate, up = case.dense(case.weights), case.dense(case.more)
    out = modality_swiglu(case.x, case.weights, case.more, case.bounds, impl="triton")
    check(case, out, torch.sigmoid(gate) * gate * up, [*leaves, *case.more], tolerance)


def test_the_activation_is_rounded_before_it_meets_up() -> None:
    """As in Hugging Face's Llama. Weights that hand on single numbers, so that no sum hides it; unrounded, every fifth result differs or more."""
    x, unit = normal(40, 32, seed=1, dtype=torch.bfloat16), torch.eye(32, dtype=torch.bfloat16)
    out = modality_swiglu(x, [unit], [unit.flip(0)], (0, 40), impl="triton")
    silu, up = x.double() * torch.sigmoid(x.double()), x.double().flip(1)
    rounded, unrounded = ((activated * up).to(torch.bfloat16) for activated in (silu.to(torch.bfloat16).double(), silu))
    assert (out == rounded).float().mean() > 0.99
    assert (unrounded == rounded).float().mean() < 0.8


def test_rows_and_weights_may_be_slices_of_wider_tensors() -> None:
    case = Case((20, 13))
    wide = torch.full((33, 50), float("nan"), dtype=torch.float64)
    wide[:, 5:29] = case.x.detach()
    turned = [weight.detach().T.contiguous().T for weight in case.weights]
    expected = case.dense(case.weights).detach()
    assert_same(modality_gemm(wide[:, 5:29], turned, case.bounds, impl="triton"), expected, 1e-12)


def test_every_weight_may_have_its_own_distance_between_rows() -> None:
    case = Case((20, 13))
    wide = torch.full((40, 31), float("nan"), dtype=torch.float64)
    wide[:, 3:27] = case.weights[1].detach()
    mixed, plain = [case.weights[0].detach(), wide[:, 3:27]], [weight.detach() for weight in case.weights]
    x = case.x.detach()
    assert torch.equal(modality_gemm(x, mixed, case.bounds, impl="triton"), modality_gemm(x, plain, case.bounds, impl="triton"))
    swiglu = [modality_swiglu(x, plain, ups, case.bounds, impl="triton") for ups in (mixed, plain)]
    assert torch.equal(*swiglu)
    grads = [case.grad, torch.stack([case.grad, case.grad], 1)[:, 0]]
    actual = triton_ops.dgrad(grads, plain + mixed, case.offsets)
    assert_same(actual, triton_ops.dgrad([2 * case.grad], plain, case.offsets), 1e-12)


@pytest.mark.parametrize("impl", ["segments", "grouped_mm"])
def test_the_other_implementations_agree(impl: str) -> None:
    case = Case((13, 0, 37), dtype=torch.float32, frozen=(0,))
    out = modality_gemm(case.x, case.weights, case.bounds, case.biases, impl=impl)
    expected = case.dense(case.weights, case.biases)
    leaves = [case.x, *case.weights, *case.biases]
    assert_same(out, expected, 1e-5)
    for actual, wanted in zip(case.gradients(out, leaves), case.gradients(expected, leaves), strict=True):
        assert_same(actual, wanted, 1e-5)


def test_gradients_add_to_float32_main_gradients_and_frozen_ones_stay_untouched() -> None:
    case = Case((13, 0, 37), dtype=torch.bfloat16, frozen=(0,))
    before = [normal(40, 24, seed=40 + m, dtype=torch.float32) for m in range(3)]
    main_grads = [None, before[1].clone(), before[2].clone()]
    for _ in range(2):
        out = modality_gemm(case.x, case.weights, case.bounds, main_grads=main_grads, impl="triton")
        assert case.gradients(out, case.weights) == [None, None, None]
    (wanted,) = case.gradients(case.dense(case.weights), [case.weights[2]])
    assert torch.equal(main_grads[1], before[1])
    torch.testing.assert_close(main_grads[2] - before[2], 2 * wanted.float(), rtol=2e-2, atol=2e-2)


def test_a_frozen_modality_gets_no_launch_and_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []
    original = triton_ops._wgrad
    monkeypatch.setattr(triton_ops, "_wgrad", lambda x, grad, outs, *rest, **options: (launched.append(len(outs)), original(x, grad, outs, *rest, **options)))
    for frozen in [(0, 1), (0,)]:
        case = Case((20, 13), frozen=frozen)
        case.gradients(modality_gemm(case.x, case.weights, case.bounds, impl="triton"), case.weights)
    assert launched == [1]


def test_twice_the_same_bits() -> None:
    case = Case((13, 0, 37), dtype=torch.bfloat16)
    leaves = [case.x, *case.weights]
    runs = [case.gradients(modality_gemm(case.x, case.weights, case.bounds, impl="triton"), leaves) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_the_operators_keep_their_contracts() -> None:
    case = Case((7, 0, 12), (8, 16))
    offsets = case.offsets
    torch.library.opcheck(triton_ops.gemm, (case.x, case.weights, case.biases, offsets, []))
    torch.library.opcheck(triton_ops.gemm_swiglu, (case.x, case.weights, case.more, offsets))
    detached = [weight.detach() for weight in case.weights]
    x, grad = case.x.detach(), case.grad
    torch.library.opcheck(triton_ops.dgrad, ([grad, grad], detached + detached, offsets))
    torch.library.opcheck(triton_ops.wgrad, (x, grad, offsets, [False, True, True], torch.float64, True))
    torch.library.opcheck(triton_ops.accumulate, (x, grad, detached[:2], offsets, [True, False, True]))


def test_gradcheck() -> None:
    case = Case((3, 0, 2), (4, 5))

    def both(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        return modality_gemm(modality_swiglu(x, weights[:3], weights[3:6], case.bounds, impl="triton"), weights[6:], case.bounds, impl="triton")

    down = [normal(2, 5, seed=50 + m).requires_grad_() for m in range(3)]
    assert torch.autograd.gradcheck(both, (case.x, *case.weights, *case.more, *down), fast_mode=True)


def test_a_new_routing_does_not_recompile() -> None:
    compiles = 0

    def backend(graph, inputs):
        nonlocal compiles
        compiles += 1
        return graph

    def layer(x: torch.Tensor, weights: list[torch.Tensor], bounds: tuple[int, ...], offsets: torch.Tensor) -> torch.Tensor:
        return modality_gemm(x, weights, bounds, offsets=offsets, impl="triton")

    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    trained = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for counts in [(13, 0, 37), (0, 50, 0), (20, 20, 10)]:
        case = Case(counts)
        expected = case.dense(case.weights)
        assert_same(compiled(case.x, case.weights, case.bounds, case.offsets), expected, 1e-12)
        check(case, trained(case.x, case.weights, case.bounds, case.offsets), expected, [case.x, *case.weights], 1e-12)
    assert compiles == 1


def test_what_does_not_fit_is_refused() -> None:
    case = Case((20, 13))
    with pytest.raises(ValueError, match="offsets: must be int32"):
        modality_gemm(case.x, case.weights, case.bounds, offsets=case.offsets.long(), impl="triton")
    with pytest.raises(ValueError, match="bounds="):
        modality_gemm(case.x, case.weights, (0, 20, 30), impl="triton")
    with pytest.raises(ValueError, match="main_grads: only"):
        modality_gemm(case.x, case.weights, case.bounds, main_grads=case.weights, impl="segments")
    with pytest.raises(ValueError, match="grouped_mm"):
        modality_gemm(case.x, case.weights, case.bounds, impl="grouped_mm")


def test_tensors_that_a_kernel_would_read_beside_are_refused() -> None:
    case = Case((20, 13))
    x, weights = case.x, case.weights

    def gemm(weights: list[torch.Tensor] = weights, **options) -> torch.Tensor:
        return modality_gemm(x, weights, case.bounds, impl="triton", **options)

    with pytest.raises(ValueError, match=r"weights\[1\]: must be torch.float64 \[40, 24\]"):
        gemm([weights[0], weights[1][:39]])
    with pytest.raises(ValueError, match=r"weights\[0\]: must be torch.float64"):
        gemm([weights[0].float(), weights[1]])
    with pytest.raises(ValueError, match=r"biases\[1\]: must be"):
        gemm(biases=[None, case.biases[1][:39]])
    with pytest.raises(ValueError, match=r"ups\[1\]: must be"):
        modality_swiglu(x, weights, [weights[0], weights[1][:, :23]], case.bounds, impl="triton")
    with pytest.raises(ValueError, match=r"main_grads\[0\]: is None though"):
        gemm(main_grads=[None, torch.zeros(40, 24)])
    with pytest.raises(ValueError, match=r"main_grads\[1\]: must be contiguous \[40, 24\]"):
        gemm(main_grads=[torch.zeros(40, 24), torch.zeros(24, 40).T])
    with pytest.raises(ValueError, match=r"main_grads: must have one dtype, not torch.float32 and torch.float64"):
        gemm(main_grads=[torch.zeros(40, 24), torch.zeros(40, 24, dtype=torch.float64)])
    with pytest.raises(ValueError, match="one per weight, and no biases"):
        gemm(main_grads=[torch.zeros(40, 24)])


@pytest.mark.parametrize("expanded", [False, True])
def test_biases_and_offsets_may_be_views(expanded: bool) -> None:
    case = Case((13, 0, 37))
    biases = [bias[:1].detach().expand(40) if expanded else torch.stack([bias.detach(), -bias.detach()], 1)[:, 0] for bias in case.biases]
    offsets = torch.stack([case.offsets, case.offsets * 0], 1)[:, 0]
    out = modality_gemm(case.x, case.weights, case.bounds, biases, offsets=offsets, impl="triton")
    assert_same(out, case.dense(case.weights, biases), 1e-12)


@pytest.mark.parametrize("impl", ["reference", "segments", "grouped_mm", "triton"])
def test_what_does_not_fit_is_refused_by_all(impl: str) -> None:
    x, weight, bias = torch.zeros(9, 8), torch.zeros(16, 8), torch.zeros(16)

    def gemm(weights: list[torch.Tensor], biases: list[torch.Tensor | None] | None = None) -> None:
        modality_gemm(x, weights, (0, 4, 9), biases, impl=impl)

    with pytest.raises(ValueError, match="modality_gemm: weights: must be at least one"):
        modality_gemm(x, [], (0,), impl=impl)
    with pytest.raises(ValueError, match=r"modality_gemm: weights\[1\]: must be torch.float32 \[16, 8\]"):
        gemm([weight, weight[:15]])
    with pytest.raises(ValueError, match=r"modality_gemm: weights\[0\]: must be torch.float32 \[16, 8\]"):
        gemm([weight[:, :7], weight])
    with pytest.raises(ValueError, match="modality_gemm: biases: 1 for 2 modalities"):
        gemm([weight, weight], [bias])
    with pytest.raises(ValueError, match=r"modality_gemm: biases\[1\]: must be torch.float32 \[16\]"):
        gemm([weight, weight], [None, bias[:1]])
    with pytest.raises(ValueError, match="modality_swiglu: ups: 3 for 2 modalities"):
        modality_swiglu(x, [weight] * 2, [weight] * 3, (0, 4, 9), impl=impl)
    with pytest.raises(ValueError, match=r"modality_swiglu: ups\[1\]: must be torch.float32 \[16, 8\]"):
        modality_swiglu(x, [weight] * 2, [weight, weight[:8]], (0, 4, 9), impl=impl)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("first", [0, 1])
def test_grouped_mm_takes_rows_at_any_distance(dtype: torch.dtype, first: int) -> None:
    x, weights = normal(9, 17, seed=1, dtype=dtype)[:, first : first + 16], list(normal(2, 8, 16, seed=2, dtype=dtype))
    out = modality_gemm(x, weights, (0, 4, 9), impl="grouped_mm")
    assert_same(out, modality_gemm(x, weights, (0, 4, 9), impl="reference"), 2e-2 if dtype == torch.bfloat16 else 1e-5)
