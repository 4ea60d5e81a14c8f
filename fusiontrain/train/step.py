"""One optimizer step: the same loss and gradient however its samples are spread over ranks and micro-batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from fusiontrain.config.schema import ObjectiveConfig
from fusiontrain.modality import IMAGE, MODALITY_NAMES
from fusiontrain.parallel.deepspeed import Zero
from fusiontrain.parallel.fsdp import set_gradient_sync
from fusiontrain.parallel.reduce import sum_integers, sum_tensor
from fusiontrain.train.by_source import NUM_COUNTS, SourceCounts, as_counts, count_by_source, loss_sums, source_numbers
from fusiontrain.train.gradients import ParameterGroups, clip, norms, squared_norms
from fusiontrain.types import Batch, LossTerm


@dataclass(frozen=True)
class StepCounts:
    """Host numbers of one optimizer step over all ranks and micro-batches, by modality; flops are forward plus backward.

    continuous: the modalities whose targets are no tokens. sources: by what `SourceRef.source` says. rank_flops and rank_image_tokens: this rank's part.
    """

    targets: dict[str, int]
    tokens: dict[str, int]
    flops: int = 0
    continuous: frozenset[str] = frozenset()
    sources: dict[str, SourceCounts] = field(default_factory=dict)
    rank_flops: int = 0
    rank_image_tokens: int = 0

    @property
    def divisors(self) -> dict[str, int]:
        """What the loss of each modality is divided by: its targets; where those are tokens, the tokens to predict of all modalities, so that each
        token weighs the same."""
        discrete = sum(count for name, count in self.targets.items() if name not in self.continuous)
        return {name: count if name in self.continuous else discrete for name, count in self.targets.items()}


@dataclass(frozen=True)
class StepResult:
    """Losses are means over the global count, before weighting: NaN where the step has no target of that kind.

    grad_norms: by the groups of parameters that `train_step` was given. source_losses: by source and modality.
    """

    loss: float
    losses: dict[str, float]
    grad_norm: float
    grad_norms: dict[str, float] = field(default_factory=dict)
    source_losses: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


NOTHING_DONE = (
    StepCounts(dict.fromkeys(MODALITY_NAMES, 0), dict.fromkeys(MODALITY_NAMES, 0)),
    StepResult(math.nan, dict.fromkeys(MODALITY_NAMES, math.nan), math.nan),
)
"""What a step reports whose data are passed over."""


def global_counts(micro_batches: Sequence[Batch], flops: int = 0, sources: Sequence[str] = ()) -> StepCounts:
    """Targets and tokens of the whole step in one all-reduce of host numbers; `flops` are this rank's, `sources` those to count one by one."""
    targets = [sum(batch.target_counts.get(name, 0) for batch in micro_batches) for name in MODALITY_NAMES]
    tokens = [sum(batch.token_counts.get(name, 0) for batch in micro_batches) for name in MODALITY_NAMES]
    by_source = np.zeros((NUM_COUNTS, len(sources)), dtype=np.int64)
    for batch in micro_batches if sources else ():
        by_source += count_by_source(batch, sources)
    all_flops, *summed = sum_integers([flops, *targets, *tokens, *by_source.ravel().tolist()])
    middle, end = len(MODALITY_NAMES), 2 * len(MODALITY_NAMES)
    return StepCounts(
        dict(zip(MODALITY_NAMES, summed[:middle], strict=True)),
        dict(zip(MODALITY_NAMES, summed[middle:end], strict=True)),
        all_flops,
        frozenset(micro_batches[0].payloads) if micro_batches else frozenset(),
        as_counts(summed[end:], sources),
        rank_flops=flops,
        rank_image_tokens=tokens[IMAGE.id],
    )


def objective_weights(config: ObjectiveConfig) -> dict[str, float]:
    """By modality."""
    return {name: getattr(config, f"{name}_weight") for name in MODALITY_NAMES}


def weighted_loss(terms: Mapping[str, LossTerm], weights: Mapping[str, float], divisors: Mapping[str, int]) -> torch.Tensor:
    """Sum over objectives of weight * sum / global count (float32 scalar): this micro-batch's part of the step's loss."""
    return torch.stack([weights[name] * term.sum / max(divisors[name], 1) for name, term in terms.items()]).sum()


