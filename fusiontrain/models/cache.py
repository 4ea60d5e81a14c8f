"""Keys and values of what has been read so far, for generation."""

from __future__ import annotations

import torch
from torch.nn import functional as F


class KVCache:
    """A padded cache of B rows: per layer keys and values [B, L, K, Dh], and `lengths` [B], the tokens each row holds.

    New tokens are written behind a row's length and stay invisible to later calls until `advance` counts them in: denoising overwrites an
    image in place until it is done.
    """

    def __init__(self, num_layers: int, batch_size: int, max_length: int, num_kv_heads: int, head_dim: int, like: torch.Tensor) -> None:
        size = (num_layers, batch_size, max_length, num_kv_heads, head_dim)
        # Not like.new_zeros: of a sharded weight that would be a sharded cache.
        self.keys = torch.zeros(size, dtype=like.dtype, device=like.device)
        self.values = torch.zeros_like(self.keys)
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=like.device)

    @property
    def max_length(self) -> int:
        return self.keys.shape[2]

    def positions(self, num_new: int) -> torch.Tensor:
        """Places of the next `num_new` tokens of every row, [B, num_new] int64."""
        return self.lengths[:, None] + torch.arange(num_new, device=self.lengths.device)

    def attend(self, layer: int, new_lengths: torch.Tensor, causal: bool, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Write the new keys and values of `layer`, then attend to all that is visible.

        q [B * n, H, Dh], k and v [B * n, K, Dh] -> [B * n, H, Dh]. new_lengths [B]: how many of the n new tokens of a row are real.
        causal: new tokens see each other in order (text), else all of them (image patches).
        """
        batch = len(self.lengths)
        q, k, v = (tensor.unflatten(0, (batch, -1)) for tensor in (q, k, v))
        num_new = q.shape[1]
        places = self.positions(num_new)  # [B, n]
        rows = torch.arange(batch, device=places.device)[:, None]
        self.keys[layer][rows, places] = k.to(self.keys.dtype)
        self.values[layer][rows, places] = v.to(self.values.dtype)
        slots = torch.arange(self.max_length, device=places.device)
        visible = places[:, :, None] + 1 if causal else (self.lengths + new_lengths)[:, None, None].expand(-1, num_new, 1)
        mask = slots < visible  # [B, n, L]
        keys, values = (cached[layer].transpose(1, 2).to(q.dtype) for cached in (self.keys, self.values))
        out = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=mask[:, None], enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    def advance(self, new_lengths: torch.Tensor) -> None:
        """Count the tokens just written as read."""
        self.lengths = self.lengths + new_lengths

    def select(self, rows: torch.Tensor) -> KVCache:
        """A copy that holds the given rows (indices, repeats allowed)."""
        chosen = KVCache.__new__(KVCache)
        chosen.keys, chosen.values, chosen.lengths = self.keys[:, rows], self.values[:, rows], self.lengths[rows]
        return chosen
