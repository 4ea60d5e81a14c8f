"""Take a profile: the real trainer over a few steps, in a run folder of its own that is deleted afterwards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from fusiontrain.config.schema import Config
from fusiontrain.parallel.mesh import Ranks
from fusiontrain.parallel.reduce import barrier, gather_objects, on_main
from fusiontrain.train.build import build_trainer
from fusiontrain.train.profile.advice import largest_loss
from fusiontrain.train.profile.cross_check import cross_check
from fusiontrain.train.profile.page import page
from fusiontrain.train.profile.peak import Peak, peak_of
from fusiontrain.train.profile.report import Report, imbalance_of, make_rows, rank_rows, total_flops
from fusiontrain.train.profile.window import RankProfile, Window
from fusiontrain.train.reporter import Reporter
from fusiontrain.train.signals import StopRequest
from fusiontrain.utils.errors import UserError

JSON_FILE, PAGE_FILE = "report.json", "report.html"
SCRATCH = "run"


def take_profile(config: Config, name: str, ranks: Ranks, reporter: Reporter, steps: int, warmup: int, folder: Path) -> Report | None:
    """Profile `steps` steps behind `warmup` ones and write report.json, report.html and a trace per rank into `folder`; the report on the main rank, else
    None. All ranks call this together. name: of the configuration.

    Weights are those that a new run begins with, and nothing of the run itself is read or written. Raises UserError where the folder cannot be written to
    or a step is missing.
    """
    scratch = folder / SCRATCH
    on_main(lambda: _make(folder))
    trainer = build_trainer(for_profile(config, warmup + steps + 1, scratch), ranks, reporter, StopRequest())
    try:
        window = Window(trainer, warmup, steps, folder)
        profiles = gather_objects(window.run())
        checked = cross_check(trainer, window.first_batch)
        peaks = gather_objects(peak_of(ranks.device, config.parallel.precision))
    finally:
        trainer.close()
    barrier()
    if not ranks.is_main:
        return None
    shutil.rmtree(scratch, ignore_errors=True)
    report = _report(config, name, ranks, steps, warmup, profiles, _mean_peak(peaks), checked)
    (folder / JSON_FILE).write_text(json.dumps(report.to_dict(), indent=1), encoding="utf-8")
    (folder / PAGE_FILE).write_text(page(report), encoding="utf-8")
    return report


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder / SCRATCH, ignore_errors=True)
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be written to ({error.strerror}): give another folder") from error


def for_profile(config: Config, steps: int, folder: Path) -> Config:
    """The same run for so many steps from its start, in another folder, without evaluations and pictures, and with one checkpoint at its end."""
    changes: dict[str, dict[str, Any]] = {
        "run": {"dir": str(folder)},
        "train": {"steps": steps, "skip_steps": ()},
        "checkpoint": {"every_steps": steps, "resume": "none"},
        "evaluate": {"every_steps": None},
        "sample": {"every_steps": None},
    }
    return config.model_copy(update={key: getattr(config, key).model_copy(update=values) for key, values in changes.items()})


def _mean_peak(peaks: list[Peak]) -> Peak:
    """Of ranks with one kind of device; where one is not known, none is."""
    known = [peak.flops for peak in peaks if peak.flops is not None]
    return Peak(mean(known) if len(known) == len(peaks) else None, peaks[0].source)


def _report(
    config: Config, name: str, ranks: Ranks, steps: int, warmup: int, profiles: list[RankProfile], peak: Peak, checked: dict[str, Any] | None
) -> Report:
    rows = make_rows(profiles, steps, config.checkpoint.every_steps, peak.flops)
    flops = total_flops(profiles)
    step_seconds = sum(row.total for row in rows)
    of_all = peak.flops * ranks.world_size * step_seconds if peak.flops else None
    by_rank = rank_rows(profiles, steps)
    imbalance = imbalance_of(by_rank)
    first = profiles[0]
    return Report(
        config=name,
        device="CPU" if ranks.device.type == "cpu" else torch.cuda.get_device_name(ranks.device),
        world_size=ranks.world_size,
        steps=steps,
        warmup=warmup,
        step_seconds=step_seconds,
        rows=rows,
        hidden_collectives_seconds=mean(profile.divided.hidden for profile in profiles) / steps,
        peak=peak,
        flops=flops,
        mfu=flops["model"] / of_all if of_all else None,
        hfu=flops["hardware"] / of_all if of_all else None,
        ranks=by_rank,
        imbalance=imbalance,
        memory=first.memory.moments,
        compilation={
            "compiled_while_warming_up": first.warmed_up.frames,
            "compiled_again": first.compiled.frames,
            "graph_breaks": {**first.warmed_up.graph_breaks, **first.compiled.graph_breaks},
        },
        syncs={what: count / steps for what, count in first.divided.syncs.items()},
        largest_loss=largest_loss(rows, imbalance, config),
        cross_check=checked,
        notes=_notes(config, ranks),
        files=[PAGE_FILE, JSON_FILE, *(p.trace for p in profiles), *(p.memory.snapshot for p in profiles if p.memory.snapshot)],
    )


def _notes(config: Config, ranks: Ranks) -> list[str]:
    """Sentences: what the numbers do not say."""
    notes = [
        "Where one launch serves several modalities, its time is divided as its products are (norms: as its rows).",
        "The LM head computes its gradients in the forward, but for kernels.cross_entropy=reference.",
        "Named scopes and the profiler itself cost time: small models look slower here than in training.",
        f"A checkpoint was saved once and is spread over checkpoint.every_steps={config.checkpoint.every_steps} steps.",
        "Memory is that of the tensors of rank 0, in a step of its own behind the timed ones.",
    ]
    if ranks.device.type == "cpu":
        notes.append("On a CPU there is no allocator to take a snapshot of, and waiting for a device is what a GPU would do with the operators chosen here.")
    if config.parallel.compile:
        notes.append("The parts of compiled blocks are not told apart: set parallel.compile=false for that.")
    return notes
