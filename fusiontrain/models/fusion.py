"""The one model that the trainer knows: embed every modality, run the blocks over all of them, apply each modality's objective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from fusiontrain.modality import IMAGE, MODALITY_NAMES, TEXT
from fusiontrain.models.cache import KVCache
from fusiontrain.models.kernels import Kernels
from fusiontrain.models.layers.attention import Attend
from fusiontrain.models.layers.block import Block
from fusiontrain.models.layers.layout import Layout, group_rows
from fusiontrain.models.layers.prefix import Prefix, attend_behind, attend_inside, borders
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
from fusiontrain.types import IGNORE_INDEX, Batch, LossTerm, Payload
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
        images_causal: bool = False,
        codec: LatentCodec | None = None,
    ) -> None:
        super().__init__()
        self.shape, self.recipe, self.kernels = shape, recipe, kernels
        self.image_channels, self.codec = image_channels, codec
        self.image_input_scale, self.images_causal = image_input_scale, images_causal
        self.text = TextModality(shape.vocab_size, shape.dim, shape.tie_embeddings)
        self.image = image
        self.rotary = RotaryEmbedding(shape.head_dim, shape.rope_theta, shape.rope_scaling)
        self.blocks = nn.ModuleList(Block(shape, recipe, number) for number in range(shape.num_layers))
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
        prefix, hidden, images = self._hidden(batch, drops=self.training)
        if batch.discrete == (TEXT.name,):
            terms = {TEXT.name: self._text_loss(prefix, hidden, batch)}
        else:
            terms = {name: self._loss_of_labels(hidden, batch, name) for name in batch.discrete}
        if self.image is not None and images is not None:
            low, high = (bound - len(prefix) for bound in batch.modality_bounds[IMAGE.id : IMAGE.id + 2])
            prediction = self.image.decode(hidden[low:high], images.patcher_state)
            term = self.image_objective.loss(prediction, images.payload, images.noise, images.levels)
            terms[IMAGE.name] = _in_batch(term, batch.modality_bounds[IMAGE.id])
        return terms

    def _loss_of_labels(self, hidden: torch.Tensor, batch: Batch, name: str) -> LossTerm:
        """The next-token loss of the labels of one modality, whatever rows they are predicted from. The head is the one of the joint vocabulary."""
        chosen = batch.label_modality_ids == MODALITY_NAMES.index(name)
        labels = torch.where(chosen, batch.labels, IGNORE_INDEX)
        return self.text_objective(hidden, self.text.head_weight, labels, batch.loss_weights, batch.target_counts[name])

    def _text_loss(self, prefix: torch.Tensor, hidden: torch.Tensor, batch: Batch) -> LossTerm:
        """The next-token loss where only text has labels: the head of no other row is looked at."""
        num_prefix, num_text = len(prefix), batch.modality_bounds[TEXT.id + 1]
        fixed_labels = batch.num_prefix_labels if num_prefix else 0
        num_labels = batch.target_counts[TEXT.name] - fixed_labels
        term = self._next_token(hidden[: num_text - num_prefix], batch, slice(num_prefix, num_text), num_labels)
        if not fixed_labels:
            return term
        fixed = self._next_token(prefix, batch, slice(0, num_prefix), fixed_labels)  # a number to log: no operand has a gradient
        return _both(fixed, term)

    def _next_token(self, hidden: torch.Tensor, batch: Batch, rows: slice, num_labels: int) -> LossTerm:
        term = self.text_objective(hidden, self.text.head_weight, batch.labels[rows], batch.loss_weights[rows], num_labels)
        return _in_batch(term, rows.start)

    def text_logits(self, batch: Batch) -> torch.Tensor:
        """Logits of every text row, [text rows, V]; of all rows where every one of them is a token, as with codes of images, [T, V]."""
        prefix, hidden, _ = self._hidden(batch)
        last = TEXT.id + 1 if batch.payloads else -1
        return self.text.logits(torch.cat([prefix, hidden[: batch.modality_bounds[last] - len(prefix)]]))

    def num_forward_only(self, batch: Batch) -> int:
        """How many of the first rows of a batch need no backward: a host number."""
        return batch.num_prefix_rows if self.recipe.freezes_text else 0

    def _hidden(self, batch: Batch, drops: bool = False) -> tuple[torch.Tensor, torch.Tensor, _NoisedImages | None]:
        """-> the rows of the frozen prefix [F, D], without gradient, all others [T - F, D], and what the image loss needs. drops: with dropout."""
        keys = batch.row_keys if drops else None
        prefix_rows, x, images = self._embed(batch, self.num_forward_only(batch))
        if not (self.recipe.freezes_text and batch.has_prefix_slice):
            attend = partial(masked_routing_attention, key_ranges=batch.key_ranges, query_ranges=batch.query_ranges, impl=self.kernels.attention)
            layout = self._layout(batch.modality_bounds, batch.modality_offsets, batch.position_ids, x.dtype, keys)
            return prefix_rows, self._run_blocks(x, layout, [attend] * len(self.blocks)), images
        return *self._run_blocks_behind(prefix_rows, x, batch, keys), images

    def _embed(self, batch: Batch, num_prefix: int) -> tuple[torch.Tensor, torch.Tensor, _NoisedImages | None]:
        """Every row of the batch as the blocks take it: ids by the table, which all modalities share, and patches by the patcher.

        -> the first `num_prefix` rows, without gradient, the others, and what the image loss needs. The others are a tensor of their own: blocks
        that are compiled would be compiled once more for a view.
        """
        prefix_rows = self.text.encode(batch.token_ids[:num_prefix]).detach()
        if self.image is None:
            return prefix_rows, self.text.encode(batch.token_ids[num_prefix:]), None
        rows, images = self._embed_images(batch.payloads[IMAGE.name])
        low, high = batch.modality_bounds[IMAGE.id : IMAGE.id + 2]
        parts = [self.text.encode(batch.token_ids[num_prefix:low]), rows.to(prefix_rows.dtype)]
        if batch.modality_bounds[-1] > high:
            parts.append(self.text.encode(batch.token_ids[high:]))
        return prefix_rows, torch.cat(parts), images

    def _run_blocks_behind(
        self, prefix_rows: torch.Tensor, x: torch.Tensor, batch: Batch, keys: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The frozen prefix and the rows behind it, block by block and each to the end."""
        cut, count, impl = borders(batch), len(prefix_rows), self.kernels.attention
        prefix_keys, live_keys = (None, None) if keys is None else (keys[:count], keys[count:])
        prefix_layout = self._layout(cut.prefix_bounds, cut.prefix_offsets, batch.position_ids[:count], x.dtype, prefix_keys)
        layout = self._layout(cut.bounds, cut.offsets, batch.position_ids[count:], x.dtype, live_keys)
        inside, attend = attend_inside(batch, impl), attend_behind(batch, impl)
        for block in self.blocks:
            x, prefix_rows = block(x, layout, attend, Prefix(prefix_rows, prefix_layout, inside))
        with torch.no_grad():
            prefix_rows = self.final_norm(prefix_rows, prefix_layout)
        return prefix_rows, self.final_norm(x, layout)

    def _layout(
        self, bounds: tuple[int, ...], offsets: torch.Tensor, position_ids: torch.Tensor, dtype: torch.dtype, keys: torch.Tensor | None = None
    ) -> Layout:
        cos, sin = self.rotary(position_ids, dtype)
        return Layout(group_rows(self.recipe.groupings, bounds, offsets), cos, sin, self.kernels, keys)

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
            x, _ = block(x, layout, attend)
        return self.final_norm(x, layout)

    # ---------------------------------------------------------------- generation

    def new_cache(self, batch_size: int, max_length: int) -> KVCache:
        like = torch.empty(0, dtype=self.text.embedding.weight.dtype, device=self.device)
        return KVCache(self.shape.num_layers, batch_size, max_length, self.shape.num_kv_heads, self.shape.head_dim, like)

    @torch.no_grad()
    def decode_text(
        self, token_ids: torch.Tensor, cache: KVCache, lengths: torch.Tensor | None = None, modality: int = TEXT.id
    ) -> torch.Tensor:
        """Read `lengths` [B] (default: all) of the n tokens of every row into the cache. token_ids [B, n] -> logits [B, n, V].

        modality: the id of theirs, for codes of images and units of speech are read like text, each with the weights of their modality.
        """
        batch, num_new = token_ids.shape
        lengths = torch.full_like(cache.lengths, num_new) if lengths is None else lengths
        x = self.text.encode(token_ids.flatten())
        hidden = self._decode(x, modality, cache, num_new, lengths, causal=True)
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
        hidden = self._decode(x, IMAGE.id, cache, num_patches, lengths, causal=self.images_causal)
        if commit:
            cache.advance(lengths)
        return self.image.decode(hidden, state).unflatten(0, (batch, num_patches))

    def _decode(self, x: torch.Tensor, modality: int, cache: KVCache, num_new: int, lengths: torch.Tensor, causal: bool) -> torch.Tensor:
        needed = int((cache.lengths + num_new).max())
        if needed > cache.max_length:
            raise ValueError(f"the cache holds {cache.max_length} tokens per row, {needed} are needed")
        bounds = tuple(0 if i <= modality else len(x) for i in range(self.recipe.num_modalities + 1))
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
        """A block is one shard unit with the weights of all modalities.

        Units per modality were tried: they double the number of gathers (a block's products go text, image, text, image; each side is called several
        times, 33 gathers a step against 9 for two blocks) and save bytes only in a step in which no rank has an image. With the text frozen, such a
        step trains nothing, so such data are not used; and where frozen weights are replicated, the text side is not gathered at all.
        """
        blocks = tuple(f"blocks.{i}" for i in range(len(self.blocks)))
        return ModelPlan(
            shard_units=blocks,
            recompute=tuple(f"{block}.forward_live" for block in blocks),
            frozen=tuple(name for name, _ in self.named_parameters() if self._is_frozen(name)),
            forward_methods=("text_logits", "decode_text", "decode_image"),
        )

    def _is_frozen(self, name: str) -> bool:
        if name.startswith("text."):
            return self.recipe.freezes_text
        return bool(self.recipe.frozen_groups & set(name.split(".")[:-1])) and not name.startswith("image.")


def _in_batch(term: LossTerm, first_row: int) -> LossTerm:
    """A term whose rows count from `first_row` of the batch, with rows of the batch."""
    return replace(term, rows=None if term.rows is None else term.rows + first_row)


def _both(first: LossTerm, second: LossTerm) -> LossTerm:
    """The sum of two terms over different rows."""
    parts, rows = (None if a is None or b is None else torch.cat([a, b]) for a, b in ((first.parts, second.parts), (first.rows, second.rows)))
    return LossTerm(second.sum + first.sum, second.count + first.count, parts, rows)
