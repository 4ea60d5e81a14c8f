"""`fusiontrain demo`: a text-only Llama is pretrained, then learns to paint and to caption, with its language untouched."""

from __future__ import annotations

import argparse
import contextlib
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusiontrain.cli.common import ProgressLines, add_json_argument, note, print_json
from fusiontrain.cli.demo_report import TARGETS, write_pictures, write_report
from fusiontrain.studies.child import find_config, read_metrics, train
from fusiontrain.utils.errors import UserError

if TYPE_CHECKING:
    from fusiontrain.generate.score import Judged
    from fusiontrain.studies.ground import Ground
    from fusiontrain.studies.text_drift import TextDrift

MARKER = "fusiontrain-demo"
"""A file that says: this folder was made by the demo, which may empty it."""

EDGE_STEPS = 20
"""Losses "at the start" and "at the end" are means over this many steps."""


@dataclass(frozen=True)
class Size:
    """How much work a demo is. judged: validation prompts painted and validation pictures captioned."""

    documents: int
    judged: int
    sheet: int
    overrides_llama: tuple[str, ...] = ()
    overrides_fusion: tuple[str, ...] = ()
    replay_steps: int = 20


FULL = Size(documents=60_000, judged=128, sheet=36)
FAST = Size(
    documents=600,
    judged=8,
    sheet=8,
    overrides_llama=("train.steps=20", "optimizer.warmup_steps=5", "evaluate.batches=1"),
    overrides_fusion=(
        *("train.steps=30", "optimizer.warmup_steps=5", "evaluate.every_steps=15", "evaluate.batches=1", "sample.every_steps=15"),
        *("sample.steps=4", "checkpoint.every_steps=5"),
    ),
    replay_steps=5,
)


def add_parser(subparsers: Any) -> None:
    """Adds `demo` to the program's subparsers."""
    parser = subparsers.add_parser("demo", help="the whole path on one machine: world, Llama, LMFusion, resume, pictures, report")
    parser.add_argument("--out", default="runs/demo", help="folder for everything the demo makes (default: runs/demo)")
    parser.add_argument("--fast", action="store_true", help="a one-minute version that shows the path and learns next to nothing")
    parser.add_argument("--processes", type=int, default=2, help="ranks of the trainings (default: 2)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", metavar="a.b=c", nargs="*", help="overrides for the LMFusion training, such as objective.image=ddpm")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Exit code 0; UserError for a folder that is not the demo's, or a stage that failed."""
    demo = Demo(Path(args.out), FAST if args.fast else FULL, args.processes, args.seed, tuple(args.overrides))
    report = demo.run()
    if args.json:
        print_json(report)
    return 0


