"""Documents per CPU-second from tar to packed sequences of 8,192 tokens, side by side with webdataset and Megatron-Energon (pip install .[bench]).

    python tests/benchmarks/loader_speed.py [--documents 2000] [--workers 2] [--rounds 3] [--only decoded]

Every contender runs in a process of its own, once over one epoch and once over three; CPU time is that of the process and its children, and the
difference of the two runs is what counts, so that starting costs nothing. Rounds alternate between the contenders. The page cache is warm.
`decoded`: float32 patches of pixels; `bytes`: images stay as they lie in the tar. FusionTrain reads token ids from its cache; the others tokenise,
for they have none. `rivals.py` says what each does. `jpegs`: what decoding the JPEGs alone costs, by simplejpeg, which no loader can go below.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import simplejpeg
from corpus import MARKERS, make_corpus
from PIL import Image

from fusiontrain.config.schema import Config
from fusiontrain.data.index.build import build_index
from fusiontrain.data.index.cache import index_sources
from fusiontrain.data.index.shard_index import member_reader
from fusiontrain.data.jsonl import shard_samples
from fusiontrain.data.plan.plan import Plan
from fusiontrain.data.shards import OpenShards
from fusiontrain.data.tokenizer import load_tokenizer
from fusiontrain.testing.configs import tiny_config

SHORT, LONG = 1, 3


def config_of(folder: Path, workers: int) -> Config:
    """One epoch is an epoch, sequences of 8,192 tokens, images of 256 patches."""
    names = dict(zip(("begin_text_token", "end_text_token", "begin_image_token", "end_image_token"), MARKERS, strict=True))
    return tiny_config({
        "model.vocab_size": 2000, "data.sources": [{"path": str(folder)}], "data.tokenizer": {"path": str(folder / "tokenizer.json"), **names},
        "data.sequence_length": 8192, "data.image": {"size": 256, "patch_size": 16}, "data.condition_dropout": 0.0, "data.num_workers": workers,
        "data.executor": "processes",  # as the workers of the others are
        "train.global_batch_sequences": 1,
    })  # fmt: skip


def ours(folder: Path, workers: int, epochs: int, decode: bool) -> Iterator[int]:
    """Documents of each packed sequence, over that many epochs."""
    config = config_of(folder, workers)
    tokenizer = load_tokenizer(config)
    if decode:
        from fusiontrain.data.loader import Loader

        loader = Loader(config, tokenizer, "train", 0, 1)
        left = epochs * len(loader.sources[0])
        for batches, _ in loader.iterate(0):
            yield sum(len(batch.sources) for batch in batches)
            left -= sum(len(batch.sources) for batch in batches)
            if left <= 0:
                break
        loader.close()
        return
    sources = index_sources(config.data.sources, config.data, tokenizer)
    plan, shards = Plan(config, sources, tokenizer, training=True), OpenShards()
    left, step = epochs * len(sources[0]), 0
    with ThreadPoolExecutor(workers) as pool:
        while left > 0:
            planned = [plan.step(number)[0] for number in range(step, step + 2 * workers)]
            step += len(planned)
            for sequence in pool.map(lambda one: [_bytes_of(sources[0], document.sample, shards) for document in one.documents], planned):
                yield len(sequence)
                left -= len(sequence)
    shards.close()


def _bytes_of(source: Any, sample: int, shards: OpenShards) -> tuple[Any, list[bytes]]:
    """The token ids and the images of a sample as they lie in the tar, checked against their CRC32."""
    shard, row = source.locate(sample)
    members = source.indexes[shard].members(row)
    ids = source.tokens[shard].read(shards.file(source.tokens[shard].path), row)
    read = member_reader(members, shards.file(source.shards[shard]))
    return ids, [read(suffix) for suffix in members if suffix != "json"]


def run_one(contender: str, folder: Path, workers: int, epochs: int, decode: bool) -> dict[str, float]:
    """Documents, CPU-seconds and seconds of one run in this process."""
    if contender == "fusiontrain":
        counts = ours(folder, workers, epochs, decode)
    else:
        if contender == "webdataset":
            from rivals import webdataset_sequences as sequences
        else:
            from rivals_energon import energon_sequences as sequences
        counts = (sequence["documents"] for sequence in sequences(folder, folder / "tokenizer.json", workers, epochs, decode))
    began = time.monotonic()
    found = list(counts)
    return {"documents": sum(found), "sequences": len(found), "seconds": time.monotonic() - began}


def measure(contender: str, folder: Path, workers: int, decode: bool) -> dict[str, float]:
    """Documents per CPU-second between a short and a long run, and per second of the long one, with its start."""
    runs = []
    for epochs in (SHORT, LONG):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, __file__, "--run", contender, str(folder), str(workers), str(epochs), str(int(decode))]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise SystemExit(f"{contender}: {result.stderr[-3000:]}")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found = json.loads(result.stdout.splitlines()[-1])
        runs.append({**found, "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime})
    short, long = runs
    documents = long["documents"] - short["documents"]
    return {
        "per_cpu": documents / (long["cpu"] - short["cpu"]),
        "per_second": long["documents"] / long["seconds"],
        "per_sequence": long["documents"] / long["sequences"],
    }


def index_speed(folder: Path, documents: int) -> str:
    """Documents indexed per CPU-second, with image sizes and CRC32, by one process: the median of five passes, and the same in one large shard."""
    shards = sorted(folder.glob("*.tar"))
    large = folder / "large"
    with tarfile.open(large, "w") as joined:
        for shard in shards:
            with tarfile.open(shard) as tar:
                for member in tar:
                    joined.addfile(member, tar.extractfile(member))

    def speed(paths: list[Path]) -> float:
        seconds = []
        for _ in range(5):
            began = time.process_time()
            assert sum(len(build_index(path, "auto", "pixels")) for path in paths) == documents
            seconds.append(time.process_time() - began)
        return documents / statistics.median(seconds)

    found = f"index: {speed(shards):,.0f} documents per CPU-second in {len(shards)} shards, {speed([large]):,.0f} in one"
    large.unlink()
    return found


def decode_speed(folder: Path) -> str:
    """Documents per CPU-second if decoding the JPEGs were all there is to do, by one process."""
    documents = []
    for shard in sorted(folder.glob("*.tar")):
        with shard.open("rb") as file:
            for sample in shard_samples(shard):
                members = [member for suffix, member in sample.members.items() if suffix != "json"]
                documents.append([os.pread(file.fileno(), member.size, member.offset) for member in members])

    def speed(decode: Callable[[bytes], Any]) -> float:
        began = time.process_time()
        for jpegs in documents:
            for jpeg in jpegs:
                decode(jpeg)
        return len(documents) / (time.process_time() - began)

    ours, theirs = speed(simplejpeg.decode_jpeg), speed(lambda jpeg: Image.open(io.BytesIO(jpeg)).convert("RGB"))
    return f"jpegs: {ours:,.0f} documents per CPU-second by simplejpeg, {theirs:,.0f} by Pillow"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=["decoded", "bytes"])
    parser.add_argument("--run", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        contender, folder, workers, epochs, decode = args.run
        print(json.dumps(run_one(contender, Path(folder), int(workers), int(epochs), bool(int(decode)))))
        return
    contenders = ["fusiontrain", "webdataset"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_corpus(folder, args.documents)
        print(index_speed(folder, args.documents))
        print(decode_speed(folder))
        config = config_of(folder, 0)
        index_sources(config.data.sources, config.data, load_tokenizer(config))
        if importlib.util.find_spec("megatron") is not None:
            from rivals_energon import prepare_energon

            prepare_energon(folder)
            contenders.append("energon")
        for decode in [kind == "decoded" for kind in ("decoded", "bytes") if args.only in (None, kind)]:
            found: dict[str, list[dict[str, float]]] = {contender: [] for contender in contenders}
            for _ in range(args.rounds):
                for contender in contenders:
                    found[contender].append(measure(contender, folder, args.workers, decode))
            median = {name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in found.items()}
            for contender, row in median.items():
                ratio = median["fusiontrain"]["per_cpu"] / row["per_cpu"]
                print(
                    f"{'decoded' if decode else 'bytes':8} {contender:12} {row['per_cpu']:8.0f} documents per CPU-s, {row['per_second']:7.0f} per s, "
                    f"{row['per_sequence']:.2f} per sequence; fusiontrain is {ratio:.2f} times as fast per CPU-s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
