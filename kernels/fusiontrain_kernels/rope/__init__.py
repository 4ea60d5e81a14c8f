"""Rotary position embedding (Su et al., arXiv 2104.09864) in Hugging Face's rotate-half convention."""

from __future__ import annotations

import torch

from fusiontrain_kernels._dispatch import choose
from fusiontrain_kernels.rope import reference

_IMPLEMENTATIONS = {"reference": reference.rope}


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, impl: str = "auto") -> torch.Tensor:
    """Turn the pairs (x[i], x[i + Dh / 2]) of every head by the row's angles.

    x [T, H, Dh], Dh even; cos and sin [T, Dh] in x's dtype, both halves carrying the same angles. Returns [T, H, Dh].
    impl: auto, reference. Raises ValueError for another impl.
    """
    return choose("rope", _IMPLEMENTATIONS, impl, auto="reference")(x, cos, sin)
