"""The first thing to run on a new kind of GPU: is every kernel right there, at 8,192 rows, and the same to the bit in 10 runs?

    python kernels/benchmarks/first_run.py

Each operator runs in bfloat16, forward and backward, its outputs between guard bands. Its error against float64 may be twice that of PyTorch's
own bfloat16 result. Exit code 1 if any is larger, if a run gives other bits, or if a kernel writes beside its output.

Reads out of bounds are for compute-sanitizer (of the CUDA toolkit), at a small size since it slows kernels down a hundredfold:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python kernels/benchmarks/first_run.py --size toy --rounds 1
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool racecheck python kernels/benchmarks/first_run.py --size toy --rounds 1

Without a GPU: TRITON_INTERPRET=1 python kernels/benchmarks/first_run.py --size toy --rounds 2
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from harness import Options, can_run_triton, parse

from fusiontrain.data.ranges import mask_ranges
from fusiontrain.testing.kernels import guarded_outputs, round_bfloat16_in_the_interpreter
from fusiontrain_kernels.linear_cross_entropy import linear_cross_entropy
from fusiontrain_kernels.masked_routing_attention import masked_routing_attention
from fusiontrain_kernels.modality_gemm import modality_gemm, modality_swiglu
from fusiontrain_kernels.qk_norm_rope import qk_norm_rope
from fusiontrain_kernels.rms_norm import add_rms_norm
from fusiontrain_kernels.swiglu import swiglu

Tensors = Sequence[torch.Tensor]
EPS = 1e-5
FLOOR = 2.0**-8
"""A relative error that is always allowed: the largest of one rounding to bfloat16."""


@dataclass(frozen=True)
class Sizes:
    """Rows; model, feed-forward and vocabulary width; heads, key heads and their widths, of which attention takes all; rows of the loss."""

    num_rows: int
    dim: int
    ffn: int
    vocab: int
    heads: int
    kv_heads: int
    head_dims: tuple[int, ...]
    loss_rows: int


SIZES = {"toy": Sizes(21, 16, 16, 24, 2, 1, (16,), 5), "gpu": Sizes(8192, 4096, 14336, 128256, 8, 2, (128, 64, 96, 256), 4096)}


@dataclass(frozen=True)
class Case:
    """call(*leaves, impl=) -> outputs; `impl` is "reference", "triton", or what is PyTorch's own way: `usual`."""

    name: str
    call: Callable[..., Tensors]
    leaves: Tensors
    usual: str = "reference"


