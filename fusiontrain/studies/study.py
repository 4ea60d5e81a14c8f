"""A study: the trainings behind a table of a paper, what is measured of each, and what the paper lets one expect."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

Values = Mapping[str, Mapping[str, float | None]]
"""What was measured, by variant and column."""


@dataclass(frozen=True)
class Variant:
    """One training. overrides: what it changes in the study's config."""

    name: str
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Expectation:
    """words: an ordering that the paper reports. holds: whether the values show it; it may raise TypeError or KeyError where a value is missing."""

    words: str
    holds: Callable[[Values], bool]


@dataclass(frozen=True)
class Study:
    """name: on the command line. source: paper and table. columns: what is measured, see `measure.py`. published: the paper's own figures by variant,
    where it has them, and under `published_columns` what they are. baseline: the variant whose steps the slopes are shares of. series: shards of the
    world that are read, `*` for all. codes: pictures are read as codes, and speech as units, which the ground's world then holds."""

    name: str
    title: str
    source: str
    variants: tuple[Variant, ...]
    columns: tuple[str, ...]
    expectations: tuple[Expectation, ...]
    published_columns: tuple[str, ...] = ()
    published: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    common: tuple[str, ...] = ()
    baseline: str | None = None
    series: str = "pictures"
    codes: bool = False


@dataclass(frozen=True)
class Scale:
    """How much work a study is. documents: of the demo world. overrides: of every training; `llama`: of the Llama's. judged: pictures painted and
    captioned for the scores."""

    name: str
    documents: int
    judged: int
    overrides: tuple[str, ...]
    llama: tuple[str, ...] = ()


def judge_expectations(study: Study, values: Values) -> list[tuple[str, bool | None]]:
    """(words, whether it is seen) for each expectation; None where something that it needs was not measured."""
    found: list[tuple[str, bool | None]] = []
    for expectation in study.expectations:
        try:
            found.append((expectation.words, bool(expectation.holds(values))))
        except (KeyError, TypeError):
            found.append((expectation.words, None))
    return found
