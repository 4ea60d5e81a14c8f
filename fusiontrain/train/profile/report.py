"""The profile of a run: what its ranks saw, as one document. Everything is per step, and the mean over ranks where it does not name one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from fusiontrain.models.flops import Part
from fusiontrain.train.profile.parts import BACKWARD, CHECKPOINT, EVERYTHING, FORWARD, MODEL_GROUPS, ONCE, OTHER_GROUPS, PHASES, RECOMPUTED, Cell
from fusiontrain.train.profile.peak import Peak
from fusiontrain.train.profile.window import RankProfile


@dataclass(frozen=True)
class Row:
    """One part of a step. seconds and flops: by phase. flops_per_second: what was computed, recomputation included; of_peak: its share of the peak, and
    lost_seconds: what the part takes beyond computing at the peak; both None where nobody knows the peak."""

    group: str
    modality: str
    seconds: dict[str, float]
    share: float
    flops: dict[str, float]
    flops_per_second: float | None
    of_peak: float | None
    lost_seconds: float | None

    @property
    def total(self) -> float:
        """Seconds of all phases."""
        return sum(self.seconds.values())

    @property
    def name(self) -> str:
        """What a table calls it."""
        return self.group if self.modality == EVERYTHING else f"{self.group}, {self.modality}"


@dataclass(frozen=True)
class RankRow:
    """One rank: its step, what of it computes, what of it waits for other ranks, and its tokens."""

    rank: int
    step_seconds: float
    model_seconds: float
    collectives_seconds: float
    tokens: dict[str, float]
    process_gib: float


@dataclass(frozen=True)
class Report:
    """`rows` sum to `step_seconds`, which holds its share of a checkpoint. imbalance: the largest over the mean of all ranks."""

    config: str
    device: str
    world_size: int
    steps: int
    warmup: int
    step_seconds: float
    rows: list[Row]
    hidden_collectives_seconds: float
    peak: Peak
    flops: dict[str, float]
    mfu: float | None
    hfu: float | None
    ranks: list[RankRow]
    imbalance: dict[str, float]
    memory: dict[str, dict[str, float]]
    compilation: dict[str, Any]
    syncs: dict[str, float]
    largest_loss: str
    cross_check: dict[str, Any] | None
    notes: list[str]
    files: list[str]

    def to_dict(self) -> dict[str, Any]:
        """What --json prints."""
        return dataclasses.asdict(self)


def make_rows(profiles: Sequence[RankProfile], steps: int, save_every: int, peak: float | None) -> list[Row]:
    """The parts of a step, those of the model first; a checkpoint's seconds are spread over the steps between two of them."""
    seconds: dict[Cell, float] = {}
    for profile in profiles:
        for cell, spent in profile.divided.cells.items():
            seconds[cell] = seconds.get(cell, 0.0) + spent / steps / len(profiles)
    save = Cell(CHECKPOINT, EVERYTHING, ONCE)
    seconds[save] = seconds.get(save, 0.0) + mean(profile.save_seconds for profile in profiles) / save_every
    total = sum(seconds.values())
    order = (*MODEL_GROUPS, *OTHER_GROUPS)
    keys = sorted({(cell.group, cell.modality) for cell in seconds}, key=lambda key: (order.index(key[0]), key[1] == EVERYTHING, key[1] != "text"))
    return [_row(group, modality, seconds, profiles, peak, total, keys) for group, modality in keys]


def _row(
    group: str,
    modality: str,
    seconds: dict[Cell, float],
    profiles: Sequence[RankProfile],
    peak: float | None,
    total: float,
    keys: Sequence[tuple[str, str]],
) -> Row:
    spent = {phase: seconds[Cell(group, modality, phase)] for phase in PHASES if Cell(group, modality, phase) in seconds}
    mine = sum(spent.values())
    flops = _flops(profiles, group, [modality] if modality != EVERYTHING else _rest(group, keys))
    counted = sum(flops.values())
    at_peak = counted / peak if peak else None
    return Row(
        group=group,
        modality=modality,
        seconds=spent,
        share=mine / total,
        flops=flops,
        flops_per_second=counted / mine if counted and mine else None,
        of_peak=at_peak / mine if at_peak and mine else None,
        lost_seconds=None if at_peak is None else max(0.0, mine - at_peak),
    )


def _rest(group: str, keys: Sequence[tuple[str, str]]) -> list[str]:
    """Modalities of a group that have no row of their own: theirs is the row for all."""
    return [name for name in ("text", "image") if (group, name) not in keys]


def _flops(profiles: Sequence[RankProfile], group: str, modalities: Sequence[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for modality in modalities:
        part = Part(group, modality)
        for phase, counts in (
            (FORWARD, [p.flops[part].forward for p in profiles if part in p.flops]),
            (BACKWARD, [p.flops[part].backward for p in profiles if part in p.flops]),
            (RECOMPUTED, [p.recomputed[part] for p in profiles if part in p.recomputed]),
        ):
            found[phase] = found.get(phase, 0.0) + sum(counts) / len(profiles)
    return {phase: count for phase, count in found.items() if count}


def rank_rows(profiles: Sequence[RankProfile], steps: int) -> list[RankRow]:
    """One row per rank."""
    return [
        RankRow(
            rank=profile.rank,
            step_seconds=sum(profile.divided.steps) / steps,
            model_seconds=sum(spent for cell, spent in profile.divided.cells.items() if cell.group in MODEL_GROUPS) / steps,
            collectives_seconds=sum(spent for cell, spent in profile.divided.cells.items() if cell.group == "collectives exposed") / steps,
            tokens=profile.tokens,
            process_gib=profile.memory.process_gib,
        )
        for profile in profiles
    ]


def imbalance_of(ranks: Sequence[RankRow]) -> dict[str, float]:
    """The largest over the mean: of the time that a rank computes, and of its tokens."""
    found = {}
    for name, values in (("model_seconds", [rank.model_seconds for rank in ranks]), ("tokens", [sum(rank.tokens.values()) for rank in ranks])):
        found[name] = max(values) / mean(values) if mean(values) else 1.0
    return found


def total_flops(profiles: Sequence[RankProfile]) -> dict[str, float]:
    """Of all ranks together. model: forward and backward once; hardware: with recomputation; 6ND: as papers would bill it."""
    model = sum(flops.total for profile in profiles for flops in profile.flops.values())
    again = sum(sum(profile.recomputed.values()) for profile in profiles)
    return {"model": model, "hardware": model + again, "6ND": sum(profile.six_nd for profile in profiles)}
