"""Where Triton kernels can run, and what every launch of one has in common. Importable without Triton."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

_tracing_depth = 0


@contextmanager
def tracing_for_a_gpu() -> Iterator[None]:
    """While it is open, Triton's operators may be chosen on any device: for fake tensors, of which only shapes are asked and nothing is launched."""
    global _tracing_depth
    _tracing_depth += 1
    try:
        yield
    finally:
        _tracing_depth -= 1


def obstacle_to_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Triton kernels cannot run there, or None if they can."""
    if not has_triton():
        return "Triton is not installed"
    if device.type == "cuda" or _tracing_depth:
        return None
    if not interpreting():
        return f"Triton kernels run on a GPU, not on {device.type} (or slowly anywhere with TRITON_INTERPRET=1)"
    return "Triton's interpreter computes bfloat16 wrongly" if interprets_wrongly(dtype) else None


@torch.compiler.assume_constant_result
def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, which needs no GPU. Triton reads the variable when a kernel is defined."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")


@torch.compiler.assume_constant_result
def interprets_wrongly(dtype: torch.dtype) -> bool:
    """Whether Triton's interpreter computes with this dtype as no GPU does: it multiplies the bits of bfloat16 as if they were whole numbers."""
    if dtype != torch.bfloat16:
        return False
    from triton.runtime.interpreter import InterpreterBuilder

    return not hasattr(InterpreterBuilder, "rounds_bfloat16")  # our tests mend it


@torch.compiler.assume_constant_result
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def auto_triton(x: torch.Tensor, otherwise: str) -> str:
    """What impl="auto" means for a kernel with a Triton implementation: that one on a GPU, `otherwise` elsewhere."""
    return "triton" if x.is_cuda and has_triton() else otherwise


def require_triton(operator: str, x: torch.Tensor) -> None:
    """Raises ValueError where impl="triton" cannot run on `x`."""
    why_not = obstacle_to_triton(x.device, x.dtype)
    if why_not:
        raise ValueError(f"{operator}: impl='triton': {why_not}: choose another impl")


@cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def architecture(x: torch.Tensor) -> int:
    """Compute capability of x's GPU (90 for an H100), 0 for the interpreter."""
    return _capability(x.device.index) if x.is_cuda else 0


def nearest(table: dict[int, dict], capability: int) -> dict:
    """The row of a table of configs for this architecture: its own, or the highest one below."""
    return table[max(known for known in table if known <= capability)]


def device_offsets(bounds: Sequence[int] | None, offsets: torch.Tensor | None, num_weights: int, x: torch.Tensor, operator: str) -> torch.Tensor:
    """`offsets` if given, else `bounds` on x's device: [M + 1] int32. A caller with many launches should make them once.

    Raises ValueError if their number does not fit; their values stay on the device and are not read. `bounds` are filled in there, since a
    copy from ordinary host memory would wait for all that the device has yet to do.
    """
    if offsets is None:
        assert bounds is not None
        return torch.stack([x.new_full((), bound, dtype=torch.int32) for bound in bounds])
    if offsets.shape != (num_weights + 1,) or offsets.dtype != torch.int32 or offsets.device != x.device:
        raise ValueError(f"{operator}: offsets: must be int32 [{num_weights + 1}] on {x.device}, not {offsets.dtype} {list(offsets.shape)} on {offsets.device}")
    return offsets.contiguous()


def unit_stride(x: torch.Tensor) -> torch.Tensor:
    """x itself if the elements of its rows are neighbours in memory, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def same_strides(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors with neighbouring elements in a row and one distance between rows, which is all that a launch is told. Copies where they differ."""
    tensors = [unit_stride(x) for x in tensors]
    alike = all(x.stride(0) == tensors[0].stride(0) for x in tensors)
    return tensors if alike else [x.contiguous() for x in tensors]


def on_device(x: torch.Tensor) -> torch.cuda.device_of:
    """A context in which kernels are launched on x's GPU, whichever one is current outside."""
    return torch.cuda.device_of(x)


def accumulator(x: torch.Tensor) -> Any:
    """The Triton dtype of sums over x's elements: float64 for float64, else float32."""
    import triton.language as tl

    return tl.float64 if x.dtype == torch.float64 else tl.float32
