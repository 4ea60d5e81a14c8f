"""`fusiontrain estimate`: what a configuration would take on so many GPUs, found out without any."""

from __future__ import annotations

import argparse
import textwrap
from typing import Any

from fusiontrain.cli.common import add_config_arguments, add_json_argument, print_json, print_table
from fusiontrain.utils.errors import UserError

GPUS = ("a100", "h100", "h200", "b200", "mi300", "cpu")
WIDTH = 100


def add_parser(subparsers: Any) -> None:
    """Adds `estimate` to the program's subparsers."""
    parser = subparsers.add_parser("estimate", help="memory, FLOPs, traffic and time of a training, without GPUs")
    add_config_arguments(parser)
    parser.add_argument("--nodes", type=int, default=1, help="machines (default: 1)")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="GPUs of a machine, one process each (default: 8)")
    parser.add_argument("--gpu", choices=GPUS, default="h100", help="kind of GPU (default: h100)")
    parser.add_argument("--text-tokens", type=int, help="of every sequence, instead of what the index of the data says")
    parser.add_argument("--image-tokens", type=int, help="of every sequence, as whole images, instead of what the index of the data says")
    parser.add_argument(
        "--tokens-per-image", type=int, help="where the files decide: latents, codes and resize: native (default: of data.image.size, 8 pixels a latent cell)"
    )
    parser.add_argument("--compute-efficiency", type=float, default=0.5, help="share of the peak FLOP/s that is reached (default: 0.5)")
    parser.add_argument("--link-efficiency", type=float, default=0.7, help="share of the links' bandwidth that is reached (default: 0.7)")
    parser.add_argument("--overlap", type=float, default=0.9, help="share of the communication that runs beside computation (default: 0.9)")
    parser.add_argument("--no-advice", action="store_true", help="do not look at other settings, which takes most of the time")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Exit code 0 whether or not it fits; UserError for a config or a mesh that cannot be."""
    for name in ("nodes", "gpus_per_node"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    for name, least in (("text_tokens", 0), ("image_tokens", 0), ("tokens_per_image", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    for name in ("compute_efficiency", "link_efficiency", "overlap"):
        if not 0 < getattr(args, name) <= 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be above 0 and at most 1")
    from fusiontrain.config.load import load
    from fusiontrain.train.estimate.estimator import Estimator, Target
    from fusiontrain.train.estimate.hardware import DEVICES, Efficiency
    from fusiontrain.train.estimate.report import report

    config = load(args.config, args.overrides)
    efficiency = Efficiency(compute=args.compute_efficiency, links=args.link_efficiency, overlap=args.overlap)
    target = Target(args.nodes * args.gpus_per_node, DEVICES[args.gpu], args.gpus_per_node, efficiency)
    estimator = Estimator(config, target, args.text_tokens, args.image_tokens, args.tokens_per_image)
    document = {"config": args.config, **report(estimator, not args.no_advice)}
    if args.json:
        print_json(document)
    else:
        _print(document)
    return 0


def _print(document: dict[str, Any]) -> None:
    mesh, step = document["mesh"], document["step"]
    print(f"{document['config']} on {document['world_size']} x {document['device']}, dp_replicate {mesh['dp_replicate']} x dp_shard {mesh['dp_shard']}")
    _section("parameters")
    kinds = ("trainable", "frozen")
    print_table([("", *kinds), *((group, *(counts[kind] for kind in kinds)) for group, counts in document["parameters"].items())], "  ")
    per_sequence = ", ".join(f"{value:,.0f} {name}" for name, value in step["per_sequence"].items())
    _section(f"step: {step['sequences']} sequences; {step['micro_batches']} micro-batches of {step['micro_batch_sequences']} on a rank")
    print(f"  per sequence: {per_sequence}")
    print_table([(f"FLOPs {kind}", f"{count:.4g}") for kind, count in document["flops"].items()], "  ")
    _print_memory(document["memory"])
    _section("traffic of a rank in a step")
    rows = [(t["collective"], f"{t['ranks']} ranks", "between nodes" if t["between_nodes"] else "inside a node", f"{t['calls']:,} calls",
             _gib(t["message_bytes"]), f"sends {_gib(t['sent_bytes'])}") for t in document["traffic"]]  # fmt: skip
    if rows:
        print_table(rows, "  ")
    else:
        print("  none")
    _print_time(document["time"])
    _print_advice(document)
    _section("assumptions")
    for sentence in document["assumptions"]:
        print(textwrap.fill(sentence, WIDTH, initial_indent="  - ", subsequent_indent="    "))


def _print_memory(memory: dict[str, Any]) -> None:
    available = memory["available_bytes"]
    verdict = "" if available is None else f" of {_gib(available)}: {'fits' if memory['fits'] else 'DOES NOT FIT'}"
    _section(f"memory of a rank: {_gib(memory['peak_bytes'])}{verdict}; the peak is in the {memory['peak_phase']}")
    print_table([(name + (" (on the host)" if name in memory["on_host"] else ""), _gib(size)) for name, size in memory["categories"].items()], "  ")
    print("  peaks by phase: " + ", ".join(f"{phase} {_gib(size)}" for phase, size in memory["peak_bytes_by_phase"].items()))


def _print_time(time: dict[str, Any] | None) -> None:
    if time is None:
        return
    _section(f"time of a step: {time['step_seconds']:.2f} s, MFU {time['mfu']:.1%}, {time['tokens_per_second_per_gpu']:,.0f} tokens/s per GPU")
    parts = f"  compute {time['compute_seconds']:.2f} s, update {time['optimizer_seconds']:.2f} s"
    print(f"{parts}, communication {time['communication_seconds']:.2f} s of which {time['exposed_communication_seconds']:.2f} s are not hidden")


def _print_advice(document: dict[str, Any]) -> None:
    if not document["advice"]:
        return
    _section("what would be faster and fit too" if document["memory"]["fits"] else "what saves memory, the fastest that fits first")
    rows = []
    for one in document["advice"]:
        settings = " ".join(f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in one["settings"].items())
        sign = "-" if one["saves_bytes"] >= 0 else "+"
        verdict = "fits" if one["fits"] else "does not fit"
        rows.append((f"{_gib(one['peak_bytes'])} ({sign}{_gib(abs(one['saves_bytes']))})", f"{one['step_seconds']:.2f} s", verdict, settings))
    print_table(rows, "  ")


def _section(title: str) -> None:
    print(f"\n{title}")


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**24 else f"{size / 2**20:.2f} MiB"
