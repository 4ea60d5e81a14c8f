"""One matrix product per modality, over rows that lie modality by modality."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fusiontrain_kernels._dispatch import choose
from fusiontrain_kernels._launch import auto_triton, device_offsets, require_triton
from fusiontrain_kernels._segments import check_bounds, check_weights, without_none
from fusiontrain_kernels.modality_gemm import grouped, reference, segments
from fusiontrain_kernels.swiglu import swiglu

Weights = Sequence[torch.Tensor]
Biases = Sequence[torch.Tensor | None]
Bounds = tuple[int, ...]


def modality_gemm(
    x: torch.Tensor,
    weights: Weights,
    bounds: Bounds,
    biases: Biases | None = None,
    *,
    offsets: torch.Tensor | None = None,
    main_grads: Biases | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """`out[r] = x[r] @ weights[m].T + biases[m]` where row r lies in `bounds[m] <= r < bounds[m + 1]`.

    x [T, Kin]; weights: M tensors [N, Kin]; bounds: M + 1 host numbers from 0 to T, never decreasing; biases: M tensors [N] or None.
    offsets [M + 1] int32 on x's device (segments: on the CPU, or they are not used): the same numbers. With them bounds are not read, so that
    torch.compile does not specialise on a routing, and nothing is copied to the device. Returns [T, N].

    Only weights that require a gradient get one computed (grouped_mm: all, if any); a modality without rows gets zeros, not None.
    main_grads (triton only, without biases): M tensors [N, Kin], float32 for example, None where the weight is frozen. The backward adds the
    weights' gradients to them and leaves the weights' own `.grad` alone.

    impl: auto (triton on a GPU, else segments), reference, segments (one ATen GEMM per modality; no second derivative), grouped_mm
    (torch.nn.functional.grouped_mm, weights stacked in every call; no second derivative), triton.
    Raises ValueError for an unknown impl, one that cannot run here, bounds that do not fit, and tensors that do not fit each other.
    """
    implementation = choose("modality_gemm", _IMPLEMENTATIONS, impl, auto=auto_triton(x, "segments"))
    shape = _check_weights("modality_gemm", "weights", weights, x)
    if biases is not None:
        _check_count("modality_gemm", "biases", biases, weights)
        check_weights("modality_gemm", "biases", biases, shape[:1], x)
    if main_grads is not None and implementation is not _triton:
        raise ValueError("modality_gemm: main_grads: only impl='triton' adds to them")
    return implementation(x, weights, bounds, biases, offsets, main_grads)


def modality_swiglu(x: torch.Tensor, gates: Weights, ups: Weights, bounds: Bounds, *, offsets: torch.Tensor | None = None, impl: str = "auto") -> torch.Tensor:
    """`silu(modality_gemm(x, gates)) * modality_gemm(x, ups)`: the first half of a feed-forward, [T, Kin] -> [T, N].

    gates and ups: M tensors [N, Kin] each; bounds, offsets and errors as for `modality_gemm`. impl: auto (triton on a GPU, else segments),
    reference, segments, grouped_mm, triton (both products and the activation in one launch).
    """
    name = auto_triton(x, "segments") if impl == "auto" else impl
    choose("modality_swiglu", _IMPLEMENTATIONS, name, auto=name)
    shape = _check_weights("modality_swiglu", "gates", gates, x)
    _check_count("modality_swiglu", "ups", ups, gates)
    check_weights("modality_swiglu", "ups", ups, shape, x)
    if name == "triton":
        return _triton_swiglu(x, gates, ups, bounds, offsets)
    gate = modality_gemm(x, gates, bounds, offsets=offsets, impl=name)
    up = modality_gemm(x, ups, bounds, offsets=offsets, impl=name)
    return swiglu(gate, up, impl="reference" if name == "reference" else "auto")


def _check_weights(operator: str, name: str, weights: Weights, x: torch.Tensor) -> tuple[int, ...]:
    """-> the shape [N, Kin] that all of them have. Raises ValueError if they have not."""
    if x.dim() != 2:
        raise ValueError(f"{operator}: x: must be [T, Kin], not {list(x.shape)}")
    if len(weights) == 0 or weights[0].dim() != 2:
        raise ValueError(f"{operator}: {name}: must be at least one tensor [N, {x.shape[1]}], not {[list(weight.shape) for weight in weights]}")
    shape = (weights[0].shape[0], x.shape[1])
    check_weights(operator, name, weights, shape, x)
    return shape


def _check_count(operator: str, name: str, tensors: Biases, weights: Weights) -> None:
    if len(tensors) != len(weights):
        raise ValueError(f"{operator}: {name}: {len(tensors)} for {len(weights)} modalities: one for each")


def _reference(x: torch.Tensor, weights: Weights, bounds: Bounds, biases: Biases | None, offsets: torch.Tensor | None, main_grads: object) -> torch.Tensor:
    return reference.modality_gemm(x, weights, bounds, biases, offsets)


def _segments(x: torch.Tensor, weights: Weights, bounds: Bounds, biases: Biases | None, offsets: torch.Tensor | None, main_grads: object) -> torch.Tensor:
    return segments.modality_gemm(x, weights, bounds, biases, offsets)


def _grouped(x: torch.Tensor, weights: Weights, bounds: Bounds, biases: Biases | None, offsets: torch.Tensor | None, main_grads: object) -> torch.Tensor:
    return grouped.modality_gemm(x, weights, biases, _offsets(x, weights, bounds, offsets))


def _offsets(x: torch.Tensor, weights: Weights, bounds: Bounds, offsets: torch.Tensor | None) -> torch.Tensor:
    if offsets is None:
        check_bounds("modality_gemm", bounds, len(weights), len(x))
    return device_offsets(bounds, offsets, len(weights), x, "modality_gemm")


def _triton(x: torch.Tensor, weights: Weights, bounds: Bounds, biases: Biases | None, offsets: torch.Tensor | None, main_grads: Biases | None) -> torch.Tensor:
    require_triton("modality_gemm", x)
    from fusiontrain_kernels.modality_gemm import triton_ops

    if main_grads is not None:
        _check_main_grads(main_grads, weights, biases)
    into = [] if main_grads is None else [weight if grad is None else grad for weight, grad in zip(weights, main_grads, strict=True)]
    return triton_ops.gemm(x, list(weights), without_none(biases, weights), _offsets(x, weights, bounds, offsets), into)


def _check_main_grads(main_grads: Biases, weights: Weights, biases: Biases | None) -> None:
    if biases is not None or len(main_grads) != len(weights):
        raise ValueError(f"modality_gemm: main_grads: {len(main_grads)} for {len(weights)} weights: one per weight, and no biases")
    dtypes = {str(grad.dtype) for grad in main_grads if grad is not None}
    if len(dtypes) > 1:
        raise ValueError(f"modality_gemm: main_grads: must have one dtype, not {' and '.join(sorted(dtypes))}")
    for m, (grad, weight) in enumerate(zip(main_grads, weights, strict=True)):
        if grad is None and weight.requires_grad:
            raise ValueError(f"modality_gemm: main_grads[{m}]: is None though weights[{m}] requires a gradient: pass a tensor to add it to")
        if grad is not None and (grad.shape != weight.shape or grad.device != weight.device or not grad.is_contiguous()):
            raise ValueError(f"modality_gemm: main_grads[{m}]: must be contiguous {list(weight.shape)} on {weight.device}, like its weight")


def _triton_swiglu(x: torch.Tensor, gates: Weights, ups: Weights, bounds: Bounds, offsets: torch.Tensor | None) -> torch.Tensor:
    require_triton("modality_swiglu", x)
    from fusiontrain_kernels.modality_gemm import triton_ops

    return triton_ops.gemm_swiglu(x, list(gates), list(ups), _offsets(x, gates, bounds, offsets))[0]


_IMPLEMENTATIONS = {"reference": _reference, "segments": _segments, "grouped_mm": _grouped, "triton": _triton}
