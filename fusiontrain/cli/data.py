"""`fusiontrain data`: the demo world, the index of shards, and what a plan will show a model."""

from __future__ import annotations

import argparse
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
        parser.add_argument("shards", metavar="SHARDS", nargs="+", help="a tar or .jsonl, a folder of them, a glob, a brace range, a URL, or pipe:COMMAND")
        parser.add_argument("--index-dir", help="as data.storage.index_dir, for shards that are not local files")
        parser.add_argument("--format", choices=["auto", "interleaved", "captions"], default="auto", help="as data.sources.N.format (default: auto)")
        parser.add_argument("--text-key", metavar="FIELD", help="field of the json that holds the text, as data.sources.N.text_key")
        parser.add_argument("--tokenizer", help="folder or tokenizer.json, or 'bytes': tokenise the texts too, as a training with it would")
        parser.add_argument("--workers", type=int, default=1, help="processes that index, a shard at a time (default: 1)")
    index.add_argument("--exclude", metavar="FILE", help="leave the samples of this file of JSON lines (shard, key) out of every plan from now on")
    inspect.add_argument("--sample", type=int, default=0, help="number of the sample (default: 0)")
    plan = actions.add_parser("plan", help="what the first steps of a training will hold: no sample is read")
    add_config_arguments(plan)
    plan.add_argument("--steps", type=int, default=20)
    plan.add_argument("--world-size", type=int, default=1, help="ranks to balance for (default: 1)")
    peek = actions.add_parser("peek", help="write what a training step saw as text files and pictures")
    add_config_arguments(peek)
    peek.add_argument("--step", type=int, required=True, help="as in metrics.jsonl, from 1")
    peek.add_argument("--rank", type=int, default=0, help="only the share of this rank out of --world-size")
    peek.add_argument("--world-size", type=int, default=1)
    peek.add_argument("--out", metavar="DIR", help="default: peek-step-N")
    for parser in (world, index, verify, inspect, plan, peek):
        add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Exit code 0, or UserError with one sentence."""
    actions = {"make-world": _make_world, "index": _index, "verify": _verify, "inspect": _inspect, "plan": _plan, "peek": _peek}
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


def _kind(args: argparse.Namespace) -> str:
    from fusiontrain.config.schema import SourceConfig
    from fusiontrain.data.formats.read import source_kind

    return source_kind(SourceConfig(path=args.shards[0], format=args.format, text_key=args.text_key))


def _indexed(args: argparse.Namespace) -> list[tuple[Any, Any, int | None]]:
    """(shard, index, text tokens or None) of every shard, with a bar on a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    from fusiontrain.config.schema import StorageConfig, TokenizerConfig
    from fusiontrain.data.index_cache import build_all
    from fusiontrain.data.shards import expand_shards

    shards = [shard for path in args.shards for shard in expand_shards(path, StorageConfig(index_dir=args.index_dir))]
    tokenizer = None if args.tokenizer is None else (args.tokenizer, TokenizerConfig())
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        return list(progress.track(build_all(shards, _kind(args), False, tokenizer, args.workers), len(shards), description="shards"))


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
    from fusiontrain.data.storage.open import open_shard

    number = args.sample
    indexed = _indexed(args)
    while indexed and number >= len(indexed[0][1]):
        number -= len(indexed.pop(0)[1])
    if not indexed:
        raise UserError(f"--sample {args.sample}: the shards hold fewer usable samples")
    shard, index, _ = indexed[0]
    file = open_shard(shard)
    try:
        members = index.members(number)
        sample = read_sample(_kind(args), members, member_reader(members, file), False)
    except BadSample as error:
        raise UserError(f"{shard}: sample {index.numbers[number]} ({index.key(number)}): {error}") from error
    finally:
        file.close()
    first = int(index.piece_start[number])
    pieces = {}
    for place, piece in enumerate(sample.pieces):
        size = f"{index.widths[first + place]} x {index.heights[first + place]} pixels, .{piece.image}"
        pieces[f"{place}"] = piece.text if piece.text is not None else f"[image of {size}]"
    return {"shard": str(shard), "key": index.key(number), **pieces}


def _planned(args: argparse.Namespace) -> tuple[Any, Any, Any]:
    """(config, tokenizer, plan) of the training that the arguments name."""
    from fusiontrain.config.load import load
    from fusiontrain.data.index_cache import index_sources
    from fusiontrain.data.plan import Plan
    from fusiontrain.data.tokenizer import load_tokenizer

    config = load(args.config, args.overrides)
    tokenizer = load_tokenizer(config)
    return config, tokenizer, Plan(config, index_sources(config.data.sources, config.data, tokenizer), tokenizer, training=True)


def _plan(args: argparse.Namespace) -> dict[str, Any]:
    from fusiontrain.data.plan_report import report

    if args.steps < 1 or args.world_size < 1:
        raise UserError(f"--steps {args.steps} --world-size {args.world_size}: both must be at least 1")
    config, _, plan = _planned(args)
    note(f"planning {args.steps} steps")
    return report(plan, config, args.steps, args.world_size)


def _peek(args: argparse.Namespace) -> dict[str, Any]:
    """Steps count from 1, as in metrics.jsonl: step N is what the N-th update was computed from."""
    from fusiontrain.data.peek import peek
    from fusiontrain.data.plan import check_world_size

    config, tokenizer, plan = _planned(args)
    if args.step < 1 or not 0 <= args.rank < args.world_size:
        raise UserError(f"--step {args.step} --rank {args.rank}: steps count from 1, ranks from 0 to --world-size {args.world_size} minus 1")
    check_world_size(config.train.global_batch_sequences, args.world_size)
    sequences = plan.share(plan.data_step(args.step - 1), args.rank, args.world_size)
    return {"step": args.step, **peek(sequences, plan, config, tokenizer, Path(args.out or f"peek-step-{args.step}"))}
