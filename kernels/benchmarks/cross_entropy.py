"""linear_cross_entropy against the products that it cannot do without, and the memory that it takes.

    python kernels/benchmarks/cross_entropy.py [--rounds 20]

The baseline are three products, logits, hidden's gradient and the head's gradient (two where the head is frozen), with no loss at all.
`extra_mib` is beyond inputs, the loss and its gradients; with a trained head the sum of its gradient in float32 is part of it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from harness import Options, Report, can_run_triton, extra_memory, parse

from fusiontrain_kernels.linear_cross_entropy import linear_cross_entropy

SIZES = {"toy": (24, 16, 50), "cpu": (1024, 512, 16384), "gpu": (4096, 4096, 128256)}
"""Rows, model width, vocabulary."""


def products(hidden: torch.Tensor, weight: torch.Tensor, trained: bool) -> Callable[[], object]:
    """The GEMMs of loss and gradients, no softmax between them. The logits are made beforehand, as if they cost no memory."""
    logits = (hidden.detach() @ weight.detach().T).detach()

    def run() -> None:
        torch.mm(hidden.detach(), weight.detach().T, out=logits)
        torch.mm(logits, weight.detach())
        if trained:
            torch.mm(logits.T, hidden.detach())

    return run


def compare(options: Options, report: Report, dtype: torch.dtype, trained: bool) -> None:
    """One head, trained or frozen."""
    num_rows, dim, vocab = SIZES[options.size]
    generator = torch.Generator(options.device).manual_seed(1)
    hidden, weight = (
        torch.randn(n, dim, generator=generator, device=options.device).to(dtype).requires_grad_(n == num_rows or trained) for n in (num_rows, vocab)
    )
    labels = torch.randint(vocab, (num_rows,), generator=generator, device=options.device)
    loss_weights = torch.ones(num_rows, device=options.device)
    leaves = [leaf for leaf in (hidden, weight) if leaf.requires_grad]

    def ours(impl: str) -> Callable[[], object]:
        return lambda: torch.autograd.grad(linear_cross_entropy(hidden, weight, labels, loss_weights, impl=impl), leaves)

    functions = {impl: ours(impl) for impl in ["reference", "chunked", *["triton"] * can_run_triton(options)]}
    gradients = sum(leaf.numel() * leaf.element_size() for leaf in leaves) / 2**20
    extra = {}
    for impl, function in functions.items():
        function()
        peak = extra_memory(function, options.device)
        extra[impl] = None if peak is None else peak - gradients
    case = f"loss {num_rows}x{dim}x{vocab} head {'trained' if trained else 'frozen'}"
    flops = (2 + trained) * 2 * num_rows * dim * vocab
    report.compare(case, "both", dtype, {"products": products(hidden, weight, trained), **functions}, "products", flops, extra_mib=extra)


def main(arguments: list[str] | None = None) -> Report:
    """Runs all of it."""
    options = parse(__doc__, arguments)
    report = Report("cross_entropy", options)
    for dtype in [torch.bfloat16, *[torch.float32] * (options.size == "cpu")]:
        for trained in (False, True):
            compare(options, report, dtype, trained)
    return report


if __name__ == "__main__":
    sys.exit(not main().rows)
