"""Carrying a study out: the ground, then one training after another, each resumed where it stopped, then the table."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusiontrain.config.load import load, to_yaml
from fusiontrain.studies.child import Progress, find_config, read_metrics, train
from fusiontrain.studies.ground import Ground
from fusiontrain.studies.measure import Finished, measure
from fusiontrain.studies.report import write_report
from fusiontrain.studies.study import Scale, Study, Variant, judge_expectations
from fusiontrain.utils.errors import UserError

CONFIG = "quickstart.yaml"


@dataclass(frozen=True)
class Work:
    """A study at a scale. Its table has a folder of its own; the ground and the trainings lie beside it and are shared by all studies of the scale, so that
    a training which two tables need is done once. overrides: of every training."""

    study: Study
    scale: Scale
    overrides: tuple[str, ...]
    out: Path
    processes: int
    seed: int
    say: Callable[[str], None]
    progress: Progress

    @property
    def ground(self) -> Ground:
        return Ground(self.out / self.scale.name / "ground", self.seed)

    @property
    def folder(self) -> Path:
        return self.out / self.scale.name / self.study.name

    def run(self) -> dict[str, Any]:
        """Everything that is not done yet; returns the report, which is written too. Raises UserError where a training fails."""
        self._make_ground()
        finished = {variant.name: self._train(variant) for variant in self.study.variants}
        baseline = finished.get(self.study.baseline or "")
        self.say("measuring")
        values = {name: {column: measure(column, run, baseline) for column in self.study.columns} for name, run in finished.items()}
        self.folder.mkdir(parents=True, exist_ok=True)
        return write_report(self.folder, self.study, self.scale, finished, values, judge_expectations(self.study, values))

    def _make_ground(self) -> None:
        done = self.ground.folder / "done"
        if done.is_file():
            return
        if not self.ground.tokenizer.is_file():
            self.say(f"making a demo world of {self.scale.documents:,} documents")
            self.ground.make_world(self.scale.documents)
        self.say("pretraining a text-only Llama")
        self.ground.pretrain(self.scale.llama, self.processes, self.progress)
        done.touch()

    def settings(self, variant: Variant) -> tuple[str, ...]:
        """What a training of the study changes in `configs/quickstart.yaml`. Trainings whose configs are equal are one."""
        ground = self.ground
        places = (f"model.base={ground.llama}", f"data.tokenizer.path={ground.tokenizer}", "sample.prompts=[]")
        return (*ground.sources("pictures"), *places, *self.scale.overrides, *self.study.common, *variant.overrides, *self.overrides)

    def _train(self, variant: Variant) -> Finished:
        settings = self.settings(variant)
        config = load(find_config(CONFIG), settings)
        text = to_yaml(config).replace(str(self.ground.folder), "")  # wherever that lies, it is the same
        run = self.out / self.scale.name / "trainings" / hashlib.sha256(text.encode()).hexdigest()[:12]
        steps, rows = config.train.steps, read_metrics(run)
        if not (run / "checkpoints" / f"step-{steps:08d}").is_dir():
            self.say(f"{variant.name}: training" + (f" from step {rows[-1]['step']} on" if rows else ""))
            train(find_config(CONFIG), run, settings, self.processes, self.progress)
            rows = read_metrics(run)
        if rows[-1]["step"] < steps:
            raise UserError(f"{run}: the training ended at step {rows[-1]['step']} of {steps}: run the same command again to go on")
        return Finished(run, rows, self.ground, self.scale.judged)
