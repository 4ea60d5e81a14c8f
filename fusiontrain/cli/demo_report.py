"""What the demo leaves behind: `report.json`, `report.md` and a contact sheet."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

SHEET_FILE = "contact_sheet.png"
TARGETS = {"color_accuracy": 0.80, "shape_accuracy": 0.60, "place_accuracy": 0.60, "caption_accuracy": 0.60}
CHANCE = {"color_accuracy": "1/8", "shape_accuracy": "1/4", "place_accuracy": "about 1/4", "caption_accuracy": "0.003"}


def write_pictures(folder: Path, prompts: Sequence[str], pictures: Sequence[np.ndarray], sheet_size: int) -> list[dict[str, str]]:
    """Save every picture and a sheet of the first `sheet_size`; returns the report's `samples`: prompt and file, relative to the report."""
    from PIL import Image

    from fusiontrain.generate.pictures import contact_sheet

    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    samples = []
    for number, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True)):
        file = f"pictures/{number:03d}.png"
        Image.fromarray(picture).save(folder / file)
        samples.append({"prompt": prompt, "file": file})
    contact_sheet(pictures[:sheet_size], prompts[:sheet_size], columns=6).save(folder / SHEET_FILE)
    return samples


def write_report(folder: Path, report: dict[str, Any]) -> None:
    (folder / "report.json").write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    (folder / "report.md").write_text(_markdown(report))


def _markdown(report: dict[str, Any]) -> str:
    lines = [
        "# A language model that learnt to paint",
        "",
        f"![prompts and pictures]({SHEET_FILE})",
        "",
        "| | this run | chance | aim |",
        "|---|---|---|---|",
        *(
            f"| {name.removesuffix('_accuracy')} | {report[name]:.2f} | {CHANCE[name]} | {aim:.2f} |"
            for name, aim in TARGETS.items()
            if report[name] is not None
        ),
        "",
        f"- Text logits of the trained model and of the Llama it came from: "
        f"{'identical bit for bit' if report['text_logits_identical'] else 'DIFFERENT'} ({report['text_tokens_compared']:,} tokens).",
        f"- Stopped with SIGTERM after step {report['stopped_after_step']}, resumed; a replay from an earlier checkpoint repeats the stopped run "
        f"{'bit for bit' if report['resume_identical'] else 'NOT EXACTLY'} ({report['steps_compared']} steps).",
        f"- Loss of text {_change(report['loss/text'])}, of images {_change(report['loss/image'])}.",
        f"- {report['tokens_per_second']:,.0f} tokens per second, {report['steps']:,} steps, {report['seconds']:.0f} seconds in all.",
        f"- Image objective: {report['objective']} (the papers' is ddpm: `fusiontrain demo objective.image=ddpm`).",
        "",
        "## Where the time went",
        "",
        "| stage | seconds |",
        "|---|---|",
        *(f"| {stage} | {seconds:.0f} |" for stage, seconds in report["stage_seconds"].items()),
        "",
        "## Scores in detail",
        "",
        "```json",
        json.dumps(report["scores"], indent=2),
        "```",
        "",
    ]
    return "\n".join(lines)


def _change(loss: dict[str, float | None]) -> str:
    start, end = loss["start"], loss["end"]
    return "not measured" if start is None or end is None else f"{start:.3f} -> {end:.3f}"
