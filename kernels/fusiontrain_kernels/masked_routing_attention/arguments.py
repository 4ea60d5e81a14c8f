"""What every implementation of masked_routing_attention is handed, checked once."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Arguments(NamedTuple):
    """As the package says; an implementation takes these and returns (out, lse), lse None where it was not asked for."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    key_ranges: torch.Tensor
    query_ranges: torch.Tensor
    scale: float
    grad_rows: torch.Tensor | None = None
    return_lse: bool = False

    def check(self) -> None:
        """Raises ValueError for tensors that do not fit together."""
        q, k, v = self.q, self.k, self.v
        if q.dim() != 3 or 0 in q.shape[1:] or not q.is_floating_point():
            raise ValueError(f"masked_routing_attention: q must be [T, H, Dh] of floating-point numbers with H and Dh > 0, not {q.dtype} {list(q.shape)}")
        num_rows, num_heads, head_dim = q.shape
        fits = k.dim() == 3 and k.shape == v.shape and (len(k), k.shape[2]) == (num_rows, head_dim) and k.shape[1] > 0
        if not fits or num_heads % k.shape[1]:
            raise ValueError(
                f"masked_routing_attention: k and v must be [{num_rows}, K, {head_dim}], K a divisor of {num_heads}, as q is {list(self.q.shape)}, "
                f"not {list(k.shape)} and {list(v.shape)}"
            )
        if not q.dtype == k.dtype == v.dtype:
            raise ValueError(f"masked_routing_attention: q, k and v must have one dtype, not {q.dtype}, {k.dtype} and {v.dtype}")
        others = {"k": k, "v": v, "key_ranges": self.key_ranges, "query_ranges": self.query_ranges, "grad_rows": self.grad_rows}
        for name, tensor in others.items():
            if tensor is not None and tensor.device != q.device:
                raise ValueError(f"masked_routing_attention: {name} must be on {q.device} like q, not on {tensor.device}")
        for name, ranges in (("key_ranges", self.key_ranges), ("query_ranges", self.query_ranges)):
            if ranges.dim() != 3 or (len(ranges), ranges.shape[2]) != (num_rows, 2) or ranges.dtype != torch.int32:
                raise ValueError(f"masked_routing_attention: {name} must be int32 [{num_rows}, G, 2], not {ranges.dtype} {list(ranges.shape)}")
        rows = self.grad_rows
        if rows is not None and (rows.dim() != 2 or rows.shape[1] != 2 or rows.dtype != torch.int32):
            raise ValueError(f"masked_routing_attention: grad_rows must be int32 [N, 2], not {rows.dtype} {list(rows.shape)}")

    def held(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k and v such that autograd gives the rows outside `grad_rows` zeros."""
        if self.grad_rows is None:
            return self.q, self.k, self.v
        wanted = wanted_rows(self.grad_rows, len(self.q))[:, None, None]
        q, k, v = (torch.where(wanted, tensor, tensor.detach()) for tensor in (self.q, self.k, self.v))
        return q, k, v


def wanted_rows(grad_rows: torch.Tensor, num_rows: int) -> torch.Tensor:
    """[N, 2] -> [T] bool, whether a row is in any of the intervals."""
    rows = torch.arange(num_rows, device=grad_rows.device)[:, None]
    return ((rows >= grad_rows[:, 0]) & (rows < grad_rows[:, 1])).any(1)
