"""What the engine costs on one process: the trainer's steps against a plain PyTorch loop over the same model and the same batches.

    python tests/benchmarks/engine_overhead.py [--steps 40] [--dim 256] [--layers 6]

Both train in turns, step by step, so that a busy machine slows both. The trainer's time is everything between two of its steps: waiting for
data, counting FLOPs and targets, the step, metrics and logs. The plain loop has its batches ready and does forward, backward, clipping and
AdamW. Told are medians over steps of wall time and of the main thread's CPU time; the latter hardly depends on what else the machine does.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from fusiontrain.config.schema import Config
from fusiontrain.data.loader import Loader
from fusiontrain.data.tokenizer import load_tokenizer
from fusiontrain.models.build import build_model
from fusiontrain.parallel.mesh import process_group, read_ranks
from fusiontrain.testing.training import world_config
from fusiontrain.train.build import build_trainer
from fusiontrain.train.signals import StopRequest
from fusiontrain.types import Batch

WARM_UP_STEPS = 5


def make_config(folder: Path, args: argparse.Namespace) -> Config:
    model = {"recipe": "transfusion", "vocab_size": 300, "dim": args.dim, "num_layers": args.layers, "num_heads": args.dim // 32}
    model |= {"ffn_dim": 3 * args.dim, "image": {"patcher": "linear"}}
    never = {"checkpoint.every_steps": 10**6, "evaluate.every_steps": 10**6, "sample.prompts": (), "data.validation_sources": ()}
    sizes = {"data.sequence_length": args.tokens, "train.global_batch_sequences": 2, "train.steps": args.steps + WARM_UP_STEPS}
    config = world_config(folder, {**never, **sizes, "data.num_workers": 1})
    return Config.model_validate({**config.model_dump(), "model": model})


def plain_steps(config: Config) -> Iterator[float]:
    """A loop as one would write it by hand; yields after every step."""
    loader = Loader(config, load_tokenizer(config), "train", 0, 1)
    batches: list[Batch] = [parts[0] for parts, _ in itertools.islice(loader.iterate(0), config.train.steps)]
    loader.close()
    model = build_model(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optimizer.learning_rate, betas=(0.9, 0.95), fused=True)
    for batch in batches:
        terms = model(batch)
        loss = sum(term.sum / term.count.clamp(min=1) for term in terms.values())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield loss.item()


class Clock:
    """The trainer's reporter: after each of its steps it does one of the plain loop, and times both."""

    def __init__(self, plain: Iterator[float]) -> None:
        self.plain = plain
        self.engine_times: list[tuple[float, float]] = []
        self.plain_times: list[tuple[float, float]] = []
        self._since = (0.0, 0.0)

    def step(self, values: Mapping[str, Any], due: bool) -> None:
        now = clocks()
        self.engine_times.append(difference(self._since, now))
        next(self.plain)
        self._since = clocks()
        self.plain_times.append(difference(now, self._since))

    def started(self, step: int, steps: int, run_dir: Path) -> None:
        self._since = clocks()

    def indexing(self, done: int, total: int) -> None: ...

    def event(self, text: str) -> None: ...


def clocks() -> tuple[float, float]:
    return time.perf_counter(), time.thread_time()


def difference(before: tuple[float, float], after: tuple[float, float]) -> tuple[float, float]:
    return after[0] - before[0], after[1] - before[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("steps", 40), ("dim", 256), ("layers", 6), ("tokens", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = make_config(Path(folder), args)
        torch.set_num_threads(1)
        clock, ranks = Clock(plain_steps(config)), read_ranks({})
        with process_group(ranks, config.parallel):
            trainer = build_trainer(config, ranks, clock, StopRequest())
            trainer.run()
            trainer.close()
    for index, name in enumerate(("wall", "main thread's CPU")):
        engine, plain = (statistics.median(pair[index] for pair in times[WARM_UP_STEPS:]) for times in (clock.engine_times, clock.plain_times))
        print(f"{name:18}: trainer {1000 * engine:8.2f} ms, plain loop {1000 * plain:8.2f} ms per step: {100 * (engine / plain - 1):+.1f}%")


if __name__ == "__main__":
    main()
