"""The gated activation of a Llama feed-forward (Shazeer, arXiv 2002.05202)."""

from __future__ import annotations

import torch

from fusiontrain_kernels._dispatch import choose
from fusiontrain_kernels.swiglu import reference

_IMPLEMENTATIONS = {"reference": reference.swiglu}


def swiglu(gate: torch.Tensor, up: torch.Tensor, *, impl: str = "auto") -> torch.Tensor:
    """`silu(gate) * up`, elementwise; both [T, F] of one dtype -> [T, F]. impl: auto, reference. Raises ValueError for another impl."""
    return choose("swiglu", _IMPLEMENTATIONS, impl, auto="reference")(gate, up)
