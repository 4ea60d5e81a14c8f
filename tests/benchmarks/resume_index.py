"""What a resume costs at any position of an index of 50 million documents: opening the sources, then planning one step.

    python tests/benchmarks/resume_index.py [--documents 50000000] [--documents-per-shard 5000] [--positions 5]

It writes such an index into a temporary folder. Its 10,000 index files are links to one file, which saves the disk; every one is opened, mapped
and faulted in as a file of its own, so neither CPU time nor RSS gets better by it. The page cache is warm. One process per position; the CPU time
is that of the process from before its first look at the disk until the step is planned, less imports.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from fusiontrain.data.index.array_file import write_arrays
from fusiontrain.data.index.cache import Reading, index_sources, stat_of
from fusiontrain.data.index.manifest import IndexRow, TokensRow, add_to_manifest
from fusiontrain.data.index.shard_index import IMAGE_PIECE, NO_MEMBER, TEXT_PIECE, ShardIndex
from fusiontrain.data.index.tokens import counts_digest
from fusiontrain.data.plan.plan import Plan
from fusiontrain.data.plan.windows import Anchor
from fusiontrain.data.tokenizer import load_tokenizer
from fusiontrain.testing.configs import tiny_config

GLOBAL_BATCH_SEQUENCES = 256


def config_of(folder: Path):
    """A training of 256 sequences of 8,192 tokens a step, 256 tokens per image."""
    return tiny_config({
        "data.sources": [{"path": str(folder)}], "data.sequence_length": 8192, "data.image": {"size": 256, "patch_size": 16},
        "train.global_batch_sequences": GLOBAL_BATCH_SEQUENCES,
    })  # fmt: skip


def make_shard_index(documents: int) -> tuple[ShardIndex, np.ndarray]:
    """An index of documents of 1 to 6 images between texts of about 210 tokens, and the tokens of its pieces."""
    draw = np.random.default_rng(0)
    images = draw.integers(1, 7, documents)
    pieces = 2 * images + 1  # text, image, text, ..., text
    piece_start = np.concatenate([[0], np.cumsum(pieces)]).astype(np.int64)
    place = np.arange(piece_start[-1]) - np.repeat(piece_start[:-1], pieces)
    kinds = np.where(place % 2 == 1, IMAGE_PIECE, TEXT_PIECE).astype(np.uint8)
    is_image = kinds == IMAGE_PIECE
    text_tokens = np.where(is_image, 0, draw.integers(20, 400, len(kinds))).astype(np.int32)
    keys = [f"{number:09d}".encode() for number in range(documents)]
    members = images + 1
    member_start = np.concatenate([[0], np.cumsum(members)]).astype(np.int64)
    sizes = draw.integers(5_000, 25_000, member_start[-1]).astype(np.int64)
    side = np.where(is_image, 256, 0).astype(np.int32)
    index = ShardIndex(
        numbers=np.arange(documents, dtype=np.int32),
        key_start=np.arange(documents + 1, dtype=np.int64) * 9,
        key_bytes=np.frombuffer(b"".join(keys), np.uint8),
        is_pair=np.zeros(documents, bool),
        piece_start=piece_start,
        kinds=kinds,
        text_bytes=4 * text_tokens,
        heights=side,
        widths=side,
        image_members=np.where(is_image, place // 2 + 1, NO_MEMBER).astype(np.int32),
        member_start=member_start,
        suffix_ids=(np.arange(member_start[-1]) - np.repeat(member_start[:-1], members)).astype(np.uint16),
        offsets=np.cumsum(sizes + 1024),
        sizes=sizes,
        crcs=draw.integers(0, 1 << 32, len(sizes), dtype=np.uint32),
        suffixes=("json", *(f"{number}.jpg" for number in range(6))),
        bad=(),
    )
    return index, text_tokens


def write_index(folder: Path, num_shards: int, documents: int) -> None:
    """Shards that are holes, their index files, which are links, and their manifests."""
    config = config_of(folder)
    how, tokenizer = Reading("auto", "pixels"), load_tokenizer(config)
    index, counts = make_shard_index(documents)
    start = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])[index.piece_start]
    digests = index.digest(), counts_digest(counts)
    arrays = {name: array for name, array in vars(index).items() if isinstance(array, np.ndarray)}
    kept = folder / ".fusiontrain-index"
    about = {"row": {"digest": digests[0]}, "suffixes": index.suffixes, "bad": []}
    write_arrays(kept / "one.index", arrays, about)
    write_arrays(kept / "one.tokens", {"counts": counts, "start": start, "ids": np.zeros(0, np.uint16)}, {"row": {"digest": digests[1]}})
    indexes, tokens = [], []
    for number in range(num_shards):
        shard = folder / f"shard-{number:06d}.tar"
        shard.touch()
        stat, files = stat_of(shard), (how.index.file(shard, stat_of(shard)), how.tokens(tokenizer).file(shard, stat_of(shard)))
        os.link(kept / "one.index", kept / files[0])
        os.link(kept / "one.tokens", kept / files[1])
        images = int((index.kinds == IMAGE_PIECE).sum())
        indexes.append(IndexRow(shard.name, *stat, files[0], digests[0], documents, 0, images, int(index.text_bytes.sum())))
        tokens.append(TokensRow(shard.name, *stat, files[1], digests[1], int(start[-1])))
    add_to_manifest(kept / how.index.manifest, how.index, indexes)
    add_to_manifest(kept / how.tokens(tokenizer).manifest, how.tokens(tokenizer), tokens)


def resume(folder: Path, window: int) -> dict[str, float]:
    """Open the sources and plan the first step behind the beginning of a window, as a resumed rank does."""
    config = config_of(folder)
    tokenizer = load_tokenizer(config)
    begin, wall = time.process_time(), time.monotonic()
    sources = index_sources(config.data.sources, config.data, tokenizer)
    opened = time.process_time()
    plan = Plan(config, sources, tokenizer, training=True)
    step = -(-window * 230 // GLOBAL_BATCH_SEQUENCES)
    plan.begin_at([Anchor(window, step * GLOBAL_BATCH_SEQUENCES)])
    counts = plan.counts(step, 64)
    end = time.process_time()
    assert len(counts) == 64
    memory = next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return {"documents": len(sources[0]), "open_cpu_s": opened - begin, "plan_cpu_s": end - opened, "wall_s": time.monotonic() - wall, "rss_mib": memory / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=50_000_000)
    parser.add_argument("--documents-per-shard", type=int, default=5000)
    parser.add_argument("--positions", type=int, default=5)
    parser.add_argument("--resume", nargs=2, metavar=("DIR", "WINDOW"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.resume:
        print(json.dumps(resume(Path(args.resume[0]), int(args.resume[1]))))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_index(Path(folder), args.documents // args.documents_per_shard, args.documents_per_shard)
        for position in range(args.positions):
            window = args.documents // 1024 * position // max(1, args.positions - 1)
            command = [sys.executable, __file__, "--resume", folder, str(window)]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            cpu = found["open_cpu_s"] + found["plan_cpu_s"]
            print(
                f"document {window * 1024:>11,} of {found['documents']:,}: {cpu:.3f} CPU-s (sources {found['open_cpu_s']:.3f}, "
                f"plan {found['plan_cpu_s']:.3f}), {found['wall_s']:.2f} s, RSS {found['rss_mib']:.0f} MiB"
            )


if __name__ == "__main__":
    main()
