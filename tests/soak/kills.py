"""Kills a training at random moments, over and over, and compares what is left with a run that nobody disturbed.

    python tests/soak/kills.py --kills 200 --ranks 1,2,4 --out runs/soak

Per number of ranks, and once with a number that changes at every start: a reference run, then runs of the same configuration that are killed
with SIGKILL (a rank, all ranks, torchrun's agent) or asked to stop with SIGTERM, while they start, in a step, in a save, just after one, or
when one is announced, and go on, by torchrun's own restart or by starting the command again. After every kill the newest complete checkpoint
must be no older than before or than announced, and the run must go on from it; in the end every line of metrics.jsonl must be there once, with
the numbers of the reference: exactly, or within TOLERANCE where the number of ranks changed. Results are kept in OUT/state.json, and the next
call goes on from there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fusiontrain.config.load import to_yaml
from fusiontrain.testing.training import world_config
from fusiontrain.train.checkpoint import checkpoint_step, list_checkpoints
from fusiontrain.train.metrics import read_metrics

ROOT = Path(__file__).parents[2]
LIMIT_SECONDS = 180.0
"""Whatever is waited for takes longer than this only if something hangs."""

TOLERANCE = 1e-4
COMPARED = re.compile(r"(loss|tokens|targets|validation)(/.*)?|step|grad_norm|lr|flops|skipped|epoch")
FINISHED = 48
"""Steps of a run."""

KINDS = {False: ("process", "process", "stop"), True: ("rank", "rank", "ranks", "agent", "agent", "stop")}
"""What is done, by whether there is an agent. stop: SIGTERM; all others: SIGKILL."""

MOMENTS = ("start", "step", "step", "save", "save", "save", "saved", "announced")


class Lost(AssertionError):
    """A run that hung, ended in another way than it should, or did other steps than the reference."""


@dataclass(frozen=True)
class Kill:
    """One kill: how many ranks there were, whom it hit, when, and what lay on the disk then."""

    ranks: int
    kind: str
    moment: str
    newest: int
    unfinished_save: bool


@dataclass
class State:
    """What all calls so far have done. kills: of runs that were compared and found equal."""

    kills: list[Kill] = field(default_factory=list)
    runs: int = 0
    lines_compared: int = 0

    @classmethod
    def read(cls, path: Path) -> State:
        if not path.exists():
            return cls()
        values = json.loads(path.read_text())
        return cls([Kill(**kill) for kill in values["kills"]], values["runs"], values["lines_compared"])

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1))

    def summary(self) -> dict[str, Any]:
        counts = {name: dict(Counter(str(getattr(kill, name)) for kill in self.kills)) for name in ("ranks", "kind", "moment")}
        unfinished = sum(kill.unfinished_save for kill in self.kills)
        return {"kills": len(self.kills), "runs": self.runs, "lines_compared": self.lines_compared, **counts, "unfinished_save": unfinished}


class Run:
    """One run folder, and the command that works on it."""

    def __init__(self, config: Path, folder: Path, overrides: tuple[str, ...] = ()) -> None:
        self.config, self.folder, self.overrides = config, folder, overrides
        self.output = folder.with_name(folder.name + ".log")
        self.process: subprocess.Popen | None = None
        self.ranks = 0
        self.expected: tuple[int, int] | None = (0, 0)
        shutil.rmtree(folder, ignore_errors=True)
        self.output.unlink(missing_ok=True)

    def start(self, ranks: int) -> None:
        """Start, or go on, with so many ranks: one alone, more under launch/torchrun.sh."""
        self.ranks = ranks
        command = [sys.executable, "-m", "fusiontrain", "train"] if ranks == 1 else ["bash", str(ROOT / "launch/torchrun.sh")]
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "NPROC_PER_NODE": str(ranks),
            "MAX_RESTARTS": "100",
        }
        arguments = [str(self.config), f"run.dir={self.folder}", *self.overrides]
        with self.output.open("ab") as output:
            self.process = subprocess.Popen([*command, *arguments], env=environment, stdout=output, stderr=output, start_new_session=True)

    def workers(self) -> list[int]:
        """The processes of the ranks, as far as they have started."""
        assert self.process is not None
        return [self.process.pid] if self.ranks == 1 else children(self.process.pid)

    def starts(self) -> list[int]:
        """The steps that trainings began after, one per start that got so far."""
        text = self.output.read_text(errors="replace") if self.output.exists() else ""
        return [int(step) for step in re.findall(r"^training \S+ from step (\d+)", text, re.MULTILINE)]

    def goes_on(self) -> None:
        """Wait until the training has begun again after the last kill. Raises Lost unless it goes on from what was the newest checkpoint."""
        if self.expected is None:
            return
        (starts, newest), self.expected = self.expected, None
        self.until(lambda: len(self.starts()) > starts, "the training goes on", ended=self.ended_well())
        if not newest <= self.starts()[-1] <= self.newest():
            raise Lost(f"{self.folder}: goes on from step {self.starts()[-1]}, but checkpoint {newest} was complete; see {self.output}")

    def ended_well(self) -> bool:
        return self.process is not None and self.process.poll() == 0

    def newest(self) -> int:
        """The step of the newest complete checkpoint; 0 before the first."""
        found = list_checkpoints(self.folder / "checkpoints")
        return checkpoint_step(found[-1]) if found else 0

    def announced(self) -> int:
        """The step of the last checkpoint that the run has called saved; 0 before the first."""
        text = self.output.read_text(errors="replace") if self.output.exists() else ""
        return max((int(step) for step in re.findall(r"^step (\d+): saved ", text, re.MULTILINE)), default=0)

    def unfinished(self) -> bool:
        return any((self.folder / "checkpoints").glob("step-????????.tmp"))

    def last_step(self) -> int:
        """The last step that metrics.jsonl has whole; 0 before the first."""
        path = self.folder / "metrics.jsonl"
        steps = re.findall(r'^\{"step": (\d+),.*\}$', path.read_text(), re.MULTILINE) if path.exists() else []
        return int(steps[-1]) if steps else 0

    def wait(self) -> int:
        """The exit code, once the process has ended."""
        process = self.process
        assert process is not None
        self.until(lambda: process.poll() is not None, "the end of the run", ended=True)
        return process.returncode

    def until(self, condition: Callable[[], bool], what: str, ended: bool = False) -> None:
        """Wait for `condition`. Raises Lost where it takes too long, or where the process ends first unless `ended`."""
        deadline = time.monotonic() + LIMIT_SECONDS
        assert self.process is not None
        while not condition():
            if not ended and self.process.poll() is not None and not condition():
                raise Lost(f"{self.folder}: ended with {self.process.returncode} before {what}; see {self.output}")
            if time.monotonic() > deadline:
                raise Lost(f"{self.folder}: hangs before {what}; see {self.output}")
            time.sleep(0.005)

    def close(self) -> None:
        """End whatever still runs of this session's processes."""
        if self.process is not None and self.process.poll() is None:
            for pid in [*self.workers(), self.process.pid]:
                send(pid, signal.SIGKILL)
            self.process.wait()


