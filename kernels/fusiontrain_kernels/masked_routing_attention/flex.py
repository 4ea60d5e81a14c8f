"""masked_routing_attention by torch's flex_attention: compiled on a GPU, and uncompiled, with the whole matrix of scores, elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.nn import functional as F

from fusiontrain_kernels.masked_routing_attention.arguments import Arguments
from fusiontrain_kernels.masked_routing_attention.kept import Kept
from fusiontrain_kernels.masked_routing_attention.reference import dense_mask

_BLOCK = 128


def masked_routing_attention(given: Arguments) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See the package. The block mask is made once per `key_ranges` tensor, under torch.compile in every call. Raises ValueError for a gradient
    on the CPU, and for no intervals at all."""
    if given.key_ranges.shape[1] == 0:
        raise ValueError("masked_routing_attention: impl='flex': key_ranges: must have at least one interval a query, not [T, 0, 2]")
    from torch.nn.attention.flex_attention import AuxRequest

    q, k, v = given.held()
    ranges = given.key_ranges.clamp(0, len(q))
    blind = (ranges[..., 0] >= ranges[..., 1]).all(1)
    block_mask = traced_block_mask(given.key_ranges) if torch.compiler.is_compiling() else _block_mask(given.key_ranges)
    options = {"block_mask": block_mask, "scale": given.scale, "enable_gqa": True, "return_aux": AuxRequest(lse=given.return_lse)}
    try:
        out, rest = _torch("flex_attention", q.device.type)(*(tensor.transpose(0, 1)[None] for tensor in (q, k, v)), **options)
    except NotImplementedError as error:  # torch refuses the backward on the CPU
        raise ValueError(f"masked_routing_attention: impl='flex': {error}") from None
    lse = rest.lse[0].masked_fill(blind, -torch.inf) if given.return_lse else None
    return out[0].transpose(0, 1).masked_fill(blind[:, None, None], 0), lse


def _torch(name: str, device: str) -> Callable[..., Any]:
    """A function of torch's: as it is on the CPU, and inside a graph; compiled elsewhere."""
    from torch.nn.attention import flex_attention

    return getattr(flex_attention, name) if device == "cpu" or torch.compiler.is_compiling() else _compiled(name)


@cache
def _compiled(name: str) -> Callable[..., Any]:
    from torch.nn.attention import flex_attention

    return torch.compile(getattr(flex_attention, name), dynamic=False)


def make_block_mask(key_ranges: torch.Tensor) -> Any:
    """The BlockMask of intervals [T, G, 2]."""
    ranges = key_ranges.detach()  # another object: what is kept for key_ranges must not keep it alive
    create = _torch("create_block_mask", ranges.device.type)
    return create(_sees(ranges), None, None, len(ranges), len(ranges), device=ranges.device)


def traced_block_mask(key_ranges: torch.Tensor) -> Any:
    """The same by tensor operations that a graph can hold, which torch's own function cannot be in."""
    from torch.nn.attention.flex_attention import BlockMask

    num_rows = len(key_ranges)
    num_blocks = -(-num_rows // _BLOCK)
    allowed = F.pad(dense_mask(key_ranges), (0, num_blocks * _BLOCK - num_rows) * 2)
    pairs = allowed.view(num_blocks, _BLOCK, num_blocks, _BLOCK).sum((1, 3))
    full = pairs == _BLOCK**2
    kinds = [(pairs > 0) & ~full, full]
    counts = [kind.sum(-1, dtype=torch.int32)[None, None] for kind in kinds]
    places = [kind.int().argsort(dim=-1, descending=True, stable=True).int()[None, None] for kind in kinds]
    return BlockMask.from_kv_blocks(counts[0], places[0], counts[1], places[1], BLOCK_SIZE=_BLOCK, mask_mod=_sees(key_ranges), seq_lengths=(num_rows, num_rows))


def _sees(ranges: torch.Tensor) -> Callable[..., torch.Tensor]:
    """The mask as flex_attention asks for it."""

    def allowed(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        found = (key >= ranges[query, 0, 0]) & (key < ranges[query, 0, 1])
        for g in range(1, ranges.shape[1]):
            found = found | ((key >= ranges[query, g, 0]) & (key < ranges[query, g, 1]))
        return found

    return allowed


_block_mask = Kept(make_block_mask)
