"""A whole training on data in which an image has rotted since it was indexed: the same with every executor, to the last bit."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from fusiontrain.config.schema import Config
from fusiontrain.data.loader import Loader
from fusiontrain.data.shards import expand_shards
from fusiontrain.data.tokenizer import load_tokenizer
from fusiontrain.testing.runs import trainer_of
from fusiontrain.testing.shards import index_of
from fusiontrain.testing.training import world_config
from fusiontrain.train.metrics import read_metrics
from fusiontrain.utils.errors import UserError

EXECUTORS = {"loop": ("threads", 0), "threads": ("threads", 2), "processes": ("processes", 2)}
TIMES = {"tokens_per_second", "step_seconds", "data_seconds", "save_seconds", "memory_gib", "imbalance/compute_seconds"}
STEPS = 5


def train(config: Config) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The lines of metrics.jsonl, without times, and of bad_samples.jsonl."""
    with trainer_of(config) as trainer:
        assert trainer.run()
    folder = Path(config.run.dir)
    metrics = [{key: value for key, value in line.items() if key not in TIMES} for line in read_metrics(folder / "metrics.jsonl")]
    return metrics, read_metrics(folder / "bad_samples.jsonl")


def rot(shard: Path, row: int) -> dict[str, Any]:
    """Flip one bit in the image of a sample, unseen by whoever looks at size and time; returns what is to be said of it."""
    index, stat = index_of(shard), shard.stat()
    members = index.members(row)
    image = next(member for suffix, member in members.items() if suffix.endswith(("png", "jpg")))
    data = bytearray(shard.read_bytes())
    data[image.offset + image.size // 2] ^= 1
    shard.write_bytes(data)
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    first = min(member.offset for member in members.values())
    return {"shard": str(shard), "sample": int(index.numbers[row]), "key": index.key(row), "offset": first, "reason": "checksum"}


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("runs")
    config = world_config(folder)
    loader = Loader(config, load_tokenizer(config), "train", 0, 1)  # makes the index, of sound files
    shown = {(d.source, d.sample) for step in range(STEPS) for s in loader.plan.step(step) for d in s.documents if d.image_tokens}
    shard, row = loader.sources[0].locate(min(shown)[1])
    loader.close()
    return folder, rot(expand_shards(config.data.sources[0].path)[shard], row)


def config_of(folder: Path, name: str, **overrides: Any) -> Config:
    executor, workers = EXECUTORS[name]
    settings = {"train.steps": STEPS, "data.executor": executor, "data.num_workers": workers, "data.max_bad_fraction": 0.5, **overrides}
    return world_config(folder, {"run.dir": str(folder / f"{name}-{len(overrides)}"), **settings})


def test_a_rotten_image_is_passed_over_alike_by_all_executors(damaged):
    folder, told = damaged
    runs = {name: train(config_of(folder, name)) for name in EXECUTORS}
    metrics, bad = runs["loop"]
    assert [line["step"] for line in metrics] == list(range(1, STEPS + 1))
    assert bad and all(told.items() <= line.items() for line in bad)
    assert metrics[-1]["skipped/checksum"] == metrics[-1]["skipped"] == len(bad)
    assert "does not match the CRC32 of the index" in bad[0]["message"]
    for step, line in enumerate(metrics, 1):
        assert line["skipped/checksum"] == sum(finding["step"] <= step for finding in bad)
    for name in ("threads", "processes"):
        assert json.dumps(runs[name]) == json.dumps(runs["loop"]), name


def test_too_much_rot_ends_the_run_with_the_same_sentence(damaged):
    folder, told = damaged
    said = set()
    for name in EXECUTORS:
        with pytest.raises(UserError) as found:
            train(config_of(folder, name, **{"data.max_bad_fraction": 0.0}))
        said.add(str(found.value))
    (sentence,) = said
    assert re.match(rf"^1 of \d+ samples are unreadable \(1 checksum\), the last being {told['shard']}: sample {told['sample']} ", sentence)
