"""`fusiontrain config show|check`: what a configuration resolves to, and whether it is right."""

from __future__ import annotations

import argparse
from typing import Any

from fusiontrain.cli.common import add_config_arguments, add_json_argument, print_json


def add_parser(subparsers: Any) -> None:
    """Adds `config` to the program's subparsers."""
    actions = subparsers.add_parser("config", help="show or check a configuration").add_subparsers(
        dest="action", metavar="ACTION", required=True
    )
    show = actions.add_parser("show", help="print the whole configuration, defaults and overrides included")
    check = actions.add_parser("check", help="exit 0 if it is right; else list everything that is wrong and exit 2")
    for parser in (show, check):
        add_config_arguments(parser)
        add_json_argument(parser)
    check.add_argument("--files", action="store_true", help="also look for the files that it names")


def run(args: argparse.Namespace) -> int:
    """Exit code 0, or UserError with one line per problem."""
    from fusiontrain.config.load import load, to_yaml

    config = load(args.config, args.overrides)
    if args.action == "show":
        if args.json:
            print_json(config.model_dump(mode="json"))
        else:
            print(to_yaml(config), end="")
        return 0
    if args.files:
        _check_files(args.config, config)
    if args.json:
        print_json({"config": args.config, "ok": True})
    else:
        print(f"{args.config}: ok" + ("" if args.files else " (values alone; --files also looks for what it names)"))
    return 0


def _check_files(path: str, config: Any) -> None:
    from fusiontrain.config.validate import file_problems
    from fusiontrain.utils.errors import UserError

    problems = file_problems(config)
    if problems:
        raise UserError("\n".join(f"{path}: {problem}" for problem in problems))
