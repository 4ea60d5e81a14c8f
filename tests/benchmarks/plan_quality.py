"""How full sequences of 8,192 tokens are and how evenly 64 ranks of 4 sequences share a step: both from the plan alone.

    python tests/benchmarks/plan_quality.py [--documents 2000] [--steps 12] [--ranks 64] [--sequences-per-rank 4]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from corpus import make_corpus
from loader_speed import config_of

from fusiontrain.data.index.cache import index_sources
from fusiontrain.data.plan.plan import Plan
from fusiontrain.data.plan.report import report
from fusiontrain.data.tokenizer import load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--sequences-per-rank", type=int, default=4)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        make_corpus(Path(name), args.documents)
        sequences = args.ranks * args.sequences_per_rank
        base = config_of(Path(name), 0)
        config = base.model_copy(update={"train": base.train.model_copy(update={"global_batch_sequences": sequences})})
        tokenizer = load_tokenizer(config)
        plan = Plan(config, index_sources(config.data.sources, config.data, tokenizer), tokenizer, training=True)
        began = time.process_time()
        for key, value in report(plan, config, args.steps, args.ranks).items():
            print(f"{key}: {value}")
        print(f"CPU-seconds per step: {(time.process_time() - began) / args.steps:.3f}")


if __name__ == "__main__":
    main()
