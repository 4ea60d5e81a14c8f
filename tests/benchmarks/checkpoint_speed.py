"""How fast checkpoints are saved and loaded, against plain writes and reads of the same bytes; how long a save stalls training; what memory it takes.

    python tests/benchmarks/checkpoint_speed.py [--mib 1024] [--repeats 5] [--tokens 2048] [--only NAME] [--folder DIR]

One process. Plain writing is open, write and fsync of every tensor's bytes into one new file, and the deletion of the one before, which a save does
too; plain reading is one pass through a buffer, of a file that was put out of the page cache before each pass, as the checkpoint's are. The best of
`--repeats` of each, taken in turns, so that what else the machine does falls on both alike. The stall is what the loop stands still for, at the
save and before the optimizer's step that follows it, in steps that are a forward and backward over `--tokens` tokens through every weight (a stack
of 2048 x 2048 layers), AdamW, and a save; their median, with the seconds that such a step takes. Peak memory is that of a process that takes three
such steps with and without saving after each.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from fusiontrain.parallel.mesh import Ranks
from fusiontrain.testing.configs import tiny_config
from fusiontrain.train.checkpoint import load_checkpoint
from fusiontrain.train.saving import Saver
from fusiontrain.train.state import TrainState, optimizer_tensors

WIDTH = 2048


class Run:
    """Parameters with AdamW's state, `mib` in all, and their saver."""

    def __init__(self, folder: Path, mib: int, asynchronous: bool) -> None:
        count = max(1, mib * 2**20 // (3 * 4 * WIDTH**2))
        self.parameters = {f"weight.{number}": torch.nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5) for number in range(count)}
        self.optimizer = torch.optim.AdamW(self.parameters.values())
        self.model = {name: parameter.detach() for name, parameter in self.parameters.items()}
        self.tensors = {"model": self.model, "optimizer": optimizer_tensors(self.optimizer, self.parameters)}
        for moment in (tensor for name, tensor in self.tensors["optimizer"].items() if tensor.ndim):
            moment.uniform_()
        config = tiny_config({"run.dir": str(folder), "checkpoint.asynchronous": asynchronous, "checkpoint.keep_last": 1})
        self.saver = Saver(config, Ranks(), self.tensors, {}, self.optimizer, lambda text: None)
        self.checkpoints = folder / "checkpoints"

    def all(self) -> list[torch.Tensor]:
        return [tensor for part in self.tensors.values() for tensor in part.values()]

    def step(self, tokens: int) -> None:
        """A forward and backward through every weight, and an update."""
        hidden = torch.randn(tokens, WIDTH)
        for parameter in self.parameters.values():
            hidden = torch.nn.functional.silu(hidden @ parameter)
        hidden.square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def timed(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def write_plainly(tensors: list[torch.Tensor], path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        for tensor in tensors:
            view = memoryview(tensor.reshape(-1).numpy()).cast("B")
            for first in range(0, len(view), 1 << 20):
                file.write(view[first : first + (1 << 20)])
        os.fsync(file.fileno())
    for older in path.parent.glob("plain-*"):
        if older != path:
            older.unlink()


def read_plainly(path: Path) -> None:
    buffer = bytearray(1 << 22)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def forget(folder: Path) -> None:
    """Put files out of the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def speed(folder: Path, mib: int, repeats: int) -> dict[str, float]:
    """Best times in seconds."""
    run = Run(folder, mib, False)
    times: dict[str, list[float]] = {name: [] for name in ("plain write", "save", "plain read", "load")}
    for step in range(1, repeats + 1):
        plain = folder / f"plain-{step}"
        times["plain write"].append(timed(lambda plain=plain: write_plainly(run.all(), plain)))
        times["save"].append(timed(lambda step=step: run.saver.save(TrainState(step=step), {})))
        forget(folder)
        times["plain read"].append(timed(lambda plain=plain: read_plainly(plain)))
        times["load"].append(timed(lambda step=step: load_checkpoint(run.checkpoints / f"step-{step:08d}", run.tensors, Ranks())))
    return {name: min(values) for name, values in times.items()}


def stall(folder: Path, mib: int, repeats: int, tokens: int) -> dict[str, float]:
    """Median stall of a save in the loop, by mode, and of the time of a step without it."""
    found = {}
    for asynchronous in (False, True):
        run = Run(folder / str(asynchronous), mib, asynchronous)
        stalls, steps = [], []
        for step in range(1, repeats + 1):
            run.saver.save(TrainState(step=step), {})
            seconds = timed(lambda run=run: run.step(tokens))
            stalls.append(run.saver.look()[1])
            run.saver.wait()
            steps.append(seconds - (stalls[-1] if asynchronous else 0.0))
        run.saver.close()
        mode = "asynchronous" if asynchronous else "synchronous"
        found |= {f"stall, {mode}": median(stalls), f"step, {mode}": median(steps)}
    return found


def peak_mib(mib: int, mode: str, tokens: int) -> float:
    """Most memory of a process that takes three steps and, unless `mode` is none, saves after each."""
    command = [sys.executable, __file__, "--mib", str(mib), "--tokens", str(tokens), "--peak", mode]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_peak(folder: Path, mib: int, mode: str, tokens: int) -> None:
    run = Run(folder, mib, mode == "asynchronous")
    for step in range(1, 4):
        run.step(tokens)
        if mode != "none":
            run.saver.save(TrainState(step=step), {})
    run.step(tokens)
    run.saver.close()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)


def report_speed(folder: Path, args: argparse.Namespace) -> None:
    best = speed(folder, args.mib, args.repeats)
    for name, seconds in best.items():
        print(f"{name:20s} {seconds:7.3f} s {args.mib / seconds:8.0f} MiB/s")
    print(f"save: {best['plain write'] / best['save']:.0%} of plain writing; load: {best['plain read'] / best['load']:.0%} of plain reading")


def report_stall(folder: Path, args: argparse.Namespace) -> None:
    found = stall(folder, args.mib, args.repeats, args.tokens)
    for name, seconds in found.items():
        print(f"{name:20s} {seconds:7.3f} s")
    print(f"asynchronous: {found['stall, asynchronous'] / found['stall, synchronous']:.1%} of the synchronous stall")


def report_memory(folder: Path, args: argparse.Namespace) -> None:
    peaks = {mode: peak_mib(args.mib, mode, args.tokens) for mode in ("none", "synchronous", "asynchronous")}
    print("peak memory: " + ", ".join(f"{mode} {peak:.0f} MiB ({peak / peaks['none']:.1%})" for mode, peak in peaks.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--only", choices=("speed", "stall", "memory"), help="default: all three")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: the system's for temporary files")
    parser.add_argument("--peak", choices=("none", "synchronous", "asynchronous"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        if args.peak:
            print_peak(folder, args.mib, args.peak, args.tokens)
            return
        for name, report in (("speed", report_speed), ("stall", report_stall), ("memory", report_memory)):
            if args.only in (None, name):
                (folder / name).mkdir()
                report(folder / name, args)
                shutil.rmtree(folder / name)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
