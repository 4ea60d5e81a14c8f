"""What metrics cost: CPU-seconds of a run's steps, and of them those in the functions that only measure, write and show.

    python tests/benchmarks/metrics_cost.py [CONFIG.yaml] [a.b=c ...]

One process, one thread, no profiler: the functions are timed by `time.thread_time` around each call, on the thread that trains. Not counted: the
gradient norm, which clipping needs, and counting the targets, which the loss is divided by.
"""

from __future__ import annotations

import functools
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from fusiontrain.cli.first_use import prepare
from fusiontrain.cli.reporters import SilentReporter
from fusiontrain.config.load import load
from fusiontrain.parallel.mesh import process_group, read_ranks
from fusiontrain.train import step, trainer
from fusiontrain.train.build import build_trainer
from fusiontrain.train.metrics import MetricsWriter
from fusiontrain.train.signals import stop_on_signals

MEASURED = [
    (trainer, "count_flops"), (step, "count_by_source"), (step, "source_numbers"), (step, "loss_sums"), (trainer, "gather_totals"),
    (trainer, "step_values"), (MetricsWriter, "bad_samples"), (MetricsWriter, "write"), (MetricsWriter, "board"), (trainer, "memory_gib"),
]  # fmt: skip
DEFAULTS = ["evaluate.every_steps=null", "sample.every_steps=null", "train.threads=1", "train.steps=21", "checkpoint.every_steps=1000"]


class Clock(SilentReporter):
    """CPU-seconds of this thread after the first step, which is slower."""

    def step(self, values: Any, due: bool) -> None:
        if values["step"] == 1:
            self.started = time.thread_time()
            spent.clear()
        self.ended = time.thread_time()


spent: Counter[str] = Counter()


def timed(owner: Any, name: str) -> None:
    function = getattr(owner, name)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        started = time.thread_time()
        try:
            return function(*args, **kwargs)
        finally:
            spent[name] += time.thread_time() - started

    setattr(owner, name, call)


def main() -> None:
    config_file = sys.argv[1] if len(sys.argv) > 1 else "configs/debug/lmfusion.yaml"
    with tempfile.TemporaryDirectory() as folder:
        config = load(config_file, [*DEFAULTS, f"run.dir={Path(folder) / 'run'}", *sys.argv[2:]])
        for owner, name in MEASURED:
            timed(owner, name)
        clock, ranks = Clock(), read_ranks({})
        prepare(config, ranks)
        with process_group(ranks, config.parallel), stop_on_signals() as stop:
            run = build_trainer(config, ranks, clock, stop)
            run.run()
            run.close()
    whole, metrics, steps = clock.ended - clock.started, sum(spent.values()), config.train.steps - 1
    for name, seconds in spent.most_common():
        print(f"{name:<20}{1000 * seconds / steps:8.3f} ms per step")
    print(f"{'metrics':<20}{1000 * metrics / steps:8.3f} ms per step of {1000 * whole / steps:.1f} ms CPU: {metrics / whole:.2%}")


if __name__ == "__main__":
    main()