@dataclass
class Demo:
    """One run of the demo; every stage leaves its results in `out`."""

    out: Path
    size: Size
    processes: int
    seed: int
    overrides: tuple[str, ...]
    seconds: dict[str, float] = field(default_factory=dict)
    progress: ProgressLines = field(default_factory=ProgressLines)

    def run(self) -> dict[str, Any]:
        started = time.monotonic()
        self._empty_folder()
        with self._stage("make the demo world"):
            self.ground.make_world(self.size.documents)
        with self._stage("pretrain a text-only Llama"):
            self.ground.pretrain(self.size.overrides_llama, self.processes, self.progress)
        with self._stage("train LMFusion, first half, then SIGTERM"):
            stop = self._train_fusion(half=True)
        with self._stage("replay the steps before the stop"):
            same, compared = self._replay(stop)
        with self._stage("resume LMFusion"):
            self._train_fusion(half=False)
        with self._stage("compare text logits with the Llama's"):
            drift = self._text_drift()
        with self._stage("paint, caption and judge"):
            judged, samples = self._judge()
        rows = read_metrics(self.fusion)
        report = {
            "text_logits_identical": drift.identical,
            "resume_identical": same,
            **judged.summary,
            **{f"loss/{name}": _start_and_end(rows, f"loss/{name}") for name in ("text", "image")},
            "tokens_per_second": _mean_of(rows, "tokens_per_second"),
            "seconds": time.monotonic() - started,
            "samples": samples,
            "scores": judged.details,
            "stage_seconds": self.seconds,
            "objective": self._fusion_config().objective.image,
            "steps": len(rows),
            "stopped_after_step": stop,
            "steps_compared": compared,
            "text_tokens_compared": drift.tokens,
            "validation": {key: value for key, value in rows[-1].items() if key.startswith("validation/")},
        }
        write_report(self.out, report)
        self._say_results(report)
        return report

    # ---------------------------------------------------------------- places

    @property
    def ground(self) -> Ground:
        from fusiontrain.studies.ground import Ground

        return Ground(self.out, self.seed)

    @property
    def fusion(self) -> Path:
        return self.out / "lmfusion"

    def _fusion_overrides(self) -> tuple[str, ...]:
        return (*self.ground.sources("pictures"), f"model.base={self.ground.llama}", *self.size.overrides_fusion, *self.overrides)

    def _fusion_config(self) -> Any:
        from fusiontrain.config.load import load

        return load(find_config("quickstart.yaml"), self._fusion_overrides())

    def _empty_folder(self) -> None:
        if self.out.exists() and any(self.out.iterdir()):
            if not (self.out / MARKER).is_file():
                raise UserError(f"{self.out}: is not empty and was not made by the demo: give another folder with --out")
            shutil.rmtree(self.out)
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / MARKER).write_text("Made by `fusiontrain demo`, which empties this folder when it runs again.\n")

    # ---------------------------------------------------------------- stages

    def _train_fusion(self, half: bool) -> int:
        """The first half, ended by SIGTERM, or what is left of the training. Returns the step it ended after."""
        config = find_config("quickstart.yaml")
        every = self._fusion_config().checkpoint.every_steps
        middle = self._fusion_config().train.steps // 2 // every * every + self.size.replay_steps
        stop = middle if half else None
        train(config, self.fusion, self._fusion_overrides(), self.processes, self.progress, stop)
        return int(read_metrics(self.fusion)[-1]["step"])

    def _replay(self, stop: int) -> tuple[bool, int]:
        """Resume a copy of the run from the periodic checkpoint before the stop, and compare the steps up to it."""
        from fusiontrain.train.checkpoint import checkpoint_step, list_checkpoints

        before = [path for path in list_checkpoints(self.fusion / "checkpoints") if checkpoint_step(path) < stop]
        if not before:
            raise UserError(f"{self.fusion}: has no checkpoint before step {stop}, where it was stopped")
        replay = self.out / "replay"
        config = find_config("quickstart.yaml")
        train(config, replay, self._fusion_overrides(), self.processes, self.progress, stop, resume=str(before[-1]))
        return _same_steps(self.fusion, replay)

    def _text_drift(self) -> TextDrift:
        from fusiontrain.studies.text_drift import text_drift

        return text_drift(self.fusion, self.ground.llama)

    def _judge(self) -> tuple[Judged, list[dict[str, str]]]:
        from fusiontrain.generate.score import judge_model
        from fusiontrain.train.inference import load_for_inference

        trained = load_for_inference(self.fusion)
        judged = judge_model(trained.model, trained.tokenizer, trained.config, self.ground.world, self.size.judged, self.seed)
        return judged, write_pictures(self.out, judged.prompts, judged.pictures, self.size.sheet)

    # ---------------------------------------------------------------- words

    @contextlib.contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        note(f"[{len(self.seconds) + 1}/7] {name}")
        started = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - started
        note(f"      done in {self.seconds[name]:.0f} s")

    def _say_results(self, report: dict[str, Any]) -> None:
        scores = ", ".join(f"{name.removesuffix('_accuracy')} {report[name]:.2f}" for name in TARGETS)
        note(f"\nscores on validation prompts: {scores}")
        note(f"text logits identical to the Llama's: {report['text_logits_identical']}; resume identical: {report['resume_identical']}")
        note(f"report: {self.out / 'report.md'}, {self.out / 'report.json'}; pictures: {self.out / 'contact_sheet.png'}")
        note(f"TensorBoard: tensorboard --logdir {self.fusion / 'tensorboard'}")


def _start_and_end(rows: Sequence[dict[str, Any]], key: str) -> dict[str, float | None]:
    edge = min(EDGE_STEPS, max(1, len(rows) // 4))
    return {"start": _mean_of(rows[:edge], key), "end": _mean_of(rows[-edge:], key)}


def _mean_of(rows: Sequence[dict[str, Any]], key: str) -> float | None:
    """Mean of the values of `key` that are numbers; None without one."""
    values = [row[key] for row in rows if isinstance(row.get(key), int | float)]
    return sum(values) / len(values) if values else None


def _same_steps(original: Path, replay: Path) -> tuple[bool, int]:
    """Whether every step that both runs recorded has bitwise equal losses and gradient norm, and how many such steps there are."""
    keys = ("loss", "loss/text", "loss/image", "grad_norm", "lr", "tokens")
    rows = {row["step"]: [row[key] for key in keys] for row in read_metrics(original)}
    pairs = [(rows[row["step"]], [row[key] for key in keys]) for row in read_metrics(replay) if row["step"] in rows]
    return bool(pairs) and all(before == after for before, after in pairs), len(pairs)
