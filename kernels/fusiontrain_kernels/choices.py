"""Which implementations every operator has, which of them can run on a device and why the others cannot, and which is best there."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence

import torch

from fusiontrain_kernels._launch import obstacle_to_triton

IMPLEMENTATIONS: Mapping[str, tuple[str, ...]] = {
    "masked_routing_attention": ("chunked", "sdpa", "flex", "flash", "triton", "reference"),
    "modality_gemm": ("segments", "grouped_mm", "triton", "reference"),
    "rms_norm": ("eager", "reference", "triton"),
    "qk_norm_rope": ("eager", "reference", "triton"),
    "rope": ("eager", "reference", "triton"),
    "swiglu": ("reference", "triton"),
    "linear_cross_entropy": ("chunked", "triton", "reference"),
}
"""Every operator, and the names that its `impl` takes besides "auto". The first needs PyTorch alone and runs everywhere."""


def obstacle(operator: str, name: str, device: torch.device, dtype: torch.dtype = torch.float32, widths: Sequence[int] = ()) -> str | None:
    """Why this implementation cannot run there, or None if it can.

    dtype: of the rows. widths: head dims for the attention, numbers of features in and out for modality_gemm; nothing is asked of them if empty.
    """
    check = _OBSTACLES.get(name)
    return check(operator, device, dtype, widths) if check else None


def best(operator: str, device: torch.device, dtype: torch.dtype = torch.float32, widths: Sequence[int] = ()) -> tuple[str, str]:
    """What "auto" stands for on a device, and why, in a few words: triton on a GPU where it can run, else the first."""
    plain = IMPLEMENTATIONS[operator][0]
    if device.type != "cuda":
        return plain, f"the best on {device.type}"
    why_not = obstacle(operator, "triton", device, dtype, widths)
    return (plain, f"triton cannot: {why_not}") if why_not else ("triton", "the best on cuda")


def _triton(operator: str, device: torch.device, dtype: torch.dtype, widths: Sequence[int]) -> str | None:
    why_not = obstacle_to_triton(device, dtype)
    if why_not:
        return why_not
    if operator == "masked_routing_attention":
        from fusiontrain_kernels.masked_routing_attention.configs import HEAD_DIMS

        if widths and max(widths) > max(HEAD_DIMS):
            return f"there are no tiles for a head dim of {max(widths)}, at most {max(HEAD_DIMS)}"
    return None


def _grouped_mm(operator: str, device: torch.device, dtype: torch.dtype, widths: Sequence[int]) -> str | None:
    if not hasattr(torch.nn.functional, "grouped_mm"):
        return f"torch {torch.__version__} has no torch.nn.functional.grouped_mm"
    if dtype == torch.float64:
        return "it has no float64"
    uneven = [width for width in widths if width * dtype.itemsize % 16]
    return f"rows of {uneven[0]} {str(dtype).removeprefix('torch.')} numbers are no multiple of 16 bytes" if uneven else None


def _flex(operator: str, device: torch.device, dtype: torch.dtype, widths: Sequence[int]) -> str | None:
    return "torch's flex_attention has no gradient on the CPU" if device.type == "cpu" else None


def _flash(operator: str, device: torch.device, dtype: torch.dtype, widths: Sequence[int]) -> str | None:
    """What the mask must be like shows at the first batch only."""
    if importlib.util.find_spec("flash_attn") is None:
        return "the package flash-attn is not installed"
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return f"flash-attn computes in bfloat16 or float16 on a GPU, not in {str(dtype).removeprefix('torch.')} on {device.type}"
    return None


_OBSTACLES: Mapping[str, Callable[[str, torch.device, torch.dtype, Sequence[int]], str | None]] = {
    "triton": _triton,
    "grouped_mm": _grouped_mm,
    "flex": _flex,
    "flash": _flash,
}
"""By implementation. Those that are not named here run everywhere."""
