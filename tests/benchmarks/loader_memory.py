"""Memory of trainer and workers over many documents: it must not grow. `python tests/benchmarks/loader_memory.py --executor processes`.

Prints a line per tenth of the way: resident memory of its own (anonymous) and shared, in MiB, of the trainer and of the largest worker.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import tempfile
import time
from pathlib import Path

from fusiontrain.data.loader import Loader
from fusiontrain.data.tokenizer import load_tokenizer
from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.shards import write_photo_shards


def memory(pid: int | str) -> tuple[float, float]:
    """(anonymous, shared) resident MiB of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    anonymous, shared = (int(re.search(rf"{name}:\s+(\d+)", status)[1]) / 1024 for name in ("RssAnon", "RssShmem"))
    return anonymous, shared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--executor", choices=["threads", "processes"], default="processes")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--shards", help="folder of shards; default: 2,000 documents of a text and a 128-pixel JPEG, made in the temporary folder")
    args = parser.parse_args()
    folder = Path(tempfile.gettempdir()) / "fusiontrain-loader-memory"
    if not args.shards and not folder.is_dir():
        write_photo_shards(folder, shards=20, samples=100, side=128, images=1)
    config = tiny_config({
        "data.sources": [{"path": args.shards or str(folder)}], "data.executor": args.executor, "data.num_workers": args.workers,
        "data.sequence_length": 8192, "data.image": {"size": 64, "patch_size": 4}, "data.prefetch_bytes": 64 * 2**20,
        "train.global_batch_sequences": 4, "train.micro_batch_sequences": 1,
    })  # fmt: skip
    with contextlib.closing(Loader(config, load_tokenizer(config), "train", 0, 1)) as loader:
        done, printed, started = 0, -1, time.monotonic()
        print("documents  seconds  trainer own / shared  largest worker own / shared, MiB")
        for micro_batches, _ in loader.iterate(0):
            done += sum(len(batch.sources) for batch in micro_batches)
            if done * 10 // args.documents > printed:
                printed = done * 10 // args.documents
                worker = max((memory(pid) for pid in loader.workers.pids), default=(0.0, 0.0))
                print("{:9d}  {:7.0f}  {:11.1f} / {:6.1f}  {:18.1f} / {:6.1f}".format(done, time.monotonic() - started, *memory("self"), *worker), flush=True)
            if done >= args.documents:
                return


if __name__ == "__main__":
    main()
