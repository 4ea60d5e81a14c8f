"""What happens to queries and keys between their projections and attention: a norm of every head, then rotary positions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from fusiontrain_kernels._dispatch import choose
from fusiontrain_kernels._launch import auto_triton, device_offsets, require_triton
from fusiontrain_kernels._segments import check_bounds, check_like, check_weights
from fusiontrain_kernels.qk_norm_rope import eager, reference

Weights = Sequence[torch.Tensor]
Bounds = tuple[int, ...]


def qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weights: Weights | None,
    k_weights: Weights | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    bounds: Bounds,
    eps: float,
    *,
    offsets: torch.Tensor | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMS norm of every head (QK-norm: Henry et al., arXiv 2010.04245; Chameleon, arXiv 2405.09818) and rotary positions, rotate-half.

    `y = weights[m] * x / sqrt(mean(x^2) + eps)` over the Dh elements of a head in a row with `bounds[m] <= row < bounds[m + 1]`, then the
    pairs (y[i], y[i + Dh / 2]) turned by the row's angles. Rounding is that of `rms_norm`.

    q [T, H, Dh] and k [T, K, Dh], Dh even; q_weights and k_weights: M tensors [Dh] each, or None for no norm; cos and sin [T, Dh], both
    halves carrying the same angles; all of q's dtype. bounds: M + 1 host numbers from 0 to T. offsets [M + 1] int32 on q's device: the same
    numbers; with them triton, and the others under torch.compile, read no bounds. Returns the new q and k, contiguous. A modality without rows
    gets zero gradients, not None.

    impl: auto (triton on a GPU, else eager), reference, eager (the same bits with fewer passes over memory; no second derivative and no gradient for
    cos and sin), triton (turns in float32 at least and rounds once; keeps q and k alone for the
    backward, and not even them where nothing is normed; no gradient for cos and sin).
    Raises ValueError for another impl, one that cannot run here, bounds that do not fit, and (triton) tensors that do not fit each other.
    """
    turn = choose("qk_norm_rope", IMPLEMENTATIONS, impl, auto=auto_triton(q, "eager"))
    for name, heads in [("q", q), ("k", k)]:
        check_heads("qk_norm_rope", name, heads)
    if offsets is None and turn is _triton and (q_weights or k_weights):
        check_bounds("qk_norm_rope", bounds, len(q_weights or k_weights or ()), len(q))
        offsets = device_offsets(bounds, None, len(bounds) - 1, q, "qk_norm_rope")
    rest = (cos, sin, bounds, eps, offsets)
    return turn("qk_norm_rope", q, q_weights, *rest), turn("qk_norm_rope", k, k_weights, *rest)


def check_heads(operator: str, name: str, x: torch.Tensor) -> None:
    """Raises ValueError unless x is [T, H, Dh] and its heads have two halves."""
    if x.dim() != 3 or x.shape[2] % 2:
        raise ValueError(f"{operator}: {name}: must be [T, H, Dh] with an even Dh, not {list(x.shape)}")


def _triton(
    operator: str,
    x: torch.Tensor,
    weights: Weights | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    bounds: Bounds,
    eps: float,
    offsets: torch.Tensor | None,
) -> torch.Tensor:
    require_triton(operator, x)
    from fusiontrain_kernels.qk_norm_rope import triton_ops

    num_rows, _, dim = x.shape
    for name, angles in [("cos", cos), ("sin", sin)]:
        check_like(operator, name, angles, (num_rows, dim), x)
    if not weights:
        return triton_ops.norm_rope(x, [], cos, sin, None, eps)
    check_weights(operator, "weights", weights, (dim,), x)
    return triton_ops.norm_rope(x, list(weights), cos, sin, device_offsets(bounds, offsets, len(weights), x, operator), eps)


IMPLEMENTATIONS: Mapping[str, Callable[..., torch.Tensor]] = {"reference": reference.norm_rope, "eager": eager.norm_rope, "triton": _triton}
"""Of one tensor: (name for errors, x, weights, cos, sin, bounds, eps, offsets) -> turned x."""
