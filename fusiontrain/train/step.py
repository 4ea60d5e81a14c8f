"""One optimizer step: the same loss and gradient however its samples are spread over ranks and micro-batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fusiontrain.config.schema import ObjectiveConfig
from fusiontrain.modality import MODALITY_NAMES
from fusiontrain.parallel.deepspeed import Zero
from fusiontrain.parallel.fsdp import set_gradient_sync
from fusiontrain.parallel.reduce import sum_integers, sum_tensor
from fusiontrain.types import Batch, LossTerm


@dataclass(frozen=True)
class StepCounts:
    """Host numbers of one optimizer step over all ranks and micro-batches, by modality; flops are forward plus backward. continuous: the
    modalities whose targets are no tokens."""

    targets: dict[str, int]
    tokens: dict[str, int]
    flops: int = 0
    continuous: frozenset[str] = frozenset()

    @property
    def divisors(self) -> dict[str, int]:
        """What the loss of each modality is divided by: its targets; where those are tokens, the tokens to predict of all modalities, so that each
        token weighs the same."""
        discrete = sum(count for name, count in self.targets.items() if name not in self.continuous)
        return {name: count if name in self.continuous else discrete for name, count in self.targets.items()}


@dataclass(frozen=True)
class StepResult:
    """Losses are means over the global count, before weighting: NaN where the step has no target of that kind."""

    loss: float
    losses: dict[str, float]
    grad_norm: float

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


NOTHING_DONE = (
    StepCounts(dict.fromkeys(MODALITY_NAMES, 0), dict.fromkeys(MODALITY_NAMES, 0)),
    StepResult(math.nan, dict.fromkeys(MODALITY_NAMES, math.nan), math.nan),
)
"""What a step reports whose data are passed over."""


def global_counts(micro_batches: Sequence[Batch], flops: int = 0) -> StepCounts:
    """Targets and tokens of the whole step in one all-reduce of host numbers; `flops` are this rank's."""
    targets = [sum(batch.target_counts.get(name, 0) for batch in micro_batches) for name in MODALITY_NAMES]
    tokens = [sum(batch.token_counts.get(name, 0) for batch in micro_batches) for name in MODALITY_NAMES]
    *summed, all_flops = sum_integers([*targets, *tokens, flops])
    middle = len(MODALITY_NAMES)
    return StepCounts(
        dict(zip(MODALITY_NAMES, summed[:middle], strict=True)),
        dict(zip(MODALITY_NAMES, summed[middle:], strict=True)),
        all_flops,
        frozenset(micro_batches[0].payloads) if micro_batches else frozenset(),
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
) -> torch.Tensor:
    """Forward and backward of every micro-batch; returns this rank's loss sums, [modalities] float64 on the device.

    Gradients are communicated once, with the last micro-batch (ZeRO from stage 2 on: with every one). Both engines average them over ranks,
    hence the factor `world_size`.
    """
    sums = torch.zeros(len(MODALITY_NAMES), dtype=torch.float64, device=device)
    for index, batch in enumerate(micro_batches):
        last = index == len(micro_batches) - 1
        set_gradient_sync(model, last)
        terms = model(batch.to(device)) if zero is None else zero.forward(batch.to(device))
        loss = weighted_loss(terms, weights, divisors) * world_size
        if zero is None:
            loss.backward()
        else:
            zero.backward(loss, last)
        for name, term in terms.items():
            sums[MODALITY_NAMES.index(name)] += term.sum.detach()
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
) -> StepResult:
    """Forward, backward, clip, and an optimizer step if `accept` says so of the result (else nothing changes).

    All ranks see the same loss and norm, so all take the same decision. The host waits for the device once, to read them. With `zero`,
    DeepSpeed clips (to the norm that it was started with) and updates what is finite; `accept` is only told.
    """
    if zero is not None:
        with zero.whole_root():
            sums = accumulate_gradients(model, micro_batches, weights, counts.divisors, world_size, device, zero)
        result = _result(sum_tensor(sums).tolist(), zero.step(), counts, weights)
        accept(result)
        return result
    trainable = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    sums = accumulate_gradients(model, micro_batches, weights, counts.divisors, world_size, device)
    norm = torch.nn.utils.clip_grad_norm_(trainable, clip_norm)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    *totals, grad_norm = torch.cat([sum_tensor(sums), norm.double().reshape(1).to(device)]).tolist()  # offloaded gradients have theirs on the CPU
    result = _result(totals, grad_norm, counts, weights)
    if accept(result):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return result


def _result(totals: Sequence[float], grad_norm: float, counts: StepCounts, weights: Mapping[str, float]) -> StepResult:
    losses = {
        name: total / counts.targets[name] if counts.targets[name] else math.nan for name, total in zip(MODALITY_NAMES, totals, strict=True)
    }
    divisors = counts.divisors
    loss = sum(weights[name] * (total / divisors[name]) for name, total in zip(MODALITY_NAMES, totals, strict=True) if counts.targets[name])
    return StepResult(loss, losses, grad_norm)
