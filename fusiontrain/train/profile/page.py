"""The profile as one HTML page that needs nothing else: no scripts, no files beside it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from fusiontrain.train.profile.parts import MODEL_GROUPS, OTHER_GROUPS, PHASES
from fusiontrain.train.profile.report import Report, Row

COLORS = (
    "#4c78a8", "#54a24b", "#e45756", "#f58518", "#b8a65a", "#72b7b2", "#9d755d", "#b279a2", "#ff9da6", "#5e5b9f", "#8c9aab",
    "#d62728", "#e7969c", "#c7a252", "#a05195", "#7b6888", "#a9bcd0", "#6b8e23", "#d0d4da",
)  # fmt: skip
"""Of groups, in the order of `parts`."""

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2733; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
table { border-collapse: collapse; width: 100%; } th, td { padding: .22rem .6rem; border-bottom: 1px solid #e4e8ec; text-align: right; }
th { font-weight: 600; color: #56636f; } th:first-child, td:first-child { text-align: left; }
tfoot td { font-weight: 600; } .sub { color: #56636f; margin-top: 0; }
.loss { background: #fff4e5; border-left: 4px solid #f58518; padding: .6rem 1rem; }
.bar { display: flex; height: 2.2rem; border-radius: 4px; overflow: hidden; margin: 1rem 0 .4rem; } .bar span { min-width: 1px; }
.legend span { display: inline-block; margin-right: 1.1rem; white-space: nowrap; }
.dot { width: .75rem; height: .75rem; border-radius: 2px; margin-right: .35rem; display: inline-block; }
.memory td:nth-child(3) { width: 45%; } .memory .bar { height: 1.1rem; margin: 0; } td.text { text-align: left; }
"""


def page(report: Report) -> str:
    """The whole page."""
    place = f"{report.world_size} x {report.device}, {report.steps} steps behind {report.warmup}"
    files = ", ".join(f'<a href="{escape(name)}">{escape(name)}</a>' for name in report.files)
    body = [
        f"<h1>Where a step goes: {escape(report.config)}</h1>",
        f"<p class=sub>{escape(place)}; a step takes {_ms(report.step_seconds)} ms</p>",
        f"<p class=loss>{escape(report.largest_loss)}</p>",
        _bar(report),
        "<h2>Time and FLOPs by part</h2>",
        _parts(report),
        f"<p>Collectives hidden behind computing: {_ms(report.hidden_collectives_seconds)} ms.</p>",
        "<h2>FLOPs of a step, all ranks</h2>",
        _flops(report),
        "<h2>Memory over a step, rank 0</h2>",
        _memory(report),
        "<h2>Ranks</h2>",
        _ranks(report),
        "<h2>Compilation and waits of the host</h2>",
        _findings(report),
        "<h2>Notes</h2>",
        "<ul>" + "".join(f"<li>{escape(note)}</li>" for note in report.notes) + "</ul>",
        f"<p>Files: {files}; traces open in ui.perfetto.dev, memory snapshots in pytorch.org/memory_viz.</p>",
    ]
    head = f'<meta charset="utf-8"><title>Profile of {escape(report.config)}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(body) + "\n</body></html>\n"


def _bar(report: Report) -> str:
    groups: dict[str, float] = {}
    for row in report.rows:
        groups[row.group] = groups.get(row.group, 0.0) + row.share
    pieces = [(name, share, _color(name)) for name, share in groups.items()]
    return _stack(pieces) + _legend([(f"{name} {share:.1%}", color) for name, share, color in pieces if share >= 0.0005])


def _parts(report: Report) -> str:
    phases = [phase for phase in PHASES if any(phase in row.seconds for row in report.rows)]
    head = ["part", *(f"{phase} ms" for phase in phases), "ms", "share", "GFLOP", "GFLOP/s", "of peak"]
    rows = [_part(row, phases) for row in report.rows]
    total = sum(sum(row.flops.values()) for row in report.rows)
    foot = ["a step", *("" for _ in phases), _ms(report.step_seconds), f"{sum(row.share for row in report.rows):.1%}", _giga(total), "", _percent(report.hfu)]
    return _table(head, rows, foot)


def _part(row: Row, phases: Sequence[str]) -> list[str]:
    times = [_ms(row.seconds[phase]) if phase in row.seconds else "" for phase in phases]
    return [row.name, *times, _ms(row.total), f"{row.share:.1%}", _giga(sum(row.flops.values())), _giga(row.flops_per_second), _percent(row.of_peak)]


