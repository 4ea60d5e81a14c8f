"""Which implementations every operator has, which of them can run on a device and why the others cannot, and which is best there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module

import torch

from fusiontrain_kernels._launch import has_triton, interpreting

PLAIN: Mapping[str, str] = {
    "masked_routing_attention": "chunked",
    "modality_gemm": "segments",
    "rms_norm": "reference",
    "rope": "reference",
    "swiglu": "reference",
    "linear_cross_entropy": "chunked",
}
"""Every operator, and its best implementation that needs PyTorch alone and runs everywhere."""


def implementations(operator: str) -> tuple[str, ...]:
    """The names that the operator's `impl` takes, without "auto"."""
    return tuple(import_module(f"fusiontrain_kernels.{operator}")._IMPLEMENTATIONS)


def obstacle(operator: str, name: str, device: torch.device, dtype: torch.dtype = torch.float32, widths: Sequence[int] = ()) -> str | None:
    """Why this implementation cannot run there, or None if it can.

    dtype: of the rows. widths: head dims for the attention, numbers of features in and out for modality_gemm; nothing is asked of them if empty.
    """
    check = _OBSTACLES.get(name)
    return check(operator, device, dtype, widths) if check else None


def best(operator: str, device: torch.device, dtype: torch.dtype = torch.float32, widths: Sequence[int] = ()) -> tuple[str, str]:
    """What "auto" stands for on a device, and why, in a few words: triton on a GPU where it can run, else the best plain one."""
    if device.type != "cuda":
        return PLAIN[operator], f"the best on {device.type}"
    why_not = obstacle(operator, "triton", device, dtype, widths)
    return (PLAIN[operator], f"triton cannot: {why_not}") if why_not else ("triton", "the best on cuda")


def _triton(operator: str, device: torch.device, dtype: torch.dtype, widths: Sequence[int]) -> str | None:
    if not has_triton():
        return "Triton is not installed"
    if device.type != "cuda" and not interpreting():
        return f"Triton kernels run on a GPU, not on {device.type} (or slowly anywhere with TRITON_INTERPRET=1)"
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


_OBSTACLES: Mapping[str, Callable[[str, torch.device, torch.dtype, Sequence[int]], str | None]] = {"triton": _triton, "grouped_mm": _grouped_mm}
"""By implementation. Those that are not named here run everywhere."""
