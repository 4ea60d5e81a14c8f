"""The operators that memory limits, rms_norm, qk_norm_rope and swiglu, against a plain copy of as many bytes.

    python kernels/benchmarks/rowwise.py [--only swiglu] [--rounds 20]

`ratio` is the share of the copy's bandwidth. Bytes are those that must move: every input read once, every output written once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch
from harness import Options, Report, can_run_triton, parse

from fusiontrain_kernels.qk_norm_rope import qk_norm_rope
from fusiontrain_kernels.rms_norm import add_rms_norm, rms_norm
from fusiontrain_kernels.swiglu import swiglu

SIZES = {"toy": (16, 32, 48, 2, 1), "cpu": (2048, 1024, 2816, 16, 4), "gpu": (8192, 4096, 14336, 32, 8)}
"""T, D, F, heads, key heads."""
EPS = 1e-5
Tensors = Sequence[torch.Tensor]


def num_bytes(tensors: Tensors) -> int:
    """Of all of them."""
    return sum(x.numel() * x.element_size() for x in tensors)


def copy_of(size: int, device: torch.device) -> Callable[[], object]:
    """Reads and writes `size` bytes together."""
    source = torch.zeros(size // 4, dtype=torch.int16, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def measure(report: Report, case: str, call: Callable[..., Tensors], inputs: Tensors, kept: int, options: Options) -> None:
    """`call(*inputs, impl=)`, forward and then backward alone. kept: how many inputs the backward reads again."""
    impls = ["reference", *["triton"] * can_run_triton(options)]
    leaves = [x for x in inputs if x.requires_grad]
    with torch.no_grad():
        outs = call(*inputs, impl="reference")
        size = num_bytes(inputs) + num_bytes(outs)
        functions = {impl: (lambda impl=impl: call(*inputs, impl=impl)) for impl in impls}
        report.compare(case, "forward", inputs[0].dtype, {"copy": copy_of(size, options.device), **functions}, "copy", size=size)
    grads = [torch.ones_like(out) for out in outs]
    size = num_bytes(grads) + num_bytes(inputs[:kept]) + num_bytes(leaves)
    backward: dict[str, Callable[[], object]] = {"copy": copy_of(size, options.device)}
    for impl in impls:
        made = call(*inputs, impl=impl)
        backward[impl] = lambda made=made: torch.autograd.grad(made, leaves, grads, retain_graph=True)
    report.compare(case, "backward", inputs[0].dtype, backward, "copy", size=size)


def main(arguments: list[str] | None = None) -> Report:
    """Runs all of it."""
    options = parse(__doc__, arguments)
    report = Report("rowwise", options)
    num_rows, dim, ffn, heads, kv_heads = SIZES[options.size]
    bounds = (0, num_rows // 2, num_rows)
    offsets = torch.tensor(bounds, dtype=torch.int32, device=options.device)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=options.device, dtype=torch.bfloat16).requires_grad_()

    where = {"bounds": bounds, "eps": EPS, "offsets": offsets}
    x, residual, gains = leaf(num_rows, dim), leaf(num_rows, dim), [leaf(dim), leaf(dim)]
    measure(report, f"rms_norm {num_rows}x{dim}", lambda x, *w, impl: (rms_norm(x, w, **where, impl=impl),), [x, *gains], 1, options)
    measure(
        report, f"add_rms_norm {num_rows}x{dim}", lambda x, r, *w, impl: add_rms_norm(x, r, w, **where, impl=impl), [x, residual, *gains], 1, options
    )
    head_dim = dim // heads
    q, k, gains = leaf(num_rows, heads, head_dim), leaf(num_rows, kv_heads, head_dim), [leaf(head_dim) for _ in range(4)]
    cos, sin = (leaf(num_rows, head_dim).detach() for _ in range(2))

    def turn(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *w: torch.Tensor, impl: str) -> Tensors:
        return qk_norm_rope(q, k, w[:2] or None, w[2:] or None, cos, sin, **where, impl=impl)

    measure(report, f"qk_norm_rope {num_rows}x{heads}+{kv_heads}x{head_dim}", turn, [q, k, cos, sin, *gains], 4, options)
    measure(report, f"rope {num_rows}x{heads}+{kv_heads}x{head_dim}", turn, [q, k, cos, sin], 0, options)
    measure(report, f"swiglu {num_rows}x{ffn}", lambda g, u, impl: (swiglu(g, u, impl=impl),), [leaf(num_rows, ffn), leaf(num_rows, ffn)], 2, options)
    return report


if __name__ == "__main__":
    sys.exit(not main().rows)
