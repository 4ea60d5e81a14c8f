"""`torch.nn.functional.grouped_mm`: one launch of PyTorch's own, at the price of stacking the weights in every call.

Under torch.compile torch takes bfloat16 alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F


def check(x: torch.Tensor, width: int) -> None:
    """Raises ValueError where grouped_mm is missing or would refuse x."""
    if not hasattr(F, "grouped_mm"):
        raise ValueError(f"modality_gemm: impl='grouped_mm': torch {torch.__version__} has no torch.nn.functional.grouped_mm: choose another impl")
    if x.dtype == torch.float64:
        raise ValueError("modality_gemm: impl='grouped_mm': it has no float64: choose another impl")
    if x.dtype != torch.bfloat16 and torch.compiler.is_compiling():
        raise ValueError(f"modality_gemm: impl='grouped_mm': under torch.compile torch takes bfloat16 alone, not {x.dtype}: choose another impl")
    size = x.element_size()
    if x.shape[1] * size % 16 or width * size % 16:
        raise ValueError(f"modality_gemm: impl='grouped_mm': rows of {x.shape[1]} and {width} {x.dtype} must be multiples of 16 bytes: choose another impl")


def modality_gemm(x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None] | None, offsets: torch.Tensor) -> torch.Tensor:
    """See the package."""
    check(x, len(weights[0]))
    if x.stride(1) != 1 or x.stride(0) * x.element_size() % 16 or x.storage_offset() * x.element_size() % 16:
        x = x.clone(memory_format=torch.contiguous_format)
    out = F.grouped_mm(x, torch.stack(list(weights)).transpose(1, 2), offs=offsets[1:])
    if biases is None or all(bias is None for bias in biases):
        return out
    table = torch.stack([weights[0].new_zeros(out.shape[1]) if bias is None else bias for bias in biases])
    owners = torch.searchsorted(offsets[1:], torch.arange(len(x), dtype=offsets.dtype, device=x.device), right=True)
    return out + table[owners]
