"""The one model that the trainer knows: embed every modality, run the blocks over all of them, apply each modality's objective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._compile import _disable_dynamo

from fusiontrain.modality import IMAGE, MODALITY_NAMES, TEXT
from fusiontrain.models.cache import KVCache
from fusiontrain.models.kernels import Kernels
from fusiontrain.models.layers.attention import Attend
from fusiontrain.models.layers.block import Block
from fusiontrain.models.layers.layout import Layout, group_rows
from fusiontrain.models.layers.rope import RotaryEmbedding
from fusiontrain.models.layers.untied import UntiedRMSNorm
from fusiontrain.models.modalities.image import LinearPatcher
from fusiontrain.models.modalities.patches import Grid, unpatchify
from fusiontrain.models.modalities.text import TextModality
from fusiontrain.models.modalities.unet import UNetPatcher
from fusiontrain.models.modalities.vae import LatentCodec
from fusiontrain.models.plan import ModelPlan
from fusiontrain.models.recipes.recipe import Recipe
from fusiontrain.models.shape import ModelShape
from fusiontrain.objectives.noise import keyed_normal
from fusiontrain.types import Batch, LossTerm, Payload
from fusiontrain_kernels.masked_routing_attention import masked_routing_attention

Patcher = LinearPatcher | UNetPatcher


@dataclass(frozen=True)
class _NoisedImages:
    """What the image loss needs again after the blocks: the clean images, noise [N, C], levels [I], and the patcher's own state."""

    payload: Payload
    noise: torch.Tensor
    levels: torch.Tensor
    patcher_state: Any


