"""The line of metrics.jsonl that a step gets: its keys, what they mean, and where they come from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fusiontrain.parallel.reduce import gather_floats
from fusiontrain.train.gradients import SHARED
from fusiontrain.train.state import TrainState
from fusiontrain.train.step import StepCounts, StepResult

KEYS: dict[str, tuple[str | None, str]] = {
    "step": (None, "optimizer step, from 1"),
    "loss": ("loss/total", "what is minimised: weighted sum of the losses of the modalities, those of tokens each by its share of the tokens to predict"),
    "loss/<modality>": ("loss/<modality>", "mean over the step's targets of that kind on all ranks, before weighting, z-loss included; null without a target"),
    "loss/source/<source>/<modality>": ("loss_by_source_<modality>/<source>", "the same over the targets of one source"),
    "grad_norm": ("optimizer/grad_norm", "norm of all gradients, before clipping"),
    "grad_norm/<group>": ("grad_norm/<group>", "of the weights that rows of one modality see alone, or `shared`; null where none trains, and with DeepSpeed"),
    "lr": ("optimizer/learning_rate", "learning rate"),
    "tokens": ("tokens/all", "tokens of this step on all ranks, padding left out"),
    "tokens/<modality>": ("tokens/<modality>", "of one modality"),
    "tokens/source/<source>": (None, "of one source"),
    "documents/source/<source>": (None, "documents of one source in this step"),
    "targets/<modality>": ("targets/<modality>", "labelled tokens; of images that are no tokens, those that carry a loss"),
    "targets/source/<source>/<modality>": (None, "of one source: so weighted, the losses of the sources add up to the whole"),
    "tokens_per_second": ("throughput/tokens_per_second", "over all ranks"),
    "step_seconds": ("throughput/step_seconds", "wall time of the step on the slowest rank, data wait included"),
    "data_seconds": ("throughput/data_seconds", "of it, waiting for data, on the rank that waited most"),
    "save_seconds": ("throughput/save_seconds", "that training stood still for checkpoints, on the rank that did longest"),
    "flops": ("throughput/flops", "exact FLOPs of forward and backward on all ranks"),
    "mfu": ("throughput/mfu", "flops / (step_seconds x ranks x the device's peak); null where the peak is not known"),
    "memory_gib": ("health/memory_gib", "most memory that a rank has held so far: allocated on the GPU, or resident on the host"),
    "imbalance/flops": ("imbalance/flops", "largest over mean of the ranks: the work that the step gave them"),
    "imbalance/image_tokens": ("imbalance/image_tokens", "the same of image tokens; null without images"),
    "imbalance/compute_seconds": ("imbalance/compute_seconds", "the same of CPU-seconds in the step, which waiting for other ranks adds nothing to"),
    "skipped": ("health/skipped_samples", "unreadable samples so far, all ranks"),
    "skipped/<reason>": ("skipped/<reason>", "of one kind; bad_samples.jsonl names them"),
    "skipped_steps": ("health/skipped_steps", "steps so far without an update; bad_steps.jsonl names them"),
    "sink_failures": ("health/sink_failures", "calls so far that TensorBoard, W&B or MLflow lost"),
    "epoch": ("progress/epoch", "of the first source"),
    "validation/<modality>": ("validation/<modality>", "loss on the validation sources, where one was due"),
}
"""Key of metrics.jsonl: (tag in TensorBoard and other trackers, or None; what it is). `mixture_tokens/<source>` and `mixture_documents/<source>` are
tags alone: the source's share of all that the run has trained on so far, which is the sum over the lines."""

IMBALANCES = ("flops", "image_tokens", "compute_seconds")


@dataclass(frozen=True)
class StepTotals:
    """Numbers of one step that ranks measure for themselves. Times in seconds, memory in GiB: of the rank with the most.

    imbalance: largest over mean of the ranks, NaN where the mean is 0.
    """

    stop_requested: bool
    save_failed: bool
    save_seconds: float
    skipped_samples: int
    memory_gib: float
    data_seconds: float
    step_seconds: float
    imbalance: dict[str, float]


