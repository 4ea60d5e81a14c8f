"""`fusiontrain data`: the demo world, the index of shards, and what a plan will show a model."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from fusiontrain.cli.common import add_config_arguments, add_json_argument, note, print_json, print_table
from fusiontrain.utils.errors import UserError


def add_parser(subparsers: Any) -> None:
    """Adds `data` to the program's subparsers."""
    actions = subparsers.add_parser("data", help="make, index, check and look at data").add_subparsers(dest="action", metavar="ACTION", required=True)
    world = actions.add_parser("make-world", help="write the demo world: scenes, pictures and captions as tar shards")
    world.add_argument("directory", metavar="DIR")
    world.add_argument("--documents", type=int, default=2000)
    world.add_argument("--seed", type=int, default=0)
    index = actions.add_parser("index", help="index shards (kept beside them) and count what is in them")
    verify = actions.add_parser("verify", help="read every member and compare its CRC32, decode every image; exit 2 on damage")
    inspect = actions.add_parser("inspect", help="show one sample as text")
    for parser in (index, verify, inspect):
        parser.add_argument("shards", metavar="SHARDS", nargs="+", help="a tar, a folder of tars, a glob, or a brace range")
        parser.add_argument("--tokenizer", help="folder or tokenizer.json, or 'bytes': tokenise the texts too, as a training with it would")
        parser.add_argument("--workers", type=int, default=1, help="processes that index, a shard at a time (default: 1)")
    index.add_argument("--exclude", metavar="FILE", help="leave the samples of this file of JSON lines (shard, key) out of every plan from now on")
    inspect.add_argument("--sample", type=int, default=0, help="number of the sample (default: 0)")
    plan = actions.add_parser("plan", help="what the first steps of a training will hold: no sample is read")
    add_config_arguments(plan)
    plan.add_argument("--steps", type=int, default=20)
    for parser in (world, index, verify, inspect, plan):
        add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Exit code 0, or UserError with one sentence."""
    actions = {"make-world": _make_world, "index": _index, "verify": _verify, "inspect": _inspect, "plan": _plan}
    report = actions[args.action](args)
    if args.json:
        print_json(report)
    else:
        print_table((key, value if isinstance(value, int) else str(value)) for key, value in report.items())
    return 0


def _make_world(args: argparse.Namespace) -> dict[str, Any]:
    from fusiontrain.data.world import make_world

    info = make_world(args.directory, args.documents, args.seed)
    return {"world": args.directory, "seed": args.seed, **{f"{split} documents": count for split, count in info["documents"].items()}}


def _indexed(args: argparse.Namespace) -> list[tuple[Path, Any, int | None]]:
    """(shard, index, text tokens or None) of every shard, with a bar on a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    from fusiontrain.config.schema import TokenizerConfig
    from fusiontrain.data.index_cache import build_all
    from fusiontrain.data.shards import expand_shards

    shards = [shard for path in args.shards for shard in expand_shards(path)]
    tokenizer = None if args.tokenizer is None else (args.tokenizer, TokenizerConfig())
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        return list(progress.track(build_all(shards, "auto", False, tokenizer, args.workers), len(shards), description="shards"))


def _index(args: argparse.Namespace) -> dict[str, Any]:
    from fusiontrain.data.exclude import exclude, read_exclusions
    from fusiontrain.data.index import IMAGE_PIECE

    indexed = _indexed(args)
    excluded = exclude([shard for shard, *_ in indexed], read_exclusions(Path(args.exclude)) if args.exclude else {})
    indexes = [index for _, index, _ in indexed]
    tokens = [count for *_, count in indexed if count is not None]
    return {
        "shards": len(indexes),
        "samples": sum(map(len, indexes)),
        "unusable samples": sum(len(index.bad) for index in indexes),
        "excluded samples": excluded,
        "images": sum(int((index.kinds == IMAGE_PIECE).sum()) for index in indexes),
        "text bytes": sum(int(index.text_bytes.sum()) for index in indexes),
        **({"text tokens": sum(tokens)} if tokens else {}),
    }


def _verify(args: argparse.Namespace) -> dict[str, Any]:
    """Structure and headers are checked by indexing; then every member is read again, its CRC32 compared, and every image decoded."""
    from fusiontrain.data.verify import verify_shard

    problems: list[str] = []
    samples = 0
    for shard, index, _ in _indexed(args):
        problems += verify_shard(shard, index)
        samples += len(index)
    if problems:
        raise UserError("\n".join(problems))
    return {"samples": samples, "problems": 0}


def _inspect(args: argparse.Namespace) -> dict[str, Any]:
    from fusiontrain.data.errors import BadSample
    from fusiontrain.data.formats.read import read_sample
    from fusiontrain.data.index import member_reader

    number = args.sample
    indexed = _indexed(args)
    while indexed and number >= len(indexed[0][1]):
        number -= len(indexed.pop(0)[1])
    if not indexed:
        raise UserError(f"--sample {args.sample}: the shards hold fewer usable samples")
    shard, index, _ = indexed[0]
    descriptor = os.open(shard, os.O_RDONLY)
    try:
        members = index.members(number)
        sample = read_sample("auto", members, member_reader(members, descriptor), False)
    except BadSample as error:
        raise UserError(f"{shard}: sample {index.numbers[number]} ({index.key(number)}): {error}") from error
    finally:
        os.close(descriptor)
    first = int(index.piece_start[number])
    pieces = {}
    for place, piece in enumerate(sample.pieces):
        size = f"{index.widths[first + place]} x {index.heights[first + place]} pixels, .{piece.image}"
        pieces[f"{place}"] = piece.text if piece.text is not None else f"[image of {size}]"
    return {"shard": str(shard), "key": index.key(number), **pieces}


def _plan(args: argparse.Namespace) -> dict[str, Any]:
    from fusiontrain.config.load import load
    from fusiontrain.data.index_cache import index_sources
    from fusiontrain.data.plan import Plan
    from fusiontrain.data.tokenizer import load_tokenizer

    config = load(args.config, args.overrides)
    tokenizer = load_tokenizer(config)
    sources = index_sources(config.data.sources, config.data, tokenizer)
    plan = Plan(config, sources, tokenizer, training=True)
    note(f"planning {args.steps} steps")
    documents = [document for step in range(args.steps) for sequence in plan.step(step) for document in sequence.documents]
    tokens, image_tokens = sum(d.num_tokens for d in documents), sum(d.image_tokens for d in documents)
    room = args.steps * config.train.global_batch_sequences * config.data.sequence_length
    return {
        "samples": sum(len(source) for source in sources),
        "steps": args.steps,
        "documents": len(documents),
        "text tokens": tokens - image_tokens,
        "image tokens": image_tokens,
        "fill": f"{tokens / room:.4f}",
        "truncated documents": plan.truncated,
        "dropped documents": plan.dropped,
        "epochs of all steps": f"{config.train.steps * len(documents) / args.steps / sum(len(source) for source in sources):.2f}",
    }
