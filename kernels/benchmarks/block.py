"""A transformer block whose rows are routed in one of several ways. Attention is causal over documents of 1,024 rows and the same in all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from fusiontrain_kernels.modality_gemm import modality_gemm, modality_swiglu
from fusiontrain_kernels.qk_norm_rope import qk_norm_rope
from fusiontrain_kernels.rms_norm import add_rms_norm, rms_norm

EPS = 1e-5
Weights = dict[str, list[torch.Tensor]]


@dataclass(frozen=True)
class Shape:
    """T rows, model and feed-forward width, heads and key heads."""

    num_rows: int
    dim: int
    ffn: int
    heads: int
    kv_heads: int

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Outer and inner width of each product."""
        dim, ffn, kv = self.dim, self.ffn, self.dim * self.kv_heads // self.heads
        return {"q": (dim, dim), "k": (kv, dim), "v": (kv, dim), "o": (dim, dim), "gate": (ffn, dim), "up": (ffn, dim), "down": (dim, ffn)}

    def flops(self) -> int:
        """Of the products of one forward; attention left out."""
        return sum(2 * self.num_rows * width * inner for width, inner in self.matrices().values())


@dataclass(frozen=True)
class Contiguous:
    """Rows lie modality by modality; `impl` is that of every operator. One modality is a dense block."""

    bounds: tuple[int, ...]
    offsets: torch.Tensor
    impl: str

    def attention_in(self, x: torch.Tensor, w: Weights) -> list[torch.Tensor]:
        """-> q, k, v."""
        normed = rms_norm(x, w["norm"], self.bounds, EPS, offsets=self.offsets, impl=self.rowwise())
        return [self.linear(normed, w[name]) for name in ("q", "k", "v")]

    def rest(self, x: torch.Tensor, attended: torch.Tensor, w: Weights) -> torch.Tensor:
        """Output projection, residual, feed-forward, residual."""
        normed, x = add_rms_norm(self.linear(attended, w["o"]), x, w["norm2"], self.bounds, EPS, offsets=self.offsets, impl=self.rowwise())
        return x + self.linear(modality_swiglu(normed, w["gate"], w["up"], self.bounds, offsets=self.offsets, impl=self.impl), w["down"])

    def linear(self, x: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
        """One product."""
        return modality_gemm(x, weights, self.bounds, offsets=self.offsets, impl=self.impl)

    def rowwise(self) -> str:
        """The implementation of what is no product. On a GPU both sides have the Triton one, so that products alone differ."""
        return "triton" if self.impl == "triton" else "auto"


@dataclass(frozen=True)
class Boolean:
    """Rows are gathered by masks before, and put back after, each half of the block, as published with Mixture-of-Transformers."""

    masks: tuple[torch.Tensor, ...]

    def attention_in(self, x: torch.Tensor, w: Weights) -> list[torch.Tensor]:
        """-> q, k, v."""
        parts = [rms_norm(x[mask], [w["norm"][m]], (0, len(x[mask])), EPS) for m, mask in enumerate(self.masks)]
        return [self.merge([F.linear(part, w[name][m]) for m, part in enumerate(parts)], x) for name in ("q", "k", "v")]

    def rest(self, x: torch.Tensor, attended: torch.Tensor, w: Weights) -> torch.Tensor:
        """Output projection, residual, feed-forward, residual."""
        x = x + self.merge([F.linear(attended[mask], w["o"][m]) for m, mask in enumerate(self.masks)], x)
        outs = []
        for m, mask in enumerate(self.masks):
            rows = x[mask]
            normed = rms_norm(rows, [w["norm2"][m]], (0, len(rows)), EPS)
            outs.append(F.linear(F.silu(F.linear(normed, w["gate"][m])) * F.linear(normed, w["up"][m]), w["down"][m]))
        return x + self.merge(outs, x)

    def merge(self, parts: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """Rows back in their places."""
        out = x.new_empty(len(x), parts[0].shape[1])
        for mask, part in zip(self.masks, parts, strict=True):
            out[mask] = part
        return out


Route = Contiguous | Boolean


def routes(shape: Shape, device: torch.device, with_triton: bool, masks: tuple[torch.Tensor, ...]) -> Iterator[tuple[str, Route]]:
    """By name, the dense one first."""
    for name, bounds in [("dense", (0, shape.num_rows)), ("segments", (0, shape.num_rows // 2, shape.num_rows))]:
        offsets = torch.tensor(bounds, dtype=torch.int32, device=device)
        yield name, Contiguous(bounds, offsets, "segments")
        if name == "segments" and with_triton:
            yield "triton", Contiguous(bounds, offsets, "triton")
    yield "boolean", Boolean(masks)


def both_passes(shape: Shape, route: Route, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    """Forward and backward of one block, all weights trained."""
    modalities = len(route.bounds) - 1 if isinstance(route, Contiguous) else len(route.masks)
    generator = torch.Generator(device).manual_seed(1)

    def leaf(*size: int, scale: float) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device).mul_(scale).to(dtype).requires_grad_()

    w = {name: [leaf(*size, scale=size[1] ** -0.5) for _ in range(modalities)] for name, size in shape.matrices().items()}
    w |= {name: [leaf(shape.dim, scale=1.0) for _ in range(modalities)] for name in ("norm", "norm2")}
    x, grad = leaf(shape.num_rows, shape.dim, scale=1.0), leaf(shape.num_rows, shape.dim, scale=1.0).detach()
    head_dim = shape.dim // shape.heads
    angles = torch.arange(shape.num_rows, device=device)[:, None] * 0.5 ** torch.arange(head_dim // 2, device=device).repeat(2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    leaves = [x, *(weight for weights in w.values() for weight in weights)]

    def run() -> object:
        q, k, v = (part.unflatten(1, (-1, head_dim)) for part in route.attention_in(x, w))
        q, k = qk_norm_rope(q, k, None, None, cos, sin, (0, len(x)), EPS)
        documents = [part.unflatten(0, (-1, min(1024, len(x)))).transpose(1, 2) for part in (q, k, v)]
        attended = F.scaled_dot_product_attention(*documents, is_causal=True, enable_gqa=True)
        return torch.autograd.grad(route.rest(x, attended.transpose(1, 2).flatten(2).flatten(0, 1), w), leaves, grad)

    return run