class FusionModel(nn.Module):
    """Rows of a batch are modality-major (see `types.Batch`). `image` is None in a text-only model; `codec` is None where images are trained as
    they come (pixels, or latents made beforehand)."""

    def __init__(
        self,
        shape: ModelShape,
        recipe: Recipe,
        kernels: Kernels,
        *,
        text_objective: nn.Module,
        image: Patcher | None = None,
        image_objective: Any = None,
        image_channels: int = 0,
        image_input_scale: float = 1.0,
        codec: LatentCodec | None = None,
    ) -> None:
        super().__init__()
        self.shape, self.recipe, self.kernels = shape, recipe, kernels
        self.image_channels, self.codec = image_channels, codec
        self.image_input_scale = image_input_scale
        self.text = TextModality(shape.vocab_size, shape.dim, shape.tie_embeddings)
        self.image = image
        self.rotary = RotaryEmbedding(shape.head_dim, shape.rope_theta, shape.rope_scaling)
        self.blocks = nn.ModuleList(Block(shape, recipe) for _ in range(shape.num_layers))
        self.final_norm = UntiedRMSNorm(recipe.final_norm, shape.dim, shape.norm_eps)
        self.text_objective = text_objective
        self.image_objective = image_objective

    @property
    def device(self) -> torch.device:
        """Where the model computes; weights that an engine has offloaded are elsewhere in between."""
        return self.rotary.frequencies.device

    # ---------------------------------------------------------------- training

    def forward(self, batch: Batch) -> dict[str, LossTerm]:
        """The loss of each objective over this micro-batch, summed and not yet divided."""
        hidden, images = self._hidden(batch)
        text = _rows(batch, TEXT.id)
        labels, num_labels = batch.labels[text], batch.target_counts[TEXT.name]
        terms = {TEXT.name: self.text_objective(hidden[text], self.text.head_weight, labels, batch.loss_weights[text], num_labels)}
        if self.image is not None and images is not None:
            prediction = self.image.decode(hidden[_rows(batch, IMAGE.id)], images.patcher_state)
            terms[IMAGE.name] = self.image_objective.loss(prediction, images.payload, images.noise, images.levels)
        return terms

    def text_logits(self, batch: Batch) -> torch.Tensor:
        """Logits of every text row, [text rows, V]."""
        hidden, _ = self._hidden(batch)
        return self.text.logits(hidden[_rows(batch, TEXT.id)])

    def _hidden(self, batch: Batch) -> tuple[torch.Tensor, _NoisedImages | None]:
        x = self.text.encode(batch.token_ids[_rows(batch, TEXT.id)])
        images = None
        if self.image is not None:
            image_rows, images = self._embed_images(batch.payloads[IMAGE.name])
            x = torch.cat([x, image_rows.to(x.dtype)])
        operator = _attend_outside_graphs if self.kernels.attention == "chunked" else masked_routing_attention
        attend = partial(operator, key_ranges=batch.key_ranges, query_ranges=batch.query_ranges, impl=self.kernels.attention)
        layout = self._layout(batch.modality_bounds, batch.modality_offsets, batch.position_ids, x.dtype)
        return self._run_blocks(x, layout, [attend] * len(self.blocks)), images

    def _layout(self, bounds: tuple[int, ...], offsets: torch.Tensor, position_ids: torch.Tensor, dtype: torch.dtype) -> Layout:
        groupings = (self.recipe.attention, self.recipe.feed_forward, self.recipe.final_norm)
        cos, sin = self.rotary(position_ids, dtype)
        return Layout(group_rows(groupings, bounds, offsets), cos, sin, self.kernels)

    def _embed_images(self, payload: Payload) -> tuple[torch.Tensor, _NoisedImages]:
        if self.codec is not None:
            payload = replace(payload, values=self.codec.encode(payload.values, payload.grids))
        noise = keyed_normal(payload.noise_keys, payload.image_ids, payload.values.shape[-1], payload.grids)
        levels = self.image_objective.levels(payload)
        noised = self.image_objective.corrupt(payload.values, noise, levels[payload.image_ids])
        rows, state = self._image_rows(noised, levels, payload.image_ids, payload.grids)
        return rows, _NoisedImages(payload, noise, levels, state)

    def _image_rows(
        self, values: torch.Tensor, levels: torch.Tensor, image_ids: torch.Tensor, grids: tuple[Grid, ...]
    ) -> tuple[torch.Tensor, Any]:
        assert self.image is not None
        rows, state = self.image.encode(values, levels, image_ids, grids)
        return rows * self.image_input_scale, state

    def _run_blocks(self, x: torch.Tensor, layout: Layout, attends: Sequence[Attend]) -> torch.Tensor:
        for block, attend in zip(self.blocks, attends, strict=True):
            x = block(x, layout, attend)
        return self.final_norm(x, layout)

    # ---------------------------------------------------------------- generation

    def new_cache(self, batch_size: int, max_length: int) -> KVCache:
        like = torch.empty(0, dtype=self.text.embedding.weight.dtype, device=self.device)
        return KVCache(self.shape.num_layers, batch_size, max_length, self.shape.num_kv_heads, self.shape.head_dim, like)

    @torch.no_grad()
    def decode_text(self, token_ids: torch.Tensor, cache: KVCache, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """Read `lengths` [B] (default: all) of the n tokens of every row into the cache. token_ids [B, n] -> logits [B, n, V]."""
        batch, num_new = token_ids.shape
        lengths = torch.full_like(cache.lengths, num_new) if lengths is None else lengths
        x = self.text.encode(token_ids.flatten())
        hidden = self._decode(x, TEXT.id, cache, num_new, lengths, causal=True)
        cache.advance(lengths)
        return self.text.logits(hidden).unflatten(0, (batch, num_new))

    @torch.no_grad()
    def decode_image(self, values: torch.Tensor, levels: torch.Tensor, grid: Grid, cache: KVCache, commit: bool) -> torch.Tensor:
        """Predict for one noised image per row, behind what the cache holds; `commit` keeps it there.

        values [B, N, C], levels [B] in [0, 1], N = rows * columns of `grid` -> prediction [B, N, C] float32.
        """
        if self.image is None:
            raise ValueError("this model has no image side")
        batch, num_patches, _ = values.shape
        image_ids = torch.arange(batch, device=values.device).repeat_interleave(num_patches)
        x, state = self._image_rows(values.flatten(0, 1), levels, image_ids, (grid,) * batch)
        lengths = torch.full_like(cache.lengths, num_patches)
        hidden = self._decode(x, IMAGE.id, cache, num_patches, lengths, causal=False)
        if commit:
            cache.advance(lengths)
        return self.image.decode(hidden, state).unflatten(0, (batch, num_patches))

    def _decode(self, x: torch.Tensor, modality: int, cache: KVCache, num_new: int, lengths: torch.Tensor, causal: bool) -> torch.Tensor:
        needed = int((cache.lengths + num_new).max())
        if needed > cache.max_length:
            raise ValueError(f"the cache holds {cache.max_length} tokens per row, {needed} are needed")
        bounds = tuple(0 if i <= modality else len(x) for i in range(len(MODALITY_NAMES) + 1))
        offsets = torch.tensor(bounds, dtype=torch.int32, device=x.device)
        layout = self._layout(bounds, offsets, cache.positions(num_new).flatten(), x.dtype)
        attends = [partial(cache.attend, layer, lengths, causal) for layer in range(len(self.blocks))]
        return self._run_blocks(x, layout, attends)

    def to_pixels(self, values: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Clean patches [B, N, C] -> pixels [B, 3, H, W] in [-1, 1]. Raises ValueError for latents without a decoder."""
        maps = unpatchify(values.float(), grid, self.image_channels)
        if self.codec is not None:
            return self.codec.decode(maps)
        if self.image_channels != 3:
            raise ValueError("these images are latents: set model.image.vae to see them as pixels")
        return maps.clamp(-1, 1)

    # ---------------------------------------------------------------- plan

    def plan(self) -> ModelPlan:
        blocks = tuple(f"blocks.{i}" for i in range(len(self.blocks)))
        return ModelPlan(
            shard_units=blocks,
            recompute=blocks,
            frozen=tuple(name for name, _ in self.named_parameters() if self._is_frozen(name)),
            forward_methods=("text_logits", "decode_text", "decode_image"),
        )

    def _is_frozen(self, name: str) -> bool:
        if name.startswith("text."):
            return self.recipe.freezes_text
        return bool(self.recipe.frozen_groups & set(name.split(".")[:-1])) and not name.startswith("image.")


@_disable_dynamo
def _attend_outside_graphs(*args: Any, **options: Any) -> torch.Tensor:
    """For an implementation that cuts its work by numbers it reads from the batch: a compiled block calls it between two graphs, which any
    batch can use, where with it inside every new cut would be a compilation."""
    return masked_routing_attention(*args, **options)


def _rows(batch: Batch, modality: int) -> slice:
    return slice(batch.modality_bounds[modality], batch.modality_bounds[modality + 1])