class Maker:
    """Random leaves on the device: bfloat16, requiring gradients."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.generator = device, torch.Generator(device).manual_seed(1)

    def __call__(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        """A normal distribution of this standard deviation."""
        return torch.randn(*shape, generator=self.generator, device=self.device).mul_(scale).bfloat16().requires_grad_()


def products(sizes: Sizes, leaf: Maker) -> Iterator[Case]:
    """Three modalities, the middle one empty, borders off the tiles."""
    num_rows, dim, ffn = sizes.num_rows, sizes.dim, sizes.ffn
    bounds = (0, num_rows * 5 // 8 + 1, num_rows * 5 // 8 + 1, num_rows)
    x, matrices = leaf(num_rows, dim), [leaf(ffn, dim, scale=dim**-0.5) for _ in range(6)]
    biases = [leaf(ffn) for _ in range(3)]
    yield Case("modality_gemm", lambda x, *w, impl: (modality_gemm(x, w, bounds, impl=impl),), [x, *matrices[:3]])
    yield Case("modality_gemm bias", lambda x, *w, impl: (modality_gemm(x, w[:3], bounds, w[3:], impl=impl),), [x, *matrices[:3], *biases])
    yield Case("modality_swiglu", lambda x, *w, impl: (modality_swiglu(x, w[:3], w[3:], bounds, impl=impl),), [x, *matrices])
    gains = [leaf(dim) for _ in range(3)]
    yield Case("add_rms_norm", lambda x, r, *w, impl: add_rms_norm(x, r, w, bounds, EPS, impl=impl), [x, leaf(num_rows, dim), *gains])
    yield Case("swiglu", lambda gate, up, impl: (swiglu(gate, up, impl=impl),), [leaf(num_rows, ffn), leaf(num_rows, ffn)])
    head_dim = sizes.head_dims[0]
    q, k = leaf(num_rows, sizes.heads, head_dim), leaf(num_rows, sizes.kv_heads, head_dim)
    angles = torch.arange(num_rows, device=leaf.device)[:, None] * 0.7 ** torch.arange(head_dim // 2, device=leaf.device).repeat(2)

    def turn(q: torch.Tensor, k: torch.Tensor, *w: torch.Tensor, impl: str) -> Tensors:
        return qk_norm_rope(q, k, w[:3], w[3:], angles.cos().to(q.dtype), angles.sin().to(q.dtype), bounds, EPS, impl=impl)

    yield Case("qk_norm_rope", turn, [q, k, *(leaf(head_dim) for _ in range(6))])


def loss(sizes: Sizes, leaf: Maker) -> Case:
    """A quarter of the rows without a label."""
    labels = torch.randint(sizes.vocab, (sizes.loss_rows,), generator=leaf.generator, device=leaf.device)
    labels[::4] = -100
    loss_weights = torch.ones(sizes.loss_rows, device=leaf.device)

    def call(hidden: torch.Tensor, weight: torch.Tensor, impl: str) -> Tensors:
        return (linear_cross_entropy(hidden, weight, labels, loss_weights, z_loss=1e-4, impl=impl),)

    return Case("linear_cross_entropy", call, [leaf(sizes.loss_rows, sizes.dim), leaf(sizes.vocab, sizes.dim, scale=sizes.dim**-0.5)])


def attention(sizes: Sizes, leaf: Maker) -> Iterator[Case]:
    """Documents of a fifth of the rows, the third quarter of each one an image, stored after all text. Every width of a head; then, with the
    log-sum-exp, gradients of a third of the rows alone."""
    place = np.arange(sizes.num_rows)
    length = sizes.num_rows // 5
    order, documents = place % length, place // length
    is_image = (order >= length // 2) & (order < length * 3 // 4)
    rows = np.concatenate([place[~is_image], place[is_image]])
    segments = np.where(is_image, documents, -1)
    bounds = (0, int((~is_image).sum()), sizes.num_rows)
    keys, queries = (torch.from_numpy(ranges).to(leaf.device) for ranges in mask_ranges(documents[rows], order[rows], segments[rows], bounds))

    def all_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, impl: str) -> Tensors:
        return (masked_routing_attention(q, k, v, keys, queries, impl=impl),)

    def some_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, impl: str) -> Tensors:
        return masked_routing_attention(q, k, v, keys, queries, grad_rows=wanted, return_lse=True, impl=impl)

    wanted = torch.tensor([[sizes.num_rows // 2, sizes.num_rows * 5 // 6]], dtype=torch.int32, device=leaf.device)
    for head_dim in sizes.head_dims:
        q, k, v = (leaf(sizes.num_rows, heads, head_dim) for heads in (sizes.heads, sizes.kv_heads, sizes.kv_heads))
        yield Case(f"attention {head_dim}", all_rows, [q, k, v], usual="sdpa")
        if head_dim == sizes.head_dims[0]:
            yield Case(f"attention {head_dim} some rows", some_rows, [q, k, v], usual="sdpa")


def results(case: Case, leaves: Tensors, impl: str) -> list[torch.Tensor]:
    """Outputs, then gradients of the leaves for fixed gradients of the outputs."""
    outs = case.call(*leaves, impl=impl)
    generator = torch.Generator(leaves[0].device).manual_seed(2)
    grads = [torch.randn(out.shape, generator=generator, device=out.device).bfloat16().to(out.dtype) for out in outs]
    return [out.detach() for out in outs] + list(torch.autograd.grad(outs, leaves, grads))


def distance(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Norm of the difference relative to that of the exact tensor; of the difference alone where that is zero."""
    norm = float(exact.norm())
    return float((actual.double() - exact).norm()) / (norm or 1.0)


def faults(case: Case, rounds: int) -> list[str]:
    """What is wrong with a kernel: errors beyond twice PyTorch's, and runs that differ."""
    exact = results(case, [leaf.detach().double().requires_grad_() for leaf in case.leaves], "reference")
    usual = [distance(a, b) for a, b in zip(results(case, case.leaves, case.usual), exact, strict=True)]
    with guarded_outputs():
        first = results(case, case.leaves, "triton")
    found = []
    for i, (actual, wanted, limit) in enumerate(zip(first, exact, usual, strict=True)):
        error = distance(actual, wanted)
        if not error <= max(2 * limit, FLOOR):
            found.append(f"result {i} {list(actual.shape)}: error {error:.2e}, PyTorch's {limit:.2e}")
    for run in range(1, rounds):
        if not all(torch.equal(a, b) for a, b in zip(first, results(case, case.leaves, "triton"), strict=True)):
            found.append(f"run {run} gives other bits than run 0")
    return found


def cases(options: Options) -> Iterator[Case]:
    """One operator after the other, so that only one has its tensors on the device."""
    sizes, leaf = SIZES["toy" if options.size == "toy" else "gpu"], Maker(options.device)
    yield from products(sizes, leaf)
    yield loss(sizes, leaf)
    yield from attention(sizes, leaf)


def main(arguments: list[str] | None = None) -> int:
    """The number of operators with a fault."""
    options = parse(__doc__, [*(sys.argv[1:] if arguments is None else arguments), "--out", "-"])
    if not can_run_triton(options):
        sys.exit("Triton cannot run here: use a GPU, or TRITON_INTERPRET=1 with --size toy")
    if options.device.type == "cpu":
        round_bfloat16_in_the_interpreter()
    rounds, failures = min(options.rounds, 10), 0
    for case in cases(options):
        try:
            found = faults(case, rounds)
        except (AssertionError, RuntimeError) as error:
            found = [f"{type(error).__name__}: {error}"]
        failures += bool(found)
        print(f"{case.name:28} {'; '.join(found) or f'ok, {rounds} runs alike'}", flush=True)
    return failures


if __name__ == "__main__":
    sys.exit(min(main(), 1))