def _flops(report: Report) -> str:
    words = {"model": "of the model: forward and backward", "hardware": "of the hardware: with what is recomputed", "6ND": "as 6ND would bill it"}
    peak = "not known" if report.peak.flops is None else f"{report.peak.flops / 1e9:,.1f} GFLOP/s per rank"
    rows = [[words[name], _giga(count), f"{count / report.flops['model']:.2f}"] for name, count in report.flops.items()]
    found = _table(["FLOPs", "GFLOP", "to the model's"], rows)
    found += f"<p>Peak: {peak} ({escape(report.peak.source)}). MFU {_percent(report.mfu) or 'null'}, HFU {_percent(report.hfu) or 'null'}.</p>"
    if report.cross_check:
        check = report.cross_check
        ours, theirs = _giga(check["forward_flops"]), _giga(check["deepspeed_forward_flops"])
        found += f"<p>A forward of one micro-batch without attention: {ours} GFLOP by this count, {theirs} by DeepSpeed's profiler.</p>"
    return found


def _memory(report: Report) -> str:
    names = list(dict.fromkeys(name for moment in report.memory.values() for name in moment))
    colors = {name: COLORS[index % len(COLORS)] for index, name in enumerate(names)}
    most = max((sum(moment.values()) for moment in report.memory.values()), default=1.0)
    rows = [
        f"<tr><td>{escape(name)}</td><td>{sum(moment.values()) / 2**20:,.2f}</td><td>"
        + _stack([(kind, size / most, colors[kind]) for kind, size in moment.items()]) + "</td></tr>"
        for name, moment in report.memory.items()
    ]  # fmt: skip
    table = "<table class=memory><thead><tr><th>peak in</th><th>MiB</th><th></th></tr></thead><tbody>" + "".join(rows) + "</tbody></table>"
    return table + _legend(list(colors.items()))


def _ranks(report: Report) -> str:
    head = ["rank", "step ms", "model ms", "collectives exposed ms", "text tokens", "image tokens", "process GiB"]
    rows = [
        [str(rank.rank), _ms(rank.step_seconds), _ms(rank.model_seconds), _ms(rank.collectives_seconds),
         *(f"{rank.tokens.get(name, 0):,.0f}" for name in ("text", "image")), f"{rank.process_gib:.2f}"]
        for rank in report.ranks
    ]  # fmt: skip
    words = ", ".join(f"{name.replace('_seconds', ' time')} {value:.2f}" for name, value in report.imbalance.items())
    return _table(head, rows) + f"<p>Largest over mean: {escape(words)}.</p>"


def _findings(report: Report) -> str:
    found = report.compilation
    first = f"<p>Compiled {found['compiled_while_warming_up']} pieces of code while warming up, {found['compiled_again']} again in the profiled steps.</p>"
    breaks = "".join(f"<li>graph break: {escape(reason)} ({count})</li>" for reason, count in found["graph_breaks"].items())
    waits = "".join(f"<li>{escape(what)}: {count:,.1f} a step</li>" for what, count in report.syncs.items())
    return first + (f"<ul>{breaks}{waits}</ul>" if breaks or waits else "<p>No graph breaks, and nothing waits for the device.</p>")


def _stack(pieces: Iterable[tuple[str, float, str]]) -> str:
    spans = (f'<span style="width:{100 * share:.3f}%;background:{color}" title="{escape(name)} {share:.1%}"></span>' for name, share, color in pieces)
    return f"<div class=bar>{''.join(spans)}</div>"


def _legend(names: Iterable[tuple[str, str]]) -> str:
    spans = (f'<span><i class=dot style="background:{color}"></i>{escape(name)}</span>' for name, color in names)
    return f"<p class=legend>{''.join(spans)}</p>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], foot: Sequence[str] | None = None) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    end = "" if foot is None else f"<tfoot>{line(foot, 'td')}</tfoot>"
    return f"<table><thead>{line(head, 'th')}</thead><tbody>{body}</tbody>{end}</table>"


def _color(group: str) -> str:
    return COLORS[(*MODEL_GROUPS, *OTHER_GROUPS).index(group)]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.2f}"


def _giga(count: Any) -> str:
    return f"{count / 1e9:,.3f}" if count else ""


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"
