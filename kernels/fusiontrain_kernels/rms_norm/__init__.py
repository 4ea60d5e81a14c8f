"""RMS norm (Zhang and Sennrich, arXiv 1910.07467) with a weight per modality."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fusiontrain_kernels._dispatch import choose
from fusiontrain_kernels.rms_norm import reference

_IMPLEMENTATIONS = {"reference": reference.rms_norm}


def rms_norm(x: torch.Tensor, weights: Sequence[torch.Tensor], bounds: tuple[int, ...], eps: float, *, impl: str = "auto") -> torch.Tensor:
    """`out[r] = weights[m] * x[r] / sqrt(mean(x[r]^2) + eps)` where row r lies in `bounds[m] <= r < bounds[m + 1]`.

    x [T, D]; weights: M tensors [D]; bounds: M + 1 host numbers from 0 to T, never decreasing. Returns [T, D]. The mean is taken in
    float32 at least, and the normed row is rounded to x's dtype before the weight, as Hugging Face's LlamaRMSNorm does.
    A modality without rows gets a zero gradient, not None. impl: auto, reference.
    Raises ValueError for an unknown impl and for bounds that do not fit.
    """
    return choose("rms_norm", _IMPLEMENTATIONS, impl, auto="reference")(x, weights, bounds, eps)
