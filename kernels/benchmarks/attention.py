"""masked_routing_attention against torch's attention with a dense mask, flex_attention and flash-attn.

    python kernels/benchmarks/attention.py [--rounds 20] [--only mixed]

The baseline is `scaled_dot_product_attention` with the dense mask made beforehand; "triton" is also compared with it where every query head has keys of
its own ("dense, repeated": more of torch's kernels take that), with flex and with flash. Block masks of flex are made beforehand too, but for
"flex + mask", which makes one in every call, as a model does once a batch. TFLOP/s count what the mask allows: 4 H Dh products and sums a
pair of query and key in the forward, 10 in the backward.
"""

from __future__ import annotations

import importlib.util
import itertools
import re
import sys
from collections.abc import Callable

import numpy as np
import torch
import torch._functorch.config
from harness import Options, Report, can_run_triton, parse
from torch.nn import functional as F

from fusiontrain.data.ranges import dense_mask, mask_ranges
from fusiontrain_kernels.masked_routing_attention import masked_routing_attention

SIZES = {"toy": (61, 2, 1, 16), "cpu": (2048, 8, 8, 64), "gpu": (8192, 32, 8, 128)}
"""Rows, query heads, key heads, width of a head."""
PARTS = {
    "causal": lambda rows: [(rows, False)],
    "mixed": lambda rows: [(rows // 10, False), (rows // 8, True), (rows // 10, False)],  # three documents, each around an image
    "pairs": lambda rows: [(rows // 56, False), (rows // 32, True)],  # a caption and its image, 402 rows of 8192
}
"""Tokens of the parts of one document, and whether they are an image; repeated until the rows are full."""
BASELINES = ("dense mask", "dense, repeated", "flex", "flex + mask", "flash")
torch._functorch.config.donated_buffer = False  # flex is compiled, and its backward is timed again and again on one graph


class Batch:
    """allowed [T, T] bool, key_ranges and query_ranges [T, 2, 2]: text in one slice, images in another."""

    def __init__(self, layout: str, num_rows: int, device: torch.device) -> None:
        parts = PARTS[layout](num_rows)
        tokens = [(document, order, is_image) for document, order, is_image in itertools.islice(_tokens(parts), num_rows)]
        docs, orders, images = np.array(sorted(tokens, key=lambda token: token[2]), dtype=np.int64).T
        ids = (docs, orders, np.where(images == 1, docs, -1))
        self.allowed = torch.from_numpy(dense_mask(*ids)).to(device)
        ranges = mask_ranges(*ids, (0, int((images == 0).sum()), num_rows))
        self.key_ranges, self.query_ranges = (torch.from_numpy(array).to(device) for array in ranges)


def _tokens(parts: list[tuple[int, bool]]) -> itertools.chain[tuple[int, int, bool]]:
    flags = [is_image for length, is_image in parts for _ in range(length)]
    return itertools.chain.from_iterable(((document, order, flag) for order, flag in enumerate(flags)) for document in itertools.count())


def implementations(layout: str, batch: Batch, options: Options, differentiate: bool) -> dict[str, Callable[..., torch.Tensor]]:
    """q, k, v -> out, by name; those that can run here."""

    def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        heads_first = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
        return F.scaled_dot_product_attention(*heads_first, attn_mask=batch.allowed, enable_gqa=True)[0].transpose(0, 1)

    def repeated(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        share = q.shape[1] // k.shape[1]
        heads_first = (tensor.transpose(0, 1)[None] for tensor in (q, k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)))
        return F.scaled_dot_product_attention(*heads_first, attn_mask=batch.allowed)[0].transpose(0, 1)

    def ours(impl: str, ranges: Callable[[], torch.Tensor] = lambda: batch.key_ranges) -> Callable[..., torch.Tensor]:
        return lambda q, k, v: masked_routing_attention(q, k, v, ranges(), batch.query_ranges, impl=impl)

    on_gpu = options.device.type == "cuda"
    found = {"dense mask": dense, "dense, repeated": repeated, "sdpa": ours("sdpa")}
    if not on_gpu:
        found["chunked"] = ours("chunked")
    if can_run_triton(options):
        found["triton"] = ours("triton")
    if on_gpu or (options.size == "toy" and not differentiate):
        found["flex"] = ours("flex")
        found["flex + mask"] = ours("flex", lambda: batch.key_ranges.clone())  # another tensor: another block mask
    if on_gpu and layout == "causal" and importlib.util.find_spec("flash_attn") is not None:
        found["flash"] = ours("flash")
    return found


def compare(layout: str, dtype: torch.dtype, options: Options, report: Report) -> None:
    """Forward, backward, and both."""
    num_rows, heads, kv_heads, dim = SIZES[options.size]
    case = f"attention {layout} {num_rows}x{heads}/{kv_heads}x{dim}"
    if not re.search(options.only, case):
        return
    batch = Batch(layout, num_rows, options.device)
    generator = torch.Generator(options.device).manual_seed(1)
    leaves = [torch.randn(num_rows, h, dim, generator=generator, device=options.device).to(dtype) for h in (heads, kv_heads, kv_heads)]
    grad = torch.randn(num_rows, heads, dim, generator=generator, device=options.device).to(dtype)
    products = 2 * dim * heads * float(batch.allowed.sum())
    forward = {name: lambda attend=attend: attend(*leaves) for name, attend in implementations(layout, batch, options, False).items()}
    report.compare(case, "forward", dtype, forward, BASELINES, 2 * products)
    for leaf in leaves:
        leaf.requires_grad_()
    trained = implementations(layout, batch, options, True)
    outs = {name: attend(*leaves) for name, attend in trained.items()}
    backward = {name: lambda out=out: torch.autograd.grad(out, leaves, grad, retain_graph=True) for name, out in outs.items()}
    report.compare(case, "backward", dtype, backward, BASELINES, 5 * products)
    both = {name: lambda attend=attend: torch.autograd.grad(attend(*leaves), leaves, grad) for name, attend in trained.items()}
    report.compare(case, "both", dtype, both, BASELINES, 7 * products)


def main(arguments: list[str] | None = None) -> Report:
    """Runs all of it."""
    options = parse(__doc__, arguments)
    report = Report("attention", options)
    for dtype in [torch.bfloat16, *[torch.float32] * (options.size == "cpu")]:
        for layout in PARTS:
            compare(layout, dtype, options, report)
    return report


if __name__ == "__main__":
    sys.exit(not main().rows)
