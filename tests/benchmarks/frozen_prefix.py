"""What the frozen prefix saves: matrix FLOPs that torch's counter sees, memory that autograd keeps, and seconds, on captions and interleaved documents.

    python tests/benchmarks/frozen_prefix.py [--dim 256] [--layers 4] [--length 2048] [--seconds]

On the CPU, LMFusion of random weights, one forward and backward. FLOPs of attention are those of `count_flops`, which the counter does not know,
and which leaves out what is computed again. Recomputation keeps its inputs where autograd's hooks do not see them: no memory is printed for it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from fusiontrain.config.schema import Config
from fusiontrain.models.build import build_model
from fusiontrain.models.flops import count_flops
from fusiontrain.models.fusion import FusionModel
from fusiontrain.parallel.activation import recompute_activations
from fusiontrain.testing.documents import batch_of, document
from fusiontrain.testing.models import write_tiny_llama
from fusiontrain.testing.training import BOI, EOI, lmfusion_config
from fusiontrain.types import Batch, Document

IMAGE = ("image", 8, 8)


def corpus(kind: str, length: int) -> list[Document]:
    """Documents that fill most of one sequence: captions of 20 to 60 tokens, or articles of texts between images."""
    random, documents, used = np.random.default_rng(0), [], 0

    def words(low: int, high: int) -> list[int]:
        return random.integers(0, 255, random.integers(low, high)).tolist()

    while True:
        if kind == "text":
            parts = [[256, *words(100, 400), 257]]
        elif kind == "captions, image first":
            parts = [[256, BOI], IMAGE, [EOI, *words(20, 60), 257]]
        elif kind == "captions":
            parts = [[256, *words(20, 60), BOI], IMAGE, [EOI, 257]]
        else:
            parts = [[256, *words(60, 200), BOI], IMAGE, [EOI, *words(60, 200), BOI], IMAGE, [EOI, *words(60, 200), 257]]
        made = document(*parts, seed=len(documents))
        used += made.num_tokens
        if used > length:
            return documents
        documents.append(made)


def measure(model: FusionModel, batch: Batch, with_seconds: bool) -> tuple[int, int, int, float]:
    """Counted FLOPs without attention, FLOPs of `count_flops`, bytes kept for the backward, and the best seconds of three."""
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}  # where it lies -> bytes

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = max(tensor.nbytes, kept.get(tensor.data_ptr(), 0))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = sum(term.sum for term in model(batch).values())
    saved = sum(kept.values())
    del loss
    counter = FlopCounterMode(display=False)
    with counter:
        sum(term.sum for term in model(batch).values()).backward()
    seconds = min(step_seconds(model, batch) for _ in range(3)) if with_seconds else 0.0
    return counter.get_total_flops(), sum(count_flops(model, batch).values()), saved, seconds


def step_seconds(model: FusionModel, batch: Batch) -> float:
    start = time.perf_counter()
    sum(term.sum for term in model(batch).values()).backward()
    return time.perf_counter() - start


def config_of(base: str, length: int, frozen_prefix: bool) -> Config:
    return lmfusion_config(base, {"data.sequence_length": length, "parallel.frozen_prefix": frozen_prefix})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--seconds", action="store_true")
    options = parser.parse_args()
    sizes = {"hidden_size": options.dim, "intermediate_size": options.dim * 7 // 2, "num_hidden_layers": options.layers}
    with tempfile.TemporaryDirectory() as folder:
        base = write_tiny_llama(Path(folder), num_attention_heads=8, num_key_value_heads=2, **sizes)
        print(f"{'documents':24}{'recompute':>10}{'prefix':>8}{'GFLOP':>16}{'with attention':>18}{'kept MB':>16}{'seconds':>14}")
        for kind in ("captions", "captions, image first", "interleaved", "text"):
            for mode in ("none", "full"):
                report(kind, mode, base, options)


def report(kind: str, mode: str, base: str, options: argparse.Namespace) -> None:
    rows = []
    for frozen_prefix in (False, True):
        config = config_of(base, options.length, frozen_prefix)
        model, batch = build_model(config), batch_of(corpus(kind, options.length), config, 1)
        recompute_activations(model, model.plan().recompute, mode, 1)
        rows.append(measure(model, batch, options.seconds))
    (f0, a0, m0, s0), (f1, a1, m1, s1) = rows
    share = batch.num_prefix_rows / batch.num_tokens
    memory = f"{m0 / 1e6:.1f} > {m1 / 1e6:.1f}" if mode == "none" else "-"
    cells = [f"{f0 / 1e9:.1f} > {f1 / 1e9:.1f}", f"{a0 / 1e9:.1f} > {a1 / 1e9:.1f}", memory, f"{s0:.2f} > {s1:.2f}"]
    print(f"{kind:24}{mode:>10}{share:>8.0%}{cells[0]:>16}{cells[1]:>18}{cells[2]:>16}{cells[3]:>14}", flush=True)


if __name__ == "__main__":
    main()