def accumulate_gradients(
    model: nn.Module,
    micro_batches: Sequence[Batch],
    weights: Mapping[str, float],
    divisors: Mapping[str, int],
    world_size: int,
    device: torch.device,
    zero: Zero | None = None,
    sources: Sequence[str] = (),
) -> torch.Tensor:
    """Forward and backward of every micro-batch; returns this rank's loss sums, [M + M * sources] float64 on the device: see `loss_sums`.

    Gradients are communicated once, with the last micro-batch (ZeRO from stage 2 on: with every one). Both engines average them over ranks,
    hence the factor `world_size`.
    """
    sums = torch.zeros(len(MODALITY_NAMES) * (1 + len(sources)), dtype=torch.float64, device=device)
    for index, batch in enumerate(micro_batches):
        last = index == len(micro_batches) - 1
        set_gradient_sync(model, last)
        moved, of_document = batch.to(device), torch.from_numpy(source_numbers(batch, sources)).to(device, non_blocking=True)
        terms = model(moved) if zero is None else zero.forward(moved)
        loss = weighted_loss(terms, weights, divisors) * world_size
        if zero is None:
            loss.backward()
        else:
            zero.backward(loss, last)
        sums += loss_sums(terms, moved.doc_ids, of_document, len(sources))
    return sums


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[Batch],
    counts: StepCounts,
    weights: Mapping[str, float],
    clip_norm: float,
    world_size: int,
    device: torch.device,
    accept: Callable[[StepResult], bool] = lambda result: result.finite,
    zero: Zero | None = None,
    groups: ParameterGroups | None = None,
) -> StepResult:
    """Forward, backward, clip, and an optimizer step if `accept` says so of the result (else nothing changes).

    All ranks see the same loss and norm, so all take the same decision. The host waits for the device once, to read them: all numbers of a step
    are in one tensor. groups: of all that the optimizer trains, to report a norm of each; by default none is. With `zero`, DeepSpeed clips (to
    the norm that it was started with) and updates what is finite; `accept` is only told, and there are no norms of groups.
    """
    sources = tuple(counts.sources)
    if zero is not None:
        with zero.whole_root():
            sums = accumulate_gradients(model, micro_batches, weights, counts.divisors, world_size, device, zero, sources)
        result = _result(sum_tensor(sums).tolist(), zero.step(), {}, counts, weights)
        accept(result)
        return result
    trained = groups or {"all": [parameter for group in optimizer.param_groups for parameter in group["params"]]}
    sums = accumulate_gradients(model, micro_batches, weights, counts.divisors, world_size, device, sources=sources)
    numbers = sum_tensor(torch.cat([sums, squared_norms(trained, device)])).tolist()
    grad_norm, by_group = norms(numbers[len(sums) :], trained)
    result = _result(numbers[: len(sums)], grad_norm, by_group if groups else {}, counts, weights)
    if accept(result):
        clip(trained, grad_norm, clip_norm)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return result


def _result(sums: Sequence[float], grad_norm: float, grad_norms: dict[str, float], counts: StepCounts, weights: Mapping[str, float]) -> StepResult:
    """sums: see `loss_sums`, over all ranks."""
    losses = {name: _mean(total, counts.targets[name]) for name, total in zip(MODALITY_NAMES, sums, strict=False)}
    divisors = counts.divisors
    loss = sum(weights[name] * (total / divisors[name]) for name, total in zip(MODALITY_NAMES, sums, strict=False) if counts.targets[name])
    by_source = {
        source: {
            name: _mean(sums[len(MODALITY_NAMES) + place * len(counts.sources) + number], found.targets[name])
            for place, name in enumerate(MODALITY_NAMES)
        }
        for number, (source, found) in enumerate(counts.sources.items())
    }
    return StepResult(loss, losses, grad_norm, grad_norms, by_source)


def _mean(total: float, count: int) -> float:
    return total / count if count else math.nan
