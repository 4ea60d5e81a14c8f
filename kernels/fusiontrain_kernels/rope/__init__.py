"""Rotary position embedding (Su et al., arXiv 2104.09864) in Hugging Face's rotate-half convention: `qk_norm_rope` of one tensor, without the norm."""

from __future__ import annotations

import torch

from fusiontrain_kernels._dispatch import choose
from fusiontrain_kernels._launch import auto_triton
from fusiontrain_kernels.qk_norm_rope import IMPLEMENTATIONS, check_heads


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, impl: str = "auto") -> torch.Tensor:
    """Turn the pairs (x[i], x[i + Dh / 2]) of every head by the row's angles.

    x [T, H, Dh], Dh even; cos and sin [T, Dh] in x's dtype, both halves carrying the same angles. Returns [T, H, Dh].
    impl: auto (triton on a GPU, else eager), reference, eager and triton (no gradient for cos and sin; triton rounds once, at the end).
    Raises ValueError for another impl, where triton cannot run, and for an odd Dh.
    """
    turn = choose("rope", IMPLEMENTATIONS, impl, auto=auto_triton(x, "eager"))
    check_heads("rope", "x", x)
    return turn("rope", x, None, cos, sin, (0, len(x)), 0.0, None)
