"""`fusiontrain reproduce TABLE`: the trainings behind a paper's table, at a scale that one machine can afford, and the table they give."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fusiontrain.cli.common import ProgressLines, add_json_argument, note, print_json, print_table
from fusiontrain.utils.errors import UserError

OVERRIDES = """for every training of the table, such as train.steps=50 (the warm-up is then a tenth of that at most); not for the Llama's pretraining,
and not of what the table compares. A table made with overrides or another seed lies in a folder of its own"""


def add_parser(subparsers: Any) -> None:
    """Adds `reproduce` to the program's subparsers."""
    parser = subparsers.add_parser("reproduce", help="a paper's comparison at small scale: train every variant, then the table beside the published one")
    parser.add_argument("table", metavar="TABLE", nargs="?", help="which one; without it, their names")
    parser.add_argument("--scale", choices=["tiny", "small"], default="tiny", help="tiny: minutes to an hour on two CPU cores; small: one 80 GB GPU")
    parser.add_argument("--out", default="runs/reproduce", help="folder; what is done there is not done again (default: runs/reproduce)")
    parser.add_argument("--processes", type=int, default=None, help="ranks of the trainings (default: 2 for tiny, 1 for small)")
    parser.add_argument("--seed", type=int, default=0, help="of the trainings; the world and the Llama stay the same (default: 0)")
    parser.add_argument("overrides", metavar="a.b=c", nargs="*", help=OVERRIDES)
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Exit code 0, whether or not the expected orderings appear; UserError for an unknown table or a training that fails."""
    from fusiontrain.studies.run import Work
    from fusiontrain.studies.tables import SCALES, STUDIES

    if args.table is None:
        rows = [{"table": study.name, "title": study.title, "source": study.source, "trainings": len(study.variants)} for study in STUDIES.values()]
        if args.json:
            print_json({"tables": rows})
        else:
            print_table([[row["table"], row["trainings"], row["title"]] for row in rows])
        return 0
    if args.table not in STUDIES:
        raise UserError(f"there is no table {args.table!r} to reproduce: choose from {', '.join(STUDIES)}")
    if args.processes is not None and args.processes < 1:
        raise UserError(f"--processes {args.processes}: must be at least 1")
    processes = args.processes or (2 if args.scale == "tiny" else 1)
    work = Work(STUDIES[args.table], SCALES[args.scale], tuple(args.overrides), Path(args.out), processes, args.seed, note, ProgressLines())
    report = work.run()
    if args.json:
        print_json(report)
    else:
        print((work.folder / "table.md").read_text(), end="")
    note(f"in {work.folder}: table.md, table.json, curves.png")
    return 0
