"""How full sequences of 8,192 tokens are, how evenly ranks share a step, and how many of them read a chunk of 32 neighbours: from the plan alone,
in the global order and in lanes.

    python tests/benchmarks/plan_quality.py [--documents 2000] [--steps 48] [--ranks 8 64] [--sequences-per-rank 1 4] [--lanes 64] [--windows 256 1024]
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from pathlib import Path

from corpus import make_corpus
from loader_speed import config_of

from fusiontrain.config.schema import Config
from fusiontrain.data.index.cache import index_sources
from fusiontrain.data.plan.plan import Plan
from fusiontrain.data.plan.report import report
from fusiontrain.data.tokenizer import load_tokenizer


def row(base: Config, io_mode: str, window: int, lanes: int, ranks: int, sequences_per_rank: int, steps: int) -> str:
    """One line of the table."""
    data = base.data.model_copy(update={"io_mode": io_mode, "lanes": lanes, "pack_window_documents": window})
    config = base.model_copy(update={"data": data, "train": base.train.model_copy(update={"global_batch_sequences": ranks * sequences_per_rank})})
    tokenizer = load_tokenizer(config)
    plan = Plan(config, index_sources(data.sources, data, tokenizer), tokenizer, training=True)
    began = time.process_time()
    found = report(plan, config, steps, ranks)
    seconds = (time.process_time() - began) / found["sequences"]
    balance = [found[f"balance of {kind} over {ranks} ranks"] for kind in ("image", "cost")]
    return (
        f"{io_mode:6} window {window:5} | {ranks:3} ranks of {sequences_per_rank:2} | fill {found['fill']} | image {balance[0]} | cost {balance[1]} | "
        f"{found[f'of {ranks} ranks read a chunk']:>5} ranks read a chunk | {found.get('bytes of chunks that a rank holds', 0) / 2**20:5.0f} MiB of chunks | "
        f"{1000 * seconds:.2f} CPU-ms per sequence"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--sequences-per-rank", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--lanes", type=int, default=64)
    parser.add_argument("--windows", type=int, nargs="+", default=[256, 1024])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        make_corpus(Path(name), args.documents)
        base = config_of(Path(name), 0)
        for ranks, sequences in itertools.product(args.ranks, args.sequences_per_rank):
            for io_mode, window in [("global", 1024), *(("lanes", window) for window in args.windows)]:
                print(row(base, io_mode, window, args.lanes, ranks, sequences, args.steps), flush=True)


if __name__ == "__main__":
    main()
