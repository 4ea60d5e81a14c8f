"""The specification of swiglu."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """See the package."""
    return F.silu(gate) * up
