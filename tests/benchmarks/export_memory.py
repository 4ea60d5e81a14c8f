"""Peak memory of an export beyond what the process had, and its pace: `python tests/benchmarks/export_memory.py FOLDER [layers]`.

The checkpoint is of a dense model with a vocabulary of 32,768 and a width of 1,024, 12 layers unless said otherwise: about 900 MiB.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fusiontrain.config.load import to_yaml
from fusiontrain.models.build import build_model
from fusiontrain.parallel.mesh import Ranks
from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.memory import peak_rss_above_baseline
from fusiontrain.train.checkpoint import save_checkpoint
from fusiontrain.train.export import export_model
from fusiontrain.train.identity import model_identity
from fusiontrain.train.inference import load_for_inference
from fusiontrain.train.retention import Retention
from fusiontrain.train.sources import open_source
from fusiontrain.train.state import TrainState, model_tensors

VOCAB, DIM = 32_768, 1_024
LARGEST = VOCAB * DIM * 4


def save(folder: Path, vocab_size: int, dim: int, num_layers: int) -> None:
    """A run folder with one checkpoint."""
    shape = {"vocab_size": vocab_size, "dim": dim, "ffn_dim": 4 * dim, "num_layers": num_layers, "num_heads": 16, "num_kv_heads": 8}
    config = tiny_config({"model": {"recipe": "dense", **shape}, "data.modalities": ["text"]})
    model = build_model(config)
    stored = model_tensors(model, dict(model.named_parameters()), include_frozen=True)
    tensors = {"model": stored, "optimizer": {}}
    save_checkpoint(folder / "checkpoints", TrainState(step=1), tensors, model_identity(config, stored), to_yaml(config), Ranks(), Retention(last=1), {})


def report(name: str, num_bytes: int, folder: Path, work: Callable[[Path], object]) -> None:
    """Peak and pace of `work(folder)`, which is warmed up on a small model."""
    started = time.perf_counter()
    peak = peak_rss_above_baseline(lambda: work(folder), lambda: work(folder / "small"))
    seconds = time.perf_counter() - started
    print(f"{name}: peak {peak / 2**20:.0f} MiB = {peak / LARGEST:.2f} of the largest tensor, {num_bytes / seconds / 2**20:.0f} MiB/s", flush=True)


def main() -> None:
    folder, layers = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 12
    child = os.fork()  # what building the model takes is to be no part of the baseline
    if child == 0:
        save(folder / "run", VOCAB, DIM, layers)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    save(folder / "small" / "run", 264, 64, 1)
    num_bytes = sum(path.stat().st_size for path in (folder / "run").rglob("*.distcp"))
    print(f"{num_bytes / 2**20:.0f} MiB, largest tensor {LARGEST / 2**20:.0f} MiB", flush=True)

    def export(source: str, out: str, dtype: torch.dtype | None = None) -> Callable[[Path], object]:
        return lambda folder: export_model(open_source(folder / source), folder / out, "huggingface", dtype, overwrite=True)

    report("checkpoint to safetensors", num_bytes, folder, export("run", "whole"))
    report("checkpoint to safetensors in bfloat16", num_bytes, folder, export("run", "half", torch.bfloat16))
    report("folder to folder", num_bytes, folder, export("whole", "again"))
    report("all of it loaded", num_bytes, folder, lambda folder: load_for_inference(folder / "whole"))


if __name__ == "__main__":
    main()
