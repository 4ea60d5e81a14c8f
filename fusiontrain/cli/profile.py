"""`fusiontrain profile`: where the time, the FLOPs and the memory of a step go, alone or as one of torchrun's processes."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusiontrain.cli.common import add_config_arguments, add_json_argument, print_json, print_table
from fusiontrain.utils.errors import UserError

if TYPE_CHECKING:
    from fusiontrain.train.profile.report import Report

WIDTH = 100
TOLD = 0.0005
"""Share of a step from which on a part has a line of its own on the terminal."""


def add_parser(subparsers: Any) -> None:
    """Adds `profile` to the program's subparsers."""
    parser = subparsers.add_parser("profile", help="where the time of a step goes; under torchrun, one process per device")
    add_config_arguments(parser)
    parser.add_argument("--steps", type=int, default=5, help="steps that are timed (default: 5)")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them (default: 3)")
    parser.add_argument("--out", metavar="DIR", help="where report and traces go (default: profile/ in run.dir)")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Exit code 0 with the report written; UserError for bad input."""
    for name in ("steps", "warmup"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least 1")
    from fusiontrain.cli.first_use import prepare
    from fusiontrain.cli.rank_errors import end_before_start, others_failed
    from fusiontrain.cli.train import SilentReporter
    from fusiontrain.config.load import load
    from fusiontrain.parallel.mesh import process_group, read_ranks
    from fusiontrain.train.build import check_config
    from fusiontrain.train.profile.take import take_profile

    ranks = read_ranks()
    try:
        config = load(args.config, args.overrides)
        prepare(config, ranks)
        check_config(config, ranks.world_size)
    except UserError as error:
        if ranks.world_size == 1:
            raise
        end_before_start(error, ranks)
        return 2
    folder = Path(args.out) if args.out else Path(config.run.dir) / "profile"
    with process_group(ranks, config.parallel):
        if others_failed():
            return 2
        report = take_profile(config, args.config, ranks, SilentReporter(), args.steps, args.warmup, folder)
    if report is not None:
        if args.json:
            print_json({**report.to_dict(), "folder": str(folder)})
        else:
            _print(report, folder)
    return 0


def _print(report: Report, folder: Path) -> None:
    print(f"{report.config} on {report.world_size} x {report.device}: {report.steps} steps behind {report.warmup}, {report.step_seconds * 1e3:.1f} ms each\n")
    phases = [phase for phase in ("forward", "backward", "recomputed") if any(phase in row.seconds for row in report.rows)]
    rows = [("", *(f"{phase} ms" for phase in phases), "ms", "share", "GFLOP/s", "of peak")]
    told = [row for row in report.rows if row.share >= TOLD]
    for row in told:
        times = (f"{row.seconds[phase] * 1e3:.2f}" if phase in row.seconds else "" for phase in phases)
        rate = f"{row.flops_per_second / 1e9:,.1f}" if row.flops_per_second else ""
        rows.append((row.name, *times, f"{row.total * 1e3:.2f}", f"{row.share:.1%}", rate, f"{row.of_peak:.0%}" if row.of_peak else ""))
    if others := [row for row in report.rows if row.share < TOLD]:
        total, share = sum(row.total for row in others), sum(row.share for row in others)
        rows.append((f"smaller parts ({len(others)})", *("" for _ in phases), f"{total * 1e3:.2f}", f"{share:.1%}", "", ""))
    rows.append(("a step", *("" for _ in phases), f"{report.step_seconds * 1e3:.2f}", f"{sum(row.share for row in report.rows):.1%}", "", ""))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    print_table([(row[0], *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))) for row in rows], "  ")
    _print_findings(report)
    print(f"\n{textwrap.fill(report.largest_loss, WIDTH)}")
    print(f"{folder / report.files[0]} has memory, ranks and all numbers; the traces beside it open in ui.perfetto.dev")


def _print_findings(report: Report) -> None:
    flops, peak = report.flops, report.peak
    utilisation = f"MFU {report.mfu:.1%}, with recomputation {report.hfu:.1%}" if report.mfu is not None and report.hfu is not None else "MFU null"
    known = "not known" if peak.flops is None else f"{peak.flops / 1e9:,.1f} GFLOP/s"
    lines = [
        f"FLOPs of a step: {flops['model']:.4g}, with recomputation {flops['hardware']:.4g}; 6ND would say {flops['6ND']:.4g}",
        f"{utilisation}; peak of a rank: {known} ({peak.source})",
        f"collectives hidden behind computing: {report.hidden_collectives_seconds * 1e3:.2f} ms; largest over mean of the ranks: "
        f"model time {report.imbalance['model_seconds']:.2f}, tokens {report.imbalance['tokens']:.2f}",
        f"compiled again {report.compilation['compiled_again']} times, {len(report.compilation['graph_breaks'])} graph breaks; "
        f"{sum(report.syncs.values()):.1f} operators a step {'that a GPU would be waited for' if report.device == 'CPU' else 'wait for the device'}",
    ]
    if report.memory:
        moment, held = max(report.memory.items(), key=lambda item: sum(item[1].values()))
        lines.append(f"tensors of rank 0: {sum(held.values()) / 2**20:,.1f} MiB at most, in {moment}")
    if report.cross_check and report.cross_check["ratio"]:
        lines.append(f"FLOPs of a forward without attention to those of DeepSpeed's profiler: {report.cross_check['ratio']:.4f}")
    print("\n" + "\n".join(textwrap.fill(line, WIDTH) for line in lines))
