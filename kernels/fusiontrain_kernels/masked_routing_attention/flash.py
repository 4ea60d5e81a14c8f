"""masked_routing_attention by flash-attn, where its mask can say it: contiguous documents, every query seeing what comes before it in its own."""

from __future__ import annotations

import importlib.util

import torch

from fusiontrain_kernels.masked_routing_attention.arguments import Arguments
from fusiontrain_kernels.masked_routing_attention.kept import Kept


def masked_routing_attention(given: Arguments) -> tuple[torch.Tensor, None]:
    """See the package. Raises ValueError where flash-attn is missing, cannot run, or has no such mask; it gives no lse."""
    if importlib.util.find_spec("flash_attn") is None:
        raise ValueError("masked_routing_attention: impl='flash': the package flash-attn is not installed: install it, or choose another impl")
    if given.q.dtype not in (torch.bfloat16, torch.float16) or not given.q.is_cuda:
        raise ValueError(f"masked_routing_attention: impl='flash' takes bfloat16 or float16 on a GPU, not {given.q.dtype} on {given.q.device}")
    if given.return_lse:
        raise ValueError("masked_routing_attention: impl='flash' gives no lse that has a gradient: choose another impl")
    from flash_attn import flash_attn_varlen_func

    cu_seqlens, longest = _documents(given.key_ranges)
    out = flash_attn_varlen_func(
        *given.held(), cu_seqlens, cu_seqlens, longest, longest,
        softmax_scale=given.scale, causal=True, deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    return out, None


def causal_documents(key_ranges: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Where documents begin and the last one ends, [number + 1] int32, and the length of the longest.

    Raises ValueError unless every row sees exactly the rows from the first of its document to itself.
    """
    rows = torch.arange(len(key_ranges), device=key_ranges.device)
    low, high = key_ranges.long().clamp(0, len(rows)).unbind(-1)  # [T, G]
    sees = low < high
    first = low.where(sees, len(rows)).amin(1)
    is_prefix = (high.where(sees, 0).amax(1) == rows + 1) & ((high - low).where(sees, 0).sum(1) == rows + 1 - first)
    starts = first == rows
    # Documents do not interleave: a row that starts none continues the one of the row before it.
    continues = torch.cat([starts[:1], starts[1:] | (first[1:] == first[:-1])])
    wrong = (~(is_prefix & continues)).nonzero()
    if len(wrong):
        raise ValueError(
            f"masked_routing_attention: impl='flash': row {int(wrong[0])} does not see exactly what comes before it in its document (a bidirectional "
            "span, a document in several slices, or padding that sees nothing): choose another impl"
        )
    bounds = torch.cat([starts.nonzero().flatten(), rows.new_tensor([len(rows)])])
    return bounds.int(), int(bounds.diff().max()) if len(rows) else 0


_documents = Kept(causal_documents)
