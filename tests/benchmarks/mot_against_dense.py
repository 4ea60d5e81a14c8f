"""Mixture-of-Transformers on one thread of a CPU: against the dense model of equal FLOPs, and against the same model routed by boolean masks.

    python tests/benchmarks/mot_against_dense.py [--rounds 12]

A step is forward, backward, clipping and AdamW in float32 over two documents of 512 tokens, half of them of images. The models take turns, step by
step, so that a busy machine slows all alike; told are medians of CPU seconds and of their ratio within a round.

The peer keeps tokens in reading order and routes as arXiv 2411.04996 says (algorithm 1): the rows of each modality are gathered by its mask, go
through its weights, and are put back by the mask, at every projection and norm; a feed-forward is one. It has the weights, the noise and, as is
checked first, the loss of the model that it is compared with. A second peer is better than published: Q, K and V share one gather, and a projection
and the norm behind it another. In every model the attention's mask is built once and not in every step: theirs
[T, T] by the benchmark, ours by chunks, kept as long as the batch.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from functools import cached_property

import torch
from torch import nn
from torch.nn import functional

from fusiontrain.config.schema import Config
from fusiontrain.models.build import build_model
from fusiontrain.models.flops import count_flops
from fusiontrain.models.fusion import FusionModel
from fusiontrain.objectives.noise import keyed_normal
from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.documents import batch_of, document
from fusiontrain.types import Batch

TEXT, IMAGE = "text", "image"
LENGTH, TEXTS, GRID, VOCAB = 512, (96, 96, 64), (8, 16), 4096
WARM_UP_ROUNDS = 2


def make_config(untied: bool) -> Config:
    model = {
        "recipe": "mot", "norm_position": "post", "untied": ["ffn", "qkv", "o", "norms"] if untied else [], "vocab_size": VOCAB, "dim": 256,
        "num_layers": 4, "num_heads": 4, "num_kv_heads": 4, "ffn_dim": 768, "image": {"patcher": "linear"},
    }  # fmt: skip
    image = {"representation": "latents", "channels": 4, "size": 32, "patch_size": 2}
    return tiny_config({"model": model, "data.image": image, "data.sequence_length": LENGTH, "objective.image": "flow_matching"})


def make_batch(config: Config) -> Batch:
    """Two documents of text 96, image 8 x 16, text 96, image 8 x 16, text 64."""
    generator = torch.Generator().manual_seed(0)
    texts = [[torch.randint(VOCAB, (length,), generator=generator).tolist() for length in TEXTS] for _ in range(2)]
    picture = (IMAGE, *GRID)
    documents = [document(one, picture, two, picture, three, patch_dim=16, seed=seed) for seed, (one, two, three) in enumerate(texts)]
    return batch_of(documents, config, num_sequences=2)


class ReadingOrder:
    """A batch as its documents are read: what a loader would hand to a model that routes by masks."""

    def __init__(self, batch: Batch) -> None:
        assert bool((batch.doc_ids >= 0).all()), "the documents fill the batch"
        self.batch = batch
        order = (batch.doc_ids.long() * LENGTH + batch.order_ids).argsort()
        self.token_ids, self.labels, self.positions = batch.token_ids[order], batch.labels[order], batch.position_ids[order].view(2, LENGTH)[0]
        self.segment_ids = batch.segment_ids[order].view(2, LENGTH)
        image = torch.arange(batch.num_tokens)[order] >= batch.modality_bounds[1]
        self.masks = {TEXT: ~image, IMAGE: image}

    @cached_property
    def allowed(self) -> torch.Tensor:
        """[documents, 1, T, T]: the keys before a query and those of its image. Built once, which is in the peer's favour."""
        segment = self.segment_ids
        same = (segment[:, :, None] == segment[:, None]) & (segment[:, :, None] >= 0)
        return (torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril() | same)[:, None]


def per_modality(make: Callable[[], nn.Module]) -> nn.ModuleDict:
    return nn.ModuleDict({TEXT: make(), IMAGE: make()})


Apply = Callable[[str, torch.Tensor], torch.Tensor]
"""The weights of a modality, by its name, on its rows."""


def routed(x: torch.Tensor, inputs: ReadingOrder, apply: Apply) -> torch.Tensor:
    """Every modality's rows gathered, computed, and scattered back."""
    merged = torch.empty_like(x)
    for name, mask in inputs.masks.items():
        merged[mask] = apply(name, x[mask])
    return merged


