"""Threads against processes, taken in turns: `python tests/benchmarks/loader_throughput.py --rounds 5`. Medians over the rounds.

Documents per CPU-second of trainer and workers together, per second, and the milliseconds that 1,000 small torch operations take the trainer while
batches are built: each gives Python's lock away and has to get it back from the threads.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

from fusiontrain.data.loader import Loader
from fusiontrain.data.tokenizer import load_tokenizer
from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.shards import write_photo_shards

TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pids: list[int]) -> float:
    """User and system time of this process and of those."""
    used = time.process_time()
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        used += (int(fields[11]) + int(fields[12])) / TICKS
    return used


def measure(shards: str, executor: str, workers: int, documents: int) -> tuple[float, float, float]:
    """(documents per CPU-second, documents per second, milliseconds per 1,000 operations)."""
    config = tiny_config({
        "data.sources": [{"path": shards}], "data.executor": executor, "data.num_workers": workers,
        "data.sequence_length": 8192, "data.image": {"size": 256, "patch_size": 16},
        "train.global_batch_sequences": 1,
    })  # fmt: skip
    with contextlib.closing(Loader(config, load_tokenizer(config), "train", 0, 1)) as loader:
        batches = loader.iterate(0)
        for _ in range(24):  # workers start, the first windows are planned, every slot is used once
            next(batches)
        done, cpu, started = 0, cpu_seconds(loader.workers.pids), time.monotonic()
        operations, number = 0.0, torch.zeros(8)
        while done < documents:
            done += sum(len(batch.sources) for batch in next(batches)[0])
            before = time.perf_counter()
            for _ in range(200):
                number.add_(1)
            operations += time.perf_counter() - before
        steps = number[0].item() / 1000
        return done / (cpu_seconds(loader.workers.pids) - cpu), done / (time.monotonic() - started), 1000 * operations / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--documents", type=int, default=1000)
    parser.add_argument("--side", type=int, default=256, help="of the stored JPEGs, in pixels")
    args = parser.parse_args()
    folder = Path(tempfile.gettempdir()) / f"fusiontrain-loader-throughput-{args.side}"
    if not folder.is_dir():
        write_photo_shards(folder, shards=4, samples=100, side=args.side)
    settings = [("threads", 0), ("threads", 1), ("threads", 2), ("processes", 1), ("processes", 2)]
    found: dict[tuple[str, int], list[tuple[float, float, float]]] = {setting: [] for setting in settings}
    for number in range(args.rounds):
        for setting in settings[number % len(settings) :] + settings[: number % len(settings)]:
            found[setting].append(measure(str(folder), *setting, args.documents))
    print("executor   workers  documents/CPU-s  documents/s  ms/1,000 operations")
    for (executor, workers), rows in found.items():
        per_cpu, per_second, operations = (statistics.median(column) for column in zip(*rows, strict=True))
        print(f"{executor:9}  {workers:7d}  {per_cpu:15.0f}  {per_second:11.0f}  {operations:19.1f}")


if __name__ == "__main__":
    main()
