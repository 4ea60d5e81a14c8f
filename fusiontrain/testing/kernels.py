"""What tests of Triton kernels need: bfloat16 in the interpreter, and outputs with guards around them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch

GUARD = 128  # elements before and behind an output


def round_bfloat16_in_the_interpreter() -> None:
    """Make the interpreter compute bfloat16 as a GPU does: products of values, not of bit patterns, and casts to the nearest even.

    As it comes it stores bfloat16 as uint16, multiplies those, and truncates in casts.
    """
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    if hasattr(InterpreterBuilder, "rounds_bfloat16"):
        return
    dot, cast, binary = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl, InterpreterBuilder.binary_op

    def is_bits(handle: Any) -> bool:
        return handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.uint16

    def widen(handle: Any) -> Any:
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32) if is_bits(handle) else handle

    def narrow(values: np.ndarray) -> Any:
        bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return TensorHandle(np.where(np.isnan(values), np.uint16(0x7FC0), rounded), tl.bfloat16)

    def create_dot(self: Any, a: Any, b: Any, acc: Any, *rest: Any) -> Any:
        return dot(self, widen(a), widen(b), acc, *rest)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if is_bits(source) and target.scalar != tl.bfloat16:
            return widen(source) if target.scalar == tl.float32 else cast(self, widen(source), target)
        if target.scalar == tl.bfloat16 and source.dtype.scalar != tl.bfloat16:
            return narrow(source.data.astype(np.float32))
        return cast(self, source, target)

    def binary_op(self: Any, left: Any, right: Any, op: Any) -> Any:
        if not (is_bits(left) and is_bits(right)):
            return binary(self, left, right, op)
        out = binary(self, widen(left), widen(right), op)
        return narrow(out.data) if out.data.dtype == np.float32 else out

    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl, InterpreterBuilder.binary_op = create_dot, cast_impl, binary_op
    InterpreterBuilder.rounds_bfloat16 = True


@contextmanager
def guarded_outputs() -> Iterator[None]:
    """Tensors from `Tensor.new_empty` begin as NaN inside guard bands; AssertionError at the end if anything was written around one."""
    buffers: list[tuple[torch.Tensor, int]] = []
    new_empty = torch.Tensor.new_empty

    def guarded(self: torch.Tensor, *size: Any, dtype: torch.dtype | None = None, **options: Any) -> torch.Tensor:
        size = tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size
        dtype = self.dtype if dtype is None else dtype
        if not dtype.is_floating_point:
            return new_empty(self, size, dtype=dtype, **options)
        count = int(np.prod(size))
        buffer = new_empty(self, (count + 2 * GUARD,), dtype=dtype, **options).fill_(float("nan"))
        buffers.append((buffer, count))
        return buffer[GUARD : GUARD + count].view(size)

    with mock.patch.object(torch.Tensor, "new_empty", guarded):
        yield
    assert buffers, "no output was allocated with new_empty: nothing was guarded"
    for buffer, count in buffers:
        assert bool(buffer[:GUARD].isnan().all() and buffer[GUARD + count :].isnan().all()), "a kernel wrote beside its output"
