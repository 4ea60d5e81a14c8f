"""What a study leaves behind: `table.json`, `table.md` and `curves.png`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fusiontrain.modality import MODALITY_NAMES
from fusiontrain.studies.measure import Finished
from fusiontrain.studies.step_matching import FIT, match_steps, smooth
from fusiontrain.studies.study import Scale, Study, Values
from fusiontrain.utils.errors import UserError

SEEN = {True: "seen", False: "not seen", None: "could not be judged"}


@dataclass(frozen=True)
class Made:
    """How a table was made. overrides: of every training. processes: of each. world: what its `world.json` says."""

    overrides: tuple[str, ...]
    seed: int
    processes: Mapping[str, int]
    world: Mapping[str, Any] | None

    def __str__(self) -> str:
        ranks = " or ".join(str(number) for number in sorted(set(self.processes.values())))
        word = "process" if ranks == "1" else "processes"
        seeds = f"seed {self.seed}" + ("" if self.world is None else f", a world of seed {self.world['seed']}")
        return f"Made with {seeds}, {ranks} {word} a training, " + (
            f"and these overrides: {', '.join(f'`{override}`' for override in self.overrides)}." if self.overrides else "and no overrides."
        )


def write_report(
    folder: Path,
    study: Study,
    scale: Scale,
    made: Made,
    finished: Mapping[str, Finished],
    values: Values,
    expectations: Sequence[tuple[str, bool | None]],
) -> dict[str, Any]:
    """Write the three files into `folder`; returns what is in `table.json`."""
    steps = {name: run.rows[-1]["step"] for name, run in finished.items()}
    report = {
        "study": study.name, "source": study.source, "scale": scale.name, "made": asdict(made), "steps": steps, "values": values,
        "trainings": {name: run.run.name for name, run in finished.items()},
        "published": {"columns": study.published_columns, "values": study.published}, "fit": FIT if study.baseline else None,
        "expectations": [{"expected": words, "seen": seen} for words, seen in expectations],
    }  # fmt: skip
    (folder / "table.json").write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    (folder / "table.md").write_text(markdown(study, scale, made, values, expectations, max(steps.values())))
    draw_curves(folder / "curves.png", study, finished)
    return report


def markdown(study: Study, scale: Scale, made: Made, values: Values, expectations: Sequence[tuple[str, bool | None]], steps: int) -> str:
    """The table beside the published figures, and which of the expected orderings appear."""
    head = ["", *study.columns, *(f"published: {name}" for name in study.published_columns)]
    blank = ("",) * len(study.published_columns)
    rows = [
        [variant.name, *(shown(values[variant.name][column]) for column in study.columns), *study.published.get(variant.name, blank)]
        for variant in study.variants
    ]
    lines = [
        f"# {study.title}", "",
        f"{study.source}. Scale {scale.name}: {steps:,} steps of each training on the demo world; the published figures are of models and data a thousand",
        "times as large and measure other things, so orderings are what can be compared.", "", str(made), "",
        *(_row(cells) for cells in (head, ["---"] * len(head), *rows)), "",
        *([f"Slope: share of the steps of `{study.baseline}` that the same loss takes ({FIT})."] if study.baseline else []), "",
        "| expected | |", "|---|---|", *(_row([words, SEEN[seen]]) for words, seen in expectations),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def shown(value: float | None) -> str:
    """Three digits behind the point, or fewer where the value is exactly whole; a dash where there is none."""
    return "-" if value is None else "0" if value == 0 else f"{value:.3f}"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def draw_curves(path: Path, study: Study, finished: Mapping[str, Finished]) -> None:
    """Smoothed training losses over steps for each modality and, with a baseline, its steps against the matched ones. Raises UserError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("curves need matplotlib: pip install 'fusiontrain[plots]'") from error
    keys = [f"loss/{name}" for name in MODALITY_NAMES if any(run.curve(f"loss/{name}") for run in finished.values())]
    baseline = finished.get(study.baseline or "")
    figure = Figure(figsize=(6 * len(keys), 4.5 * (1 + (baseline is not None))), layout="constrained")
    axes = figure.subplots(1 + (baseline is not None), len(keys), squeeze=False)
    for place, key in enumerate(keys):
        for number, (name, run) in enumerate(finished.items()):
            losses = smooth(run.curve(key))
            axes[0][place].plot(range(1, len(losses) + 1), losses, f"C{number}", label=name)
            if baseline is not None and run is not baseline:
                match = match_steps(baseline.curve(key), run.curve(key))
                slope = "never reached" if match.slope is None else f"slope {match.slope:.3f}"
                axes[1][place].plot(match.steps, match.matched, f"C{number}", label=f"{name}: {slope}")
        axes[0][place].set(title=f"{key}, smoothed", xlabel="step", yscale="log")
        if baseline is not None:
            axes[1][place].set(title=f"{key}: steps for the same loss", xlabel=f"step of {study.baseline}", ylabel="step")
    for axis in axes.flat:
        axis.legend(fontsize="small")
    figure.savefig(path, dpi=110)
