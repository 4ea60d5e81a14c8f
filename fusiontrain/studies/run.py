"""Carrying a study out: the ground, then one training after another, each resumed where it stopped, then the table."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fusiontrain.config.load import load, to_yaml
from fusiontrain.config.schema import Config
from fusiontrain.data.world.make import world_info
from fusiontrain.studies.child import Progress, find_config, read_metrics, train
from fusiontrain.studies.ground import Ground
from fusiontrain.studies.measure import Finished, measure
from fusiontrain.studies.overrides import SEED, fit_warmup, folder_name, refuse_fixed
from fusiontrain.studies.report import Made, write_report
from fusiontrain.studies.study import Scale, Study, Variant, judge_expectations
from fusiontrain.train.build import rank_problems
from fusiontrain.utils.errors import UserError

CONFIG = "quickstart.yaml"


@dataclass(frozen=True)
class Work:
    """A study at a scale. Its table has a folder of its own; the ground and the trainings lie beside it and are shared by all studies of the scale, so that
    a training which two tables need is done once. overrides: of every training, but not of the Llama's."""

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
        name = "ground-codes" if self.study.codes else "ground"
        return Ground(self.out / self.scale.name / name, self.seed, self.study.codes)

    @property
    def folder(self) -> Path:
        return self.out / self.scale.name / folder_name(self.study, self.effective, self.seed)

    @property
    def effective(self) -> tuple[str, ...]:
        """The overrides, and what goes with them."""
        return fit_warmup(self.scale, self.overrides)

    def run(self) -> dict[str, Any]:
        """Everything that is not done yet; returns the report, which is written too. Raises UserError where a training fails, and before anything is made
        for what is wrong with the overrides."""
        configs = self.check()
        self._make_ground(llama=any(config.model.base is not None for config in configs.values()))
        finished = {variant.name: self._train(variant, configs[variant.name]) for variant in self.study.variants}
        baseline = finished.get(self.study.baseline or "")
        self.say("measuring")
        values = {name: {column: measure(column, run, baseline) for column in self.study.columns} for name, run in finished.items()}
        self.folder.mkdir(parents=True, exist_ok=True)
        made = Made(self.effective, self.seed, {name: run.processes for name, run in finished.items()}, world_info(self.ground.world))
        return write_report(self.folder, self.study, self.scale, made, finished, values, judge_expectations(self.study, values))

    def check(self) -> dict[str, Config]:
        """The config of every variant. Raises UserError for what can be known of them without the files that they name."""
        refuse_fixed(self.study, (*self._places, "run.dir"), self.overrides)
        configs = {variant.name: load(find_config(CONFIG), self.settings(variant)) for variant in self.study.variants}
        problems = [problem for config in configs.values() for problem in rank_problems(config, self.processes)]
        if problems:
            raise UserError("\n".join(dict.fromkeys(problems)))
        return configs

    def _make_ground(self, llama: bool) -> None:
        """llama: whether a training begins with one; the others need no more than the world and its tokenizer. All seeds of trainings share them."""
        ground, done = replace(self.ground, seed=SEED), self.ground.folder / "done"
        if not ground.tokenizer.is_file():
            self.say(f"making a demo world of {self.scale.documents:,} documents")
            ground.make_world(self.scale.documents)
        if llama and not done.is_file():
            self.say("pretraining a text-only Llama")
            ground.pretrain(self.scale.llama, self.processes, self.progress)
            done.touch()

    def settings(self, variant: Variant) -> tuple[str, ...]:
        """What a training of the study changes in `configs/quickstart.yaml`. Trainings whose configs are equal are one."""
        return (*self._places, "sample.prompts=[]", *self.scale.overrides, *self.study.common, *variant.overrides, *self.effective)

    @property
    def _places(self) -> tuple[str, ...]:
        """Overrides that name the ground's files and the seed."""
        ground = self.ground
        return (*ground.sources(self.study.series), f"model.base={ground.llama}", f"data.tokenizer.path={ground.tokenizer}")

    def _train(self, variant: Variant, config: Config) -> Finished:
        text = to_yaml(config).replace(str(self.ground.folder), "")  # wherever that lies, it is the same
        run = self.out / self.scale.name / "trainings" / hashlib.sha256(text.encode()).hexdigest()[:12]
        steps, rows = config.train.steps, read_metrics(run)
        if not (run / "checkpoints" / f"step-{steps:08d}").is_dir():
            self.say(f"{variant.name}: training" + (f" from step {rows[-1]['step']} on" if rows else ""))
            train(find_config(CONFIG), run, self.settings(variant), self.processes, self.progress)
            rows = read_metrics(run)
        if rows[-1]["step"] < steps:
            raise UserError(f"{run}: the training ended at step {rows[-1]['step']} of {steps}: run the same command again to go on")
        return Finished(run, rows, self.ground, self.scale.judged)
