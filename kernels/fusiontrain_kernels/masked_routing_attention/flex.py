"""masked_routing_attention by torch's flex_attention: compiled on a GPU, and uncompiled, with the whole matrix of scores, elsewhere."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from fusiontrain_kernels.masked_routing_attention.arguments import Arguments
from fusiontrain_kernels.masked_routing_attention.kept import Kept


def masked_routing_attention(given: Arguments) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See the package. The block mask is made once per `key_ranges` tensor. Raises ValueError for a gradient on the CPU."""
    from torch.nn.attention.flex_attention import AuxRequest

    q, k, v = given.held()
    ranges = given.key_ranges.clamp(0, len(q))
    blind = (ranges[..., 0] >= ranges[..., 1]).all(1)
    options = {"block_mask": _block_mask(given.key_ranges), "scale": given.scale, "enable_gqa": True, "return_aux": AuxRequest(lse=given.return_lse)}
    try:
        out, rest = _compiled("flex_attention", q.device.type)(*(tensor.transpose(0, 1)[None] for tensor in (q, k, v)), **options)
    except NotImplementedError as error:  # torch refuses the backward on the CPU
        raise ValueError(f"masked_routing_attention: impl='flex': {error}") from None
    lse = rest.lse[0].masked_fill(blind, -torch.inf) if given.return_lse else None
    return out[0].transpose(0, 1).masked_fill(blind[:, None, None], 0), lse


@cache
def _compiled(name: str, device: str) -> Callable[..., Any]:
    """A function of torch's, as it is on the CPU, compiled elsewhere."""
    function = getattr(importlib.import_module("torch.nn.attention.flex_attention"), name)
    return function if device == "cpu" else torch.compile(function, dynamic=False)


def make_block_mask(key_ranges: torch.Tensor) -> Any:
    """The BlockMask of intervals [T, G, 2]."""
    ranges = key_ranges.detach()  # another object: what is kept for key_ranges must not keep it alive
    num_slices = ranges.shape[1]

    def allowed(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        found = (key >= ranges[query, 0, 0]) & (key < ranges[query, 0, 1])
        for g in range(1, num_slices):
            found = found | ((key >= ranges[query, g, 0]) & (key < ranges[query, g, 1]))
        return found

    create = _compiled("create_block_mask", ranges.device.type)
    return create(allowed, None, None, len(ranges), len(ranges), device=ranges.device)


_block_mask = Kept(make_block_mask)
