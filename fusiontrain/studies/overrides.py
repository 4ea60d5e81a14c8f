"""Overrides of a study's trainings: which are refused."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fusiontrain.studies.study import Study
from fusiontrain.utils.errors import UserError

SETTING = ("model.recipe", "data.image.representation")
"""What a table's title names; another value would train something else under it."""


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


def _overlap(key: str, other: str) -> bool:
    """Whether one of two dotted keys is the other or a section around it."""
    return f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")