class PeerBlock(nn.Module):
    """A block whose every untied part is gather, weights of the modality, scatter. Its parameters have the names of `Block`'s."""

    def __init__(self, dim: int, ffn_dim: int, head_dim: int, eps: float, shares_gathers: bool) -> None:
        super().__init__()
        self.head_dim, self.shares_gathers = head_dim, shares_gathers
        self.attention = nn.ModuleDict({name: per_modality(lambda: nn.Linear(dim, dim, bias=False)) for name in "qkvo"})
        self.attention_norm = per_modality(lambda: nn.RMSNorm(dim, eps))
        self.feed_forward_norm = per_modality(lambda: nn.RMSNorm(dim, eps))
        sizes = {"gate": (dim, ffn_dim), "up": (dim, ffn_dim), "down": (ffn_dim, dim)}
        self.feed_forward = nn.ModuleDict({name: per_modality(lambda size=size: nn.Linear(*size, bias=False)) for name, size in sizes.items()})

    def forward(self, x: torch.Tensor, inputs: ReadingOrder, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        q, k, v = self.projected(x, inputs)
        q, k, v = (part.view(2, LENGTH, -1, self.head_dim).transpose(1, 2) for part in (q, k, v))  # [documents, H, T, Dh]
        mixed = functional.scaled_dot_product_attention(turn(q, cos, sin), turn(k, cos, sin), v, attn_mask=inputs.allowed)
        mixed = mixed.transpose(1, 2).reshape(len(x), -1)
        x = x + self.normed(mixed, inputs, lambda name, rows: self.attention["o"][name](rows), self.attention_norm)
        return x + self.normed(x, inputs, self.swiglu, self.feed_forward_norm)

    def projected(self, x: torch.Tensor, inputs: ReadingOrder) -> list[torch.Tensor]:
        if not self.shares_gathers:
            return [routed(x, inputs, lambda name, rows, part=part: self.attention[part][name](rows)) for part in "qkv"]
        merged = [torch.empty_like(x) for _ in "qkv"]
        for name, mask in inputs.masks.items():
            rows = x[mask]
            for into, part in zip(merged, "qkv", strict=True):
                into[mask] = self.attention[part][name](rows)
        return merged

    def normed(self, x: torch.Tensor, inputs: ReadingOrder, apply: Apply, norm: nn.ModuleDict) -> torch.Tensor:
        if self.shares_gathers:
            return routed(x, inputs, lambda name, rows: norm[name](apply(name, rows)))
        return routed(routed(x, inputs, apply), inputs, lambda name, rows: norm[name](rows))

    def swiglu(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        gate, up, down = (self.feed_forward[part][name] for part in ("gate", "up", "down"))
        return down(functional.silu(gate(rows)) * up(rows))


def turn(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat([-second, first], dim=-1) * sin


class Peer(nn.Module):
    """The whole model with such blocks. Embeddings, patcher and the image objective are those of `model`, its weights a copy."""

    def __init__(self, model: FusionModel, shares_gathers: bool) -> None:
        super().__init__()
        shape = model.shape
        self.text, self.image, self.objective = copy.deepcopy(model.text), copy.deepcopy(model.image), model.image_objective
        sizes = (shape.dim, shape.ffn_dim, shape.head_dim, shape.norm_eps)
        self.blocks = nn.ModuleList(PeerBlock(*sizes, shares_gathers) for _ in range(shape.num_layers))
        self.final_norm = per_modality(lambda: nn.RMSNorm(shape.dim, shape.norm_eps))
        self.frequencies = shape.rope_theta ** (-torch.arange(0, shape.head_dim, 2) / shape.head_dim)
        missing, _ = self.load_state_dict(model.state_dict(), strict=False)
        assert not missing, missing

    def forward(self, inputs: ReadingOrder) -> torch.Tensor:
        """The mean loss of text plus that of images."""
        payload, is_image = inputs.batch.payloads[IMAGE], inputs.masks[IMAGE]
        noise = keyed_normal(payload.noise_keys, payload.image_ids, payload.values.shape[-1], payload.grids)
        levels = self.objective.levels(payload)
        rows, state = self.image.encode(
            self.objective.corrupt(payload.values, noise, levels[payload.image_ids]), levels, payload.image_ids, payload.grids
        )
        x = self.text.encode(inputs.token_ids)
        x[is_image] = rows
        angles = torch.cat([torch.outer(inputs.positions.float(), self.frequencies)] * 2, dim=-1)
        cos, sin = angles.cos(), angles.sin()
        for block in self.blocks:
            x = block(x, inputs, cos, sin)
        hidden = routed(x, inputs, lambda name, rows: self.final_norm[name](rows))
        labelled = inputs.labels >= 0
        text = functional.cross_entropy(functional.linear(hidden[labelled], self.text.head_weight), inputs.labels[labelled])
        image = self.objective.loss(self.image.decode(hidden[is_image], state), payload, noise, levels)
        return text + image.sum / image.count


def our_loss(model: FusionModel, batch: Batch) -> torch.Tensor:
    return sum((term.sum / term.count for term in model(batch).values()), torch.zeros(()))


def stepper(model: nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[], float]:
    """A function that trains one step and returns its CPU seconds."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> float:
        begin = time.process_time()
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return time.process_time() - begin

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    config = make_config(untied=True)
    batch = make_batch(config)
    mot, dense = build_model(config), build_model(make_config(untied=False))
    masked, lean, inputs = Peer(mot, shares_gathers=False), Peer(mot, shares_gathers=True), ReadingOrder(batch)
    for peer in (masked, lean):
        torch.testing.assert_close(peer(inputs), our_loss(mot, batch), atol=1e-4, rtol=1e-5)
    assert count_flops(mot, batch) == count_flops(dense, batch)

    steps = {
        "mot": stepper(mot, lambda: our_loss(mot, batch)),
        "dense": stepper(dense, lambda: our_loss(dense, batch)),
        "boolean masks": stepper(masked, lambda: masked(inputs)),
        "fewer gathers": stepper(lean, lambda: lean(inputs)),
    }
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(WARM_UP_ROUNDS + rounds):
        for name in list(steps)[number % len(steps) :] + list(steps)[: number % len(steps)]:
            seconds = steps[name]()
            if number >= WARM_UP_ROUNDS:
                taken[name].append(seconds)
    print(f"{rounds} rounds, float32, one thread, {sum(count_flops(mot, batch).values()) / 1e9:.1f} GFLOPs a step")
    for name, seconds in taken.items():
        print(f"{name:15} {statistics.median(seconds):.3f} CPU seconds a step")
    for name in ("dense", "boolean masks", "fewer gathers"):
        ratios = [ours / other for ours, other in zip(taken["mot"], taken[name], strict=True)]
        print(f"mot / {name}: median {statistics.median(ratios):.3f}, from {min(ratios):.3f} to {max(ratios):.3f}")


if __name__ == "__main__":
    main()