def gather_totals(
    stop: bool, save_failed: bool, save_seconds: float, skipped_samples: int, memory_gib: float, data_seconds: float, step_seconds: float,
    compute_seconds: float, counts: StepCounts,
) -> StepTotals:  # fmt: skip
    """What this rank measured, of all ranks: one small all-gather, which is also where they agree to stop after the same step."""
    loads = (counts.rank_flops, counts.rank_image_tokens, compute_seconds)
    rows = gather_floats((stop, save_failed, save_seconds, skipped_samples, memory_gib, data_seconds, step_seconds, *loads))
    stops, failed, stalls, all_skipped, memory, waits, seconds, *all_loads = zip(*rows, strict=True)
    imbalance = {name: max(load) * len(load) / sum(load) if sum(load) else math.nan for name, load in zip(IMBALANCES, all_loads, strict=True)}
    return StepTotals(any(stops), any(failed), max(stalls), int(sum(all_skipped)), max(memory), max(waits), max(seconds), imbalance)


def step_values(
    state: TrainState, counts: StepCounts, result: StepResult, totals: StepTotals, rate: float, labels: Mapping[str, str], names: Sequence[str],
    peak_flops: float | None,
) -> dict[str, Any]:  # fmt: skip
    """The step's values by the names in KEYS. labels: {source: short name}; names: of modalities; peak_flops: of all ranks together, per second."""
    tokens, seconds = sum(counts.tokens.values()), totals.step_seconds
    values = {
        "step": state.step,
        "loss": result.loss,
        **{f"loss/{name}": result.losses[name] for name in names},
        "grad_norm": result.grad_norm,
        **{f"grad_norm/{name}": result.grad_norms.get(name, math.nan) for name in (*names, SHARED)},
        "lr": rate,
        "tokens": tokens,
        **{f"tokens/{name}": counts.tokens[name] for name in names},
        **{f"targets/{name}": counts.targets[name] for name in names},
        "tokens_per_second": tokens / seconds,
        "step_seconds": seconds,
        "data_seconds": totals.data_seconds,
        "save_seconds": totals.save_seconds,
        "flops": counts.flops,
        "mfu": counts.flops / seconds / peak_flops if peak_flops else None,
        "memory_gib": totals.memory_gib,
        **{f"imbalance/{name}": value for name, value in totals.imbalance.items()},
        "skipped": state.skipped_samples,
        "skipped_steps": state.skipped_steps,
        **{key: state.data[key] for key in ("epoch",) if key in state.data},
    }
    for source, label in labels.items():
        found, losses = counts.sources.get(source), result.source_losses.get(source, {})
        values |= {f"loss/source/{label}/{name}": losses.get(name, math.nan) for name in names}
        values |= {f"targets/source/{label}/{name}": found.targets[name] if found else 0 for name in names}
        values |= {f"tokens/source/{label}": found.tokens if found else 0, f"documents/source/{label}": found.documents if found else 0}
    return values


def tag_of(key: str) -> str | None:
    """The tag that trackers show a key of metrics.jsonl under; None for one that they do not show."""
    if key in KEYS:
        return KEYS[key][0]
    parts = key.split("/")
    if parts[1:2] == ["source"]:
        return f"loss_by_source_{parts[3]}/{parts[2]}" if parts[0] == "loss" else None
    return key


def shown(values: Mapping[str, Any]) -> dict[str, float]:
    """Values by tag: numbers that are finite."""
    tags = {tag_of(key): value for key, value in values.items()}
    return {tag: float(value) for tag, value in tags.items() if tag is not None and isinstance(value, int | float) and math.isfinite(value)}


class Mixture:
    """The documents and tokens of each source that the run has trained on so far."""

    def __init__(self, labels: Sequence[str]) -> None:
        self.documents, self.tokens = dict.fromkeys(labels, 0), dict.fromkeys(labels, 0)

    def add(self, values: Mapping[str, Any]) -> None:
        """Count a line of metrics.jsonl."""
        for kind, totals in (("documents", self.documents), ("tokens", self.tokens)):
            for label in totals:
                totals[label] += values.get(f"{kind}/source/{label}", 0)

    def shares(self) -> dict[str, float]:
        """By tag; nothing before the first document."""
        kinds = {"mixture_documents": self.documents, "mixture_tokens": self.tokens}
        return {f"{kind}/{label}": count / sum(totals.values()) for kind, totals in kinds.items() if any(totals.values()) for label, count in totals.items()}

    def table(self, weights: Mapping[str, float]) -> str:
        """Markdown: each source with its configured weight and what was used of it."""
        shares = self.shares()
        head = "| source | weight | documents | share | tokens | share |\n|---|---|---|---|---|---|\n"
        rows = (
            f"| {label} | {weights[label]:g} | {documents:,} | {shares.get(f'mixture_documents/{label}', 0):.2%} | {self.tokens[label]:,} "
            f"| {shares.get(f'mixture_tokens/{label}', 0):.2%} |\n"
            for label, documents in self.documents.items()
        )
        return head + "".join(rows)
