"""modality_gemm against one dense product of the same FLOPs and against routing by boolean masks; a whole block of each kind.

    python kernels/benchmarks/gemm.py [--only block] [--rounds 20]

Half of the rows are text, half image. "boolean" is routing as published with Mixture-of-Transformers (arXiv 2411.04996): the rows of each
modality are gathered by a boolean mask, which makes the host wait for a GPU, and put back after the product; its modalities alternate in
spans of 256 rows. All others have their rows modality by modality already. "triton" is also compared with "boolean" and "segments".
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial

import block
import torch
from harness import Options, Report, can_run_triton, parse
from torch.nn import functional as F

from fusiontrain_kernels.modality_gemm import modality_gemm

SIZES = {"toy": (16, 32, 32, 2, 1), "cpu": (2048, 1024, 2816, 16, 4), "gpu": (8192, 4096, 14336, 32, 8)}
"""T, D, F, heads, key heads. "gpu" is Llama-3-8B."""
BASELINES = ("dense", "segments", "boolean")
Linear = Callable[[torch.Tensor, list[torch.Tensor]], torch.Tensor]


def span_masks(num_rows: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of text and of images, in spans of 256 (or a quarter of few rows)."""
    is_text = torch.arange(num_rows, device=device) // min(256, num_rows // 4) % 2 == 0
    return is_text, ~is_text


def boolean(masks: tuple[torch.Tensor, ...]) -> Linear:
    """Gather, multiply, put back."""

    def linear(x: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
        out = x.new_empty(len(x), len(weights[0]))
        for mask, weight in zip(masks, weights, strict=True):
            out[mask] = F.linear(x[mask], weight)
        return out

    return linear


def implementations(options: Options, num_rows: int, dtype: torch.dtype) -> dict[str, Linear]:
    """By name. "dense" takes the first weight for all rows."""
    bounds = (0, num_rows // 2, num_rows)
    offsets = torch.tensor(bounds, dtype=torch.int32, device=options.device)

    def ours(impl: str) -> Linear:
        return lambda x, weights: modality_gemm(x, weights, bounds, offsets=offsets, impl=impl)

    found: dict[str, Linear] = {"dense": lambda x, weights: F.linear(x, weights[0]), "boolean": boolean(span_masks(num_rows, options.device))}
    return found | {impl: ours(impl) for impl in ["segments", "grouped_mm", *["triton"] * can_run_triton(options)]}


def both_passes(linear: Linear, x: torch.Tensor, weights: list[torch.Tensor], grad: torch.Tensor) -> Callable[[], object]:
    """Forward and backward; the dense one has no use for the second weight."""
    leaves = [leaf for leaf in (x, *weights) if leaf.requires_grad]
    return lambda: torch.autograd.grad(linear(x, weights), leaves, grad, allow_unused=True)


def one_gradient(linear: Linear, x: torch.Tensor, weights: list[torch.Tensor], grad: torch.Tensor, of_weights: bool) -> Callable[[], object]:
    """The backward alone: of x, or of the weights."""
    x, weights = x.detach().requires_grad_(not of_weights), [weight.detach().requires_grad_(of_weights) for weight in weights]
    out, leaves = linear(x, weights), weights if of_weights else [x]
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True, allow_unused=True)


def products(options: Options, report: Report, dtype: torch.dtype) -> None:
    """The four products of a layer."""
    num_rows, dim, ffn, heads, kv_heads = SIZES[options.size]
    qkv = dim + 2 * dim * kv_heads // heads
    for name, inner, width in [("qkv", dim, qkv), ("o", dim, dim), ("up", dim, ffn), ("down", ffn, dim)]:
        x = torch.randn(num_rows, inner, device=options.device, dtype=dtype).requires_grad_()
        weights = [torch.randn(width, inner, device=options.device, dtype=dtype).div_(inner**0.5).requires_grad_() for _ in range(2)]
        grad = torch.randn(num_rows, width, device=options.device, dtype=dtype)
        ways, flops, case = implementations(options, num_rows, dtype), 2 * num_rows * inner * width, f"{name} {num_rows}x{inner}x{width}"
        with torch.no_grad():
            forward: dict[str, Callable[[], object]] = {way: partial(linear, x, weights) for way, linear in ways.items()}
            report.compare(case, "forward", dtype, forward, BASELINES, flops)
        for which, of_weights in (("dgrad", False), ("wgrad", True)):
            alone = {way: one_gradient(linear, x, weights, grad, of_weights) for way, linear in ways.items()}
            report.compare(case, which, dtype, alone, BASELINES, flops)
        report.compare(case, "both", dtype, {way: both_passes(linear, x, weights, grad) for way, linear in ways.items()}, BASELINES, 3 * flops)
        frozen = [weights[0].detach(), weights[1]]
        half = {way: both_passes(ways[way], x, frozen, grad) for way in ways if way not in ("dense", "boolean")}
        half["dense"] = both_passes(ways["dense"], x, weights, grad)
        report.compare(f"{case} text frozen", "both", dtype, half, "dense", 2.5 * flops)


def blocks(options: Options, report: Report, dtype: torch.dtype) -> None:
    """A transformer block per modality against a dense one of the same products."""
    num_rows, dim, ffn, heads, kv_heads = SIZES[options.size]
    shape = block.Shape(num_rows, dim, ffn, heads, kv_heads)
    masks = span_masks(num_rows, options.device)
    functions = {}
    for name, route in block.routes(shape, options.device, can_run_triton(options), masks):
        functions[name] = block.both_passes(shape, route, options.device, dtype)
    report.compare(f"block {num_rows}x{dim}x{ffn}", "both", dtype, functions, BASELINES, 3 * shape.flops())


def dtypes(options: Options) -> Iterator[torch.dtype]:
    """bfloat16 on a GPU, float32 too on a CPU, and alone at toy size."""
    if options.size != "toy":
        yield torch.bfloat16
    if options.device.type == "cpu":
        yield torch.float32


def main(arguments: list[str] | None = None) -> Report:
    """Runs all of it."""
    options = parse(__doc__, arguments)
    report = Report("gemm", options)
    for dtype in dtypes(options):
        products(options, report, dtype)
        blocks(options, report, dtype)
    return report


if __name__ == "__main__":
    sys.exit(not main().rows)
