"""The plan carried out, some steps ahead of the trainer, by threads or processes that it never shows."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from fusiontrain.config.schema import Config
from fusiontrain.config.validate import has_frozen_prefix
from fusiontrain.data.arena import Arena
from fusiontrain.data.batch_arrays import most_bytes
from fusiontrain.data.collate import to_batch
from fusiontrain.data.errors import BadSampleLog
from fusiontrain.data.execute.ahead import Ahead, MicroBatch
from fusiontrain.data.execute.build import Builder, Built
from fusiontrain.data.execute.job import Job, make_job
from fusiontrain.data.execute.processes import Workers
from fusiontrain.data.execute.ring import Ring
from fusiontrain.data.index.cache import index_sources
from fusiontrain.data.plan.fields import fingerprint, plan_fields
from fusiontrain.data.plan.plan import Anchor, Plan, check_world_size
from fusiontrain.data.tokenizer import Tokenizer
from fusiontrain.types import Batch
from fusiontrain.utils.errors import UserError


@dataclass(frozen=True)
class LoaderState:
    """Where the data stand after `step` steps, and which data they are: the same on every rank.

    window, sequence: the plan's anchor, so that a resumed run need not plan from the start. epoch: of the first source, to look at.
    data_step: the step of the data after the last one that was used; other than `step` only after a jump by `data.from_step`.
    """

    step: int
    epoch: int
    fields: dict[str, str]
    window: int = 0
    sequence: int = 0
    data_step: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoaderState:
        return cls(**values)


class Loader:
    """The batches of one rank. split: "train" (endless) or "validation" (each document once).

    `fields` names what the order depends on and `fingerprint` is their hash; `skipped` counts bad samples met so far by this rank.
    workers: processes of another loader, for `data.executor: processes`; who made them closes them. By default this loader has its own.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer, split: str, rank: int, world_size: int, workers: Workers | None = None) -> None:
        self.config, self.tokenizer, self.rank, self.world_size = config, tokenizer, rank, world_size
        check_world_size(config.train.global_batch_sequences, world_size)
        training = split == "train"
        self.sources = index_sources(config.data.sources if training else config.data.validation_sources, config.data, tokenizer)
        self.plan = Plan(config, self.sources, tokenizer, training)
        self.fields = plan_fields(config, self.sources, tokenizer)
        self.fingerprint = fingerprint(self.fields)
        self.log = BadSampleLog(config.data.max_bad_fraction)
        # The first rank names and counts what indexing found; all judge it, so that all stop together.
        bad_in_index = self._judge_index(quietly=rank > 0)
        self._bad_in_index = bad_in_index if rank == 0 else 0
        self.builder = Builder(self.sources, config.data, tokenizer, has_frozen_prefix(config))
        self._owns_workers = workers is None
        self.workers = workers or Workers(config.data.num_workers)
        self._runs: list[Ahead] = []

    @property
    def skipped(self) -> int:
        return self._bad_in_index + self.log.bad

    def iterate(self, start: int | LoaderState) -> Iterator[tuple[tuple[Batch, ...], LoaderState]]:
        """This rank's micro-batches of the steps from `start` on, and the state after each.

        start: a step, or the state after the last step that was used; from a state even a late step is found at once.
        `data.num_workers` threads or processes build the steps ahead, as many as fit into `data.prefetch_bytes`. A sample that turns out bad
        leaves padding in its place. Raises UserError when too many are, and when a worker process dies.
        """
        if isinstance(start, LoaderState):
            if start.step and start.data_step != self.plan.data_step(start.step - 1) + 1:
                raise UserError(
                    f"data.from_step: step {start.step} was reached with data step {start.data_step - 1}, but this gives "
                    f"{self.plan.data_step(start.step - 1)}; keep the entries that the run has passed and add later ones"
                )
            self.plan.begin_at(Anchor(start.window, start.sequence))
            start = start.step
        build_all = self._build_in_turn if self.config.data.num_workers == 0 else self._build_ahead
        step = start
        for found in build_all(start):
            step += 1
            batches = tuple(self._used(built, step) for built in found)
            del found
            yield batches, self._state(step)
            del batches  # or its memory would still be taken when the next step is asked for

    def close(self) -> None:
        """End threads and processes and close the shards. Open iterators are over; the loader may be iterated anew."""
        for run in self._runs:
            run.stop()
        if self._owns_workers:
            self.workers.kill()
        while self._runs:
            self._end(self._runs[-1])
        if self._owns_workers:
            self.workers.close()
        self.builder.close()

    def _build_in_turn(self, step: int) -> Iterator[list[Built]]:
        while (micro_batches := self._micro_batches(step)) is not None:
            yield [self.builder.build(sequences) for sequences in micro_batches]
            step += 1

    def _build_ahead(self, step: int) -> Iterator[list[Built]]:
        data, train = self.config.data, self.config.train
        share = train.global_batch_sequences // self.world_size
        size = train.micro_batch_sequences or share
        build = self._build_in_thread if data.executor == "threads" else self._build_in_process
        most = most_bytes(size, data, self.builder.frozen_prefix)
        run = Ahead(self._micro_batches, build, -(-share // size), most, data.prefetch_bytes, data.num_workers, torch.cuda.is_available())
        self._runs.append(run)
        try:
            yield from run.steps(step)
        finally:
            self._end(run)

    def _end(self, run: Ahead) -> None:
        if run in self._runs:
            self._runs.remove(run)
            run.close()
            self.workers.forget(run.ring)
            if not self._runs:
                self.builder.close()  # the files of threads that are gone

    def _build_in_thread(self, sequences: MicroBatch, ring: Ring) -> tuple[Built, np.ndarray]:
        _, memory = ring.lease()
        return self.builder.build(sequences, Arena(memory).allocate), memory

    def _build_in_process(self, sequences: MicroBatch, ring: Ring) -> tuple[Built, np.ndarray]:
        return self.workers.build(self._job, sequences, ring)

    @functools.cached_property
    def _job(self) -> Job:
        return make_job(self.sources, self.config.data, self.tokenizer, self.builder.frozen_prefix)

    def _used(self, built: Built, step: int) -> Batch:
        """A micro-batch that the trainer takes: only now its documents are counted, so that no count depends on what was built ahead.

        Raises UserError where too many are bad.
        """
        for verdict in built.verdicts:
            if verdict is None:
                self.log.good()
            else:
                self.log.add(verdict.ref, verdict.error, step=step if self.plan.training else 0, offset=verdict.offset)
        return to_batch(built.arrays)

    def _micro_batches(self, step: int) -> list[MicroBatch] | None:
        """This rank's sequences of a step, as they are collated together; None behind the last step of a validation."""
        data_step = self.plan.data_step(step)
        if not self.plan.training and not self.plan.step(data_step):
            return None
        share = self.plan.share(data_step, self.rank, self.world_size)
        size = self.config.train.micro_batch_sequences or len(share)
        return [share[first : first + size] for first in range(0, len(share), size)]

    def _state(self, step: int) -> LoaderState:
        # Not the data step of the next step: after a jump that one may not have been planned yet, so ranks would differ.
        data_step = self.plan.data_step(step - 1) + 1
        anchor = self.plan.anchor(data_step)
        return LoaderState(step, self.plan.epoch(anchor), self.fields, anchor.window, anchor.sequence, data_step)

    def _judge_index(self, quietly: bool) -> int:
        """The number of samples that indexing found unusable. Raises UserError when they are too many."""
        log = BadSampleLog(self.config.data.max_bad_fraction)
        log.good(sum(len(source) for source in self.sources))
        for source in self.sources:
            for ref, reason in source.bad():
                log.add(ref, reason, quietly)
        return log.bad