def children(parent: int) -> list[int]:
    """Processes that `parent` started and that still run (no zombies)."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, ppid = path.read_text().rpartition(")")[2].split()[:2]
        except OSError:  # it ended meanwhile
            continue
        if int(ppid) == parent and state != "Z":
            found.append(int(path.parent.name))
    return sorted(found)


def send(pid: int, number: signal.Signals) -> None:
    """A signal to a process that may be gone."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def gone(pid: int) -> bool:
    """Whether a process has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def disturb(run: Run, kind: str, moment: str, rng: random.Random, pick_ranks: Callable[[], int]) -> Kill | None:
    """Kill once and see to it that the run goes on. None where it was done before the moment came, or there was nothing to kill yet."""
    assert run.process is not None
    try:
        await_moment(run, moment, rng)
    except Lost:
        if run.ended_well():
            return None
        raise
    workers, before, training = run.workers(), max(run.newest(), run.announced()), run.expected is None
    kill = Kill(run.ranks, kind, moment, before, run.unfinished())
    agent = [run.process.pid]
    targets = {"rank": rng.sample(workers, min(1, len(workers))), "ranks": workers}.get(kind, agent)
    for pid in targets:
        send(pid, signal.SIGTERM if kind == "stop" else signal.SIGKILL)
    if targets == agent:
        code = run.wait()
        run.until(lambda: all(map(gone, workers)), f"the end of ranks without an agent ({workers})", ended=True)
        if run.newest() == FINISHED:
            return None
        if kind == "stop" and training and (run.newest() != run.last_step() or (run.ranks == 1 and code != 0)):
            raise Lost(f"{run.folder}: stopped after step {run.last_step()} with code {code}, but saved step {run.newest()}; see {run.output}")
    if run.newest() < before:
        raise Lost(f"{run.folder}: checkpoint {before} was complete before the kill and is not after it")
    if training:  # else it has not yet gone on after the kill before
        run.expected = (len(run.starts()), run.newest())
    if targets == agent:
        run.start(pick_ranks())
    return kill if targets else None


def await_moment(run: Run, moment: str, rng: random.Random) -> None:
    """Return at a random moment of that kind."""
    if moment == "start":
        time.sleep(rng.uniform(0, 3.0 + 2.0 * run.ranks))
        if len(run.starts()) > (run.expected or (math.inf,))[0]:
            run.goes_on()
        return
    run.goes_on()
    base = run.newest()
    if moment == "step":
        target = base + rng.randint(1, 4)
        run.until(lambda: run.last_step() >= target, f"step {target}")
        time.sleep(rng.uniform(0, 0.1))
    elif moment == "save":
        run.until(run.unfinished, "a save")
        time.sleep(rng.uniform(0, 0.05))
    elif moment == "saved":
        run.until(lambda: run.newest() > base, "a checkpoint")
        time.sleep(rng.uniform(0, 0.02))
    else:
        run.until(lambda: run.announced() > base, "the word of a checkpoint")


def compare(reference: list[dict[str, Any]], found: list[dict[str, Any]], tolerance: float, name: Path) -> int:
    """The number of lines, all of which are equal. Raises Lost for the first difference. A stop skips an evaluation that is due."""
    if [line["step"] for line in found] != [line["step"] for line in reference]:
        raise Lost(f"{name}: has the steps {[line['step'] for line in found]}")
    for expected, line in zip(reference, found, strict=True):
        for key in filter(COMPARED.fullmatch, expected):
            if key.startswith("validation") and key not in line:
                continue
            one, two = expected[key], line.get(key)
            if one != two and (None in (one, two) or abs(one - two) > tolerance * max(1.0, abs(one))):
                raise Lost(f"{name}: step {line['step']} has {key} {two} instead of {one}")
    return len(found)


def make_config(folder: Path) -> Path:
    """A tiny LMFusion that saves every second step."""
    path = folder / "config.yaml"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        values = {"train.steps": FINISHED, "checkpoint.every_steps": 2, "evaluate.every_steps": 6, "sample.prompts": (), "train.log_every_steps": 1}
        path.write_text(to_yaml(world_config(folder, {**values, "parallel.timeout_seconds": 60})))
    return path


def reference_metrics(folder: Path, ranks: int) -> list[dict[str, Any]]:
    """The metrics of a run of so many ranks that is left alone."""
    done = folder / f"reference-{ranks}"
    if not (done / "metrics.jsonl").exists() or len(read_metrics(done / "metrics.jsonl")) < FINISHED:
        run = Run(make_config(folder), done)
        run.start(ranks)
        if run.wait() != 0:
            raise Lost(f"the reference failed; see {run.output}")
    return read_metrics(done / "metrics.jsonl")


def killed_run(folder: Path, ranks: list[int], kills: int, rng: random.Random, plan: list[tuple[str, str]] | None = None) -> tuple[list[Kill], int]:
    """One run that is killed so often (or as `plan` says: kind, moment), unless it is done before, and the lines in which it equals the reference."""
    reference = reference_metrics(folder, ranks[0])
    run = Run(make_config(folder), folder / "killed")
    done: list[Kill] = []
    try:
        run.start(rng.choice(ranks))
        for number in range(kills):
            kind, moment = plan[number] if plan else (rng.choice(KINDS[run.ranks > 1]), rng.choice(MOMENTS))
            kill = disturb(run, kind, moment, rng, lambda: rng.choice(ranks))
            if kill is None and run.process is not None and run.process.poll() is not None:
                break
            if kill is not None:
                done.append(kill)
        if run.wait() != 0 and run.newest() == FINISHED:  # hit while it was leaving: it is done, as starting it again must find
            run.start(ranks[0])
        if run.wait() != 0:
            raise Lost(f"{run.folder}: the last start ended with {run.process and run.process.returncode}; see {run.output}")
        run.goes_on()
        return done, compare(reference, read_metrics(run.folder / "metrics.jsonl"), 0.0 if len(ranks) == 1 else TOLERANCE, run.folder)
    finally:
        run.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="over all calls")
    parser.add_argument("--ranks", default="1,2,4", help="numbers of ranks to try; with several also one that changes")
    parser.add_argument("--kills-per-run", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("runs/soak"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    worlds = [[int(ranks)] for ranks in args.ranks.split(",")]
    if len(worlds) > 1:
        worlds.append([ranks for (ranks,) in worlds])
    args.out.mkdir(parents=True, exist_ok=True)
    state = State.read(args.out / "state.json")
    while len(state.kills) < args.kills:
        ranks = worlds[state.runs % len(worlds)]
        kills, lines = killed_run(args.out.absolute(), ranks, args.kills_per_run, random.Random(f"{args.seed} {state.runs}"))
        state = State([*state.kills, *kills], state.runs + 1, state.lines_compared + lines)
        state.write(args.out / "state.json")
        print(f"run {state.runs} on {ranks} ranks: {len(kills)} kills, {lines} steps equal; {len(state.kills)} kills so far", flush=True)
    print(json.dumps(state.summary(), indent=1))


if __name__ == "__main__":
    main()
