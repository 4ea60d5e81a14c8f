"""Overrides of a study's trainings: which are refused, what goes with them, and where a table made with them lies."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from fusiontrain.studies.study import Scale, Study
from fusiontrain.utils.errors import UserError

SETTING = ("model.recipe", "data.image.representation")
"""What a table's title names; another value would train something else under it."""


WARMUP = "optimizer.warmup_steps"
WARMUP_SHARE = 10
SEED = 0
"""Of the ground, and of the trainings of a table that lies in `SCALE/TABLE`."""


def key_of(override: str) -> str:
    """`train.steps=50` -> `train.steps`."""
    return override.partition("=")[0]


def refuse_fixed(study: Study, places: Iterable[str], overrides: Sequence[str]) -> None:
    """Raises UserError for an override of what the table compares, of what its title names, and of the files that the ground made (`places`, written as
    overrides): of such a key, of a section around it, or of a part of it."""
    compared = {key_of(override) for variant in study.variants for override in variant.overrides}
    why = dict.fromkeys(map(key_of, places), "is set by the command, to what it made or was given")
    why |= dict.fromkeys(SETTING, "is what its title names")
    why |= dict.fromkeys(compared, "is what it compares")
    for key in map(key_of, overrides):
        for fixed, reason in why.items():
            if _overlap(key, fixed):
                what = f"{key}: cannot be overridden for the table {study.name}: {fixed} {reason}"
                raise UserError(f"{what}; leave it out, or train that model by itself with `fusiontrain train`")


def fit_warmup(scale: Scale, overrides: tuple[str, ...]) -> tuple[str, ...]:
    """The overrides; where they set train.steps and say nothing of the warm-up, then also the scale's warm-up, or a tenth of the steps if that is less."""
    steps = _values(overrides).get("train.steps", "")
    if not steps.isdecimal() or any(_overlap(key_of(override), WARMUP) for override in overrides):
        return overrides
    most = int(steps) // WARMUP_SHARE
    return (*overrides, f"{WARMUP}={min(int(_values(scale.overrides).get(WARMUP, most)), most)}")


def folder_name(study: Study, overrides: Sequence[str], seed: int) -> str:
    """The table's name; with overrides or another seed than `SEED` a hash of both behind it, so that no table takes another's place."""
    if not overrides and seed == SEED:
        return study.name
    said = repr((sorted(_values(overrides).items()), seed))
    return f"{study.name}-{hashlib.sha256(said.encode()).hexdigest()[:8]}"


def _values(overrides: Sequence[str]) -> dict[str, str]:
    """By key; the last one counts."""
    parts = (override.partition("=") for override in overrides)
    return {key: value for key, _, value in parts}


def _overlap(key: str, other: str) -> bool:
    """Whether one of two dotted keys is the other or a section around it."""
    return f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")
