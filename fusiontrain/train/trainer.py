"""The loop: a batch, a step, a line of metrics, and what is due after it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fusiontrain.config.schema import Config
from fusiontrain.data.loader import Loader, LoaderState
from fusiontrain.data.stream import StreamLoader
from fusiontrain.data.tokenizer import Tokenizer
from fusiontrain.modality import table_of
from fusiontrain.models.flops import count_flops
from fusiontrain.parallel.deepspeed import Zero
from fusiontrain.parallel.fsdp import free_gathered
from fusiontrain.parallel.mesh import Ranks
from fusiontrain.parallel.reduce import gather_bytes
from fusiontrain.train.bad_steps import PASSED_OVER, Action, Verdict, is_passed_over, judge, remember
from fusiontrain.train.by_source import source_labels
from fusiontrain.train.checkpoint import Tensors
from fusiontrain.train.devices import peak_flops
from fusiontrain.train.evaluate import paint_prompts, validation_losses
from fusiontrain.train.gradients import modality_groups
from fusiontrain.train.metrics import BAD_STEPS_FILE, MetricsWriter, memory_gib
from fusiontrain.train.optim import set_learning_rate
from fusiontrain.train.progress import Progress
from fusiontrain.train.reporter import Reporter
from fusiontrain.train.saving import Saver, all_finite
from fusiontrain.train.schedule import learning_rate
from fusiontrain.train.signals import BreakOff, StopRequest
from fusiontrain.train.state import TrainState
from fusiontrain.train.step import NOTHING_DONE, StepCounts, StepResult, global_counts, objective_weights, train_step
from fusiontrain.train.step_values import StepTotals, gather_totals, step_values
from fusiontrain.types import Batch

logger = logging.getLogger(__name__)


class TrainingDiverged(RuntimeError):
    """Steps without an update came one after another, or one that `train.spike: stop` ends the run for."""


@dataclass
class Trainer:
    """The parts of a run, put together by `build.py`, and its state, which `run` moves forward.

    writer: None on all ranks but the main one. tensors and identity: what a checkpoint stores and how it is recognised. zero: with the DeepSpeed
    engine, which then owns model and optimizer.
    """

    config: Config
    ranks: Ranks
    model: nn.Module
    optimizer: torch.optim.AdamW
    tokenizer: Tokenizer
    loader: Loader | StreamLoader
    validation_loader: Loader | None
    tensors: Tensors
    identity: Mapping[str, Any]
    state: TrainState
    stop: StopRequest
    reporter: Reporter
    writer: MetricsWriter | None
    zero: Zero | None = None
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        # Indexing counts its bad samples again in every process; a resumed run has them in its state already.
        self._counted_before = self.loader.skipped if self.state.step else 0
        self._modalities = tuple(modality.name for modality in table_of(self.config.data.modalities))
        self._sources = source_labels(self.config.data.sources)
        self._groups = modality_groups(dict(self.model.named_parameters()))
        self._saver = Saver(self.config, self.ranks, self.tensors, self.identity, self.optimizer, self.reporter.event)

    def run(self) -> bool:
        """Train to `train.steps`, or until any rank is asked to stop. Returns whether it got to the end; it has saved either way."""
        config, stopping = self.config, False
        self.reporter.started(self.state.step, config.train.steps, Path(config.run.dir))
        batches = self.loader.iterate(LoaderState.from_dict(self.state.data) if self.state.data else self.state.step)
        skipped_before = self.state.skipped_samples
        while self.state.step < config.train.steps and not stopping:
            started, computed = time.perf_counter(), time.process_time()
            self.progress.enter("data", self.state.step + 1)
            micro_batches, data_state = next(batches)
            waited = time.perf_counter() - started
            rate = learning_rate(self.state.step + 1, config.optimizer, config.train.steps)
            counts, result, verdict = self._step(micro_batches, rate)
            self.progress.enter("agreement")
            totals = self._gather_totals(waited, time.perf_counter() - started, time.process_time() - computed, counts)
            history = remember(self.state.history, result, config.train.spike_window)
            self.state = next_state(self.state, data_state.to_dict(), counts, verdict, history, skipped_before + totals.skipped_samples)
            if verdict.reason:
                self._report_bad_step(verdict, result, micro_batches)
            stopping = self.stop.agreed = totals.stop_requested  # whoever asked may not wait long: then save, and neither evaluate nor paint
            values = self._values(counts, result, totals, rate)
            if not stopping:
                values |= self._evaluate()
            self.progress.enter("metrics")
            self._publish(values)
            if totals.save_failed:
                self._saver.wait()  # one rank knows that the save in the background failed: all raise that
            if not self.stop.agreed:
                self._paint()
            stopping = self.stop.agreed  # perhaps in the middle of an evaluation
            if stopping or self._due(config.checkpoint.every_steps) or self._is_last():
                self._save(values)
            self._require_progress()
        self._saver.wait()
        return not stopping

    def close(self) -> None:
        """Let a save end that is under way, close the files of the run and its shards, and end the engine."""
        self._saver.close()
        self.loader.close()
        if self.validation_loader is not None:
            self.validation_loader.close()
        if self.writer is not None:
            self.writer.close()
            self._tell_news(self.writer)
        if self.zero is not None:
            self.zero.close()

    def _step(self, micro_batches: Sequence[Batch], rate: float) -> tuple[StepCounts, StepResult, Verdict]:
        """One optimizer step: what it counted over all ranks, what came of it, and whether it changed the weights."""
        config, device = self.config, self.ranks.device
        if is_passed_over(self.state.step + 1, config.train.skip_steps):
            return *NOTHING_DONE, PASSED_OVER
        self.progress.enter("forward and backward")
        flops = sum(sum(count_flops(self.model, batch).values()) for batch in micro_batches)
        counts = global_counts(micro_batches, flops, tuple(self._sources))
        set_learning_rate(self.optimizer, rate)
        weights = objective_weights(config.objective)
        clip, world = config.optimizer.clip_norm, self.ranks.world_size
        verdicts: list[Verdict] = []

        def accept(result: StepResult) -> bool:
            self.progress.enter("optimizer")
            verdicts.append(judge(result, self.state.history, config.train))
            return verdicts[-1].action is Action.UPDATE

        result = train_step(self.model, self.optimizer, micro_batches, counts, weights, clip, world, device, accept, self.zero, self._groups)
        return counts, result, verdicts[-1]

    def _report_bad_step(self, verdict: Verdict, result: StepResult, micro_batches: Sequence[Batch]) -> None:
        """Say what happened, and list where the step's documents came from. Raises TrainingDiverged where the run is to stop for it."""
        step = self.state.step
        self.reporter.event(f"step {step}: {verdict.words}")
        rows = [dataclasses.asdict(source) for batch in micro_batches for source in batch.sources]
        sources = [row | {"rank": rank} for rank, part in enumerate(gather_bytes(json.dumps(rows).encode())) for row in json.loads(part)]
        if self.writer is not None:
            what = {"reason": verdict.reason, "action": verdict.action.value, "loss": result.loss, "grad_norm": result.grad_norm}
            self.writer.bad_step({"step": step, **what, "sources": sources})
        if verdict.action is Action.STOP:
            raise TrainingDiverged(
                f"step {step}: {verdict.words}; {BAD_STEPS_FILE} in the run folder lists its documents: look at them with `fusiontrain data peek`, then "
                "resume with train.skip_steps, data.from_step or train.spike=skip"
            )

    def _gather_totals(self, data_seconds: float, step_seconds: float, compute_seconds: float, counts: StepCounts) -> StepTotals:
        skipped = self.loader.skipped - self._counted_before
        saving = self._saver.look()
        return gather_totals(bool(self.stop), *saving, skipped, memory_gib(self.ranks.device), data_seconds, step_seconds, compute_seconds, counts)

    def _values(self, counts: StepCounts, result: StepResult, totals: StepTotals, rate: float) -> dict[str, Any]:
        """The step's line in metrics.jsonl."""
        peak = peak_flops(self.ranks.device, self.config.parallel.precision)
        return step_values(self.state, counts, result, totals, rate, self._sources, self._modalities, peak * self.ranks.world_size if peak else None)

    def _publish(self, values: dict[str, Any]) -> None:
        due = self._due(self.config.train.log_every_steps) or self.state.step == 1
        if due or self.state.skipped_in_a_row:
            logger.info("step %d: loss %.5f, gradient norm %.4f", values["step"], values["loss"], values["grad_norm"])
        if due and values["grad_norm"] == 0:
            why = "these data hold no target for a weight that trains (text alone, and a frozen text side?)"
            self.reporter.event(f"step {values['step']}: every gradient is zero: {why}")
        findings = self._gather_findings()
        if self.writer is not None:
            values |= self.writer.bad_samples(findings) | {"sink_failures": self.writer.sinks.failures}
            self.writer.write(values)
            if due or any(key.startswith("validation/") for key in values):
                self.writer.board(values)
            self._tell_news(self.writer)
        self.reporter.step(values, due)

    def _tell_news(self, writer: MetricsWriter) -> None:
        for text in writer.sinks.news():
            self.reporter.event(text)

    def _gather_findings(self) -> list[dict[str, Any]]:
        """The bad samples of this step on all ranks, in order of rank."""
        mine = json.dumps(self.loader.log.take(self.state.step)).encode()
        return [finding for part in gather_bytes(mine) for finding in json.loads(part)]

    def _evaluate(self) -> dict[str, float]:
        """Validation losses if they are due after this step."""
        if self.validation_loader is None or not self._due_or_last(self.config.evaluate.every_steps):
            return {}
        self.progress.enter("evaluate")
        try:
            with self._whole_root():
                losses = validation_losses(self.model, self.validation_loader, self.config.evaluate.batches, self.ranks.device, self._between)
        except BreakOff:
            return {}
        words = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items() if math.isfinite(loss))
        self.reporter.event(f"step {self.state.step}: validation loss {words}")
        return {f"validation/{name}": loss for name, loss in losses.items()}

    def _paint(self) -> None:
        """Paint the configured prompts if that is due. All ranks paint together, since each holds a part of the weights."""
        config = self.config
        if not config.sample.prompts or not self._due_or_last(config.sample.every_steps):
            return
        self.progress.enter("sample")
        try:
            with self._whole_root():
                pictures = paint_prompts(self.model, self.tokenizer, config, self._between)
        except BreakOff:
            return
        finally:
            free_gathered(self.model)
        if self.writer is not None:
            path = self.writer.pictures(self.state.step, config.sample.prompts, pictures)
            self.reporter.event(f"step {self.state.step}: samples in {path}")

    def _between(self) -> None:
        """Between batches of an evaluation and steps of a painting: raises BreakOff on all ranks where one was asked to stop."""
        self.progress.beat()
        self.stop.check()

    def _whole_root(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.zero is None else self.zero.whole_root()

    def _save(self, values: Mapping[str, Any]) -> None:
        self.progress.enter("save")
        if not all_finite(self.tensors["model"]):  # a checkpoint of such weights would only push out the good ones
            raise TrainingDiverged(
                f"step {self.state.step}: weights are no longer finite, so they are not saved: lower optimizer.learning_rate and resume from the "
                "last checkpoint"
            )
        self._saver.save(self.state, values)

    def _require_progress(self) -> None:
        if self.state.skipped_in_a_row >= self.config.train.max_skipped_in_a_row:
            raise TrainingDiverged(
                f"step {self.state.step}: {self.state.skipped_in_a_row} steps in a row made no update, for losses or gradients that were not finite or "
                f"stood out ({BAD_STEPS_FILE} lists them): lower optimizer.learning_rate or optimizer.clip_norm, or pass over the data, and resume"
            )

    def _due_or_last(self, every: int | None) -> bool:
        return every is not None and (self._due(every) or self._is_last())

    def _due(self, every: int) -> bool:
        return self.state.step % every == 0

    def _is_last(self) -> bool:
        return self.state.step == self.config.train.steps


def next_state(
    before: TrainState, data: dict[str, Any], counts: StepCounts, verdict: Verdict, history: dict[str, list[float]], skipped_samples: int
) -> TrainState:
    """The state after one more step, whether or not it changed the weights."""
    skipped = verdict.action is Action.SKIP
    in_a_row = before.skipped_in_a_row if verdict.action is Action.PASS else before.skipped_in_a_row + 1 if skipped else 0
    return dataclasses.replace(
        before,
        step=before.step + 1,
        data=data,
        tokens={name: before.tokens.get(name, 0) + number for name, number in counts.tokens.items()},
        skipped_steps=before.skipped_steps + skipped,
        skipped_in_a_row=in_a_row,
        skipped_samples=skipped_samples,
        history=history,
    )
