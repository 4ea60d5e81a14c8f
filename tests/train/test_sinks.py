"""TensorBoard, W&B and MLflow: what their own readers find is what metrics.jsonl says, and none of them can end or delay a run."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import re
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fusiontrain.config.schema import Config
from fusiontrain.testing.training import world_config
from fusiontrain.train.build import check_config
from fusiontrain.train.metrics import MetricsWriter, read_metrics
from fusiontrain.train.sinks import guard
from fusiontrain.train.sinks.guard import Guard
from fusiontrain.train.step_values import KEYS, shown, tag_of
from fusiontrain.utils.errors import UserError


def two_sources(folder: Path, steps: int) -> Config:
    config = world_config(folder, {"train.steps": steps, "train.log_every_steps": 1, "evaluate.every_steps": None, "checkpoint.every_steps": 2})
    world = folder / "world"
    sources = [{"path": str(world / "train"), "name": "scenes"}, {"path": str(world / "validation"), "weight": 0.5}]
    return Config.model_validate(config.model_dump() | {"data": config.data.model_dump() | {"sources": sources}})


def train(config: Config) -> None:
    from fusiontrain.cli.reporters import SilentReporter
    from fusiontrain.parallel.mesh import process_group, read_ranks
    from fusiontrain.train.build import build_trainer
    from fusiontrain.train.signals import stop_on_signals

    ranks = read_ranks({})
    with process_group(ranks, config.parallel), stop_on_signals() as stop:
        trainer = build_trainer(config, ranks, SilentReporter(), stop)
        try:
            trainer.run()
        finally:
            trainer.close()


def documented(key: str) -> bool:
    patterns = [re.sub(r"<\w+>", r"[\\w.-]+", known) for known in KEYS]
    return any(re.fullmatch(pattern, key) for pattern in patterns)


def test_tensorboard_says_what_metrics_jsonl_says_and_a_resumed_run_repeats_no_step(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(two_sources(tmp_path, 3))
    # as a kill would leave it: steps after the last checkpoint are in both files
    for folder in (tmp_path / "run" / "checkpoints").iterdir():
        if folder.name == "step-00000003":
            folder.rename(folder.with_name("gone"))
    train(two_sources(tmp_path, 4))
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(documented(key) for line in lines for key in line), [key for key in lines[0] if not documented(key)]
    assert {"loss/source/scenes/text", "loss/source/validation/image", "grad_norm/image", "imbalance/flops"} <= set(lines[0])

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"images": 0, "tensors": 0}).Reload()
    found = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    wanted: dict[str, list[tuple[int, float]]] = {}
    used = {"tokens": {"scenes": 0, "validation": 0}, "documents": {"scenes": 0, "validation": 0}}
    for line in lines:
        values = {tag_of(key): value for key, value in line.items() if tag_of(key) and isinstance(value, int | float) and math.isfinite(value)}
        for kind, totals in used.items():
            for name in totals:
                totals[name] += line[f"{kind}/source/{name}"]
            values |= {f"mixture_{kind}/{name}": total / sum(totals.values()) for name, total in totals.items()}
        for tag, value in values.items():
            wanted.setdefault(tag, []).append((line["step"], pytest.approx(value, rel=1e-6)))
    assert found == wanted

    (picture,) = [image for image in events.Images("samples/pictures") if image.step == 4]
    assert Image.open(io.BytesIO(picture.encoded_image_string)).size == Image.open(tmp_path / "run/samples/step-00000004/grid.png").size
    tags = ("run/config", "run/mixture", "samples/prompts")
    texts = {tag: [t.tensor_proto.string_val[0].decode() for t in events.Tensors(f"{tag}/text_summary")] for tag in tags}
    assert "global_batch_sequences: 4" in texts["run/config"][0] and "a red circle." in texts["samples/prompts"][-1]
    assert f"| scenes | 1 | {used['documents']['scenes']:,} |" in texts["run/mixture"][-1]


class Tracker:
    """A remote sink that keeps what it is told, fails at some steps and hangs at others."""

    name, remote = "tracker", True

    def __init__(self, fail_at: tuple[int, ...] = (), hang_at: int = 0, opens: int = 1) -> None:
        self.fail_at, self.hang_at, self.failures_to_open = fail_at, hang_at, opens - 1
        self.told: list = []
        self.go_on = threading.Event()

    def open(self, run_id, config):
        if self.failures_to_open:
            self.failures_to_open -= 1
            raise ConnectionError("no route to host")
        self.told.append(("open", run_id))
        return run_id or "new"

    def scalars(self, step, values):
        if step == self.hang_at:
            self.go_on.wait(60)
        if step in self.fail_at:
            raise TimeoutError("the server\nis away")
        self.told.append((step, dict(values)))

    def pictures(self, step, prompts, pictures, sheet):
        self.told.append((step, list(prompts)))

    def text(self, step, tag, markdown):
        self.told.append((tag, markdown))

    def close(self):
        self.told.append("close")


def send(tracker: Tracker, folder: Path, start: int, stop: int) -> Guard:
    guarded = Guard(tracker, folder, start, {})
    for step in range(start + 1, stop + 1):
        guarded.scalars(step, {"loss/total": 1.0 * step})
    return guarded


def test_a_tracker_that_fails_is_reported_once_and_counted(tmp_path: Path) -> None:
    tracker = Tracker(fail_at=(2, 4, 5))
    guarded = send(tracker, tmp_path, 0, 6)
    guarded.close()
    assert [step for step, _ in tracker.told[1:-1]] == [1, 3, 6] and tracker.told[-1] == "close"
    assert guarded.failures == 3
    first, last = guarded.news()
    assert first == "metrics.sinks: tracker: TimeoutError: the server; the run goes on, further failures are counted in sink_failures"
    assert "tracker lost 3 calls" in last and guarded.news() == []


def test_a_tracker_that_cannot_be_reached_at_first_is_tried_again(tmp_path: Path) -> None:
    tracker = Tracker(opens=3)
    guarded = send(tracker, tmp_path, 0, 4)
    guarded.close()
    assert tracker.told == [("open", None), (3, {"loss/total": 3.0}), (4, {"loss/total": 4.0}), "close"] and guarded.failures == 2


def test_a_tracker_that_hangs_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MOST_WAITING", 3)
    monkeypatch.setattr(guard, "CLOSE_SECONDS", 0.2)
    tracker = Tracker(hang_at=1)
    guarded = send(tracker, tmp_path, 0, 10)  # the call that hangs, three that wait, and the rest is lost
    guarded.close()
    assert guarded.failures >= 6 and "does not answer" in guarded.news()[0]
    tracker.go_on.set()
    guarded._thread.join(30)
    assert not guarded._thread.is_alive() or tracker.told


def test_a_resumed_run_goes_on_with_its_tracker_and_repeats_no_step(tmp_path: Path) -> None:
    first, second, third = Tracker(), Tracker(), Tracker()
    send(first, tmp_path, 0, 5).close()
    send(second, tmp_path, 3, 7).close()
    assert second.told[0] == ("open", "new") and [step for step, _ in second.told[1:-1]] == [6, 7]
    send(third, tmp_path, 0, 1).close()  # a new start is a new run
    assert third.told[0] == ("open", None) and third.told[1][0] == 1


def write_some(folder: Path, start: int, stop: int, sinks: list[str]) -> list[str]:
    config = Config.model_validate(world_config(folder).model_dump() | {"metrics": {"sinks": sinks}})
    run = Path(config.run.dir)
    run.mkdir(exist_ok=True)
    writer = MetricsWriter(run, start, config)
    for step in range(start + 1, stop + 1):
        values = {"step": step, "loss": 1 / step, "loss/image": math.nan, "mfu": None, "loss/source/train/text": 2.0 * step}
        writer.write(values)
        writer.board(values)
    writer.pictures(stop, ["a circle"], [np.zeros((4, 4, 3), np.uint8)])
    writer.close()
    return writer.sinks.news()


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="needs mlflow-skinny")
def test_mlflow_has_every_step_once_in_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert write_some(tmp_path, 0, 3, ["mlflow"]) == [] and write_some(tmp_path, 2, 4, ["mlflow"]) == []
    from mlflow import MlflowClient

    client = MlflowClient((tmp_path / "run" / "mlruns").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("fusiontrain").experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["train.steps"] == "4" and run.info.run_name == "run"
    for tag, scale in (("loss/total", None), ("loss_by_source_text/train", 2.0)):
        history = sorted((metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, tag))
        assert history == [(step, pytest.approx(1 / step if scale is None else scale * step)) for step in (1, 2, 3, 4)]
    assert {file.path for file in client.list_artifacts(run.info.run_id, "run")} == {"run/config.md", "run/mixture.md"}


def wandb_records(path: Path) -> list:
    """What a .wandb file holds. After a header of 7 bytes it is LevelDB's log: blocks of 32 KiB of pieces, each with a checksum, a length and a kind."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, records, pieces = path.read_bytes(), 7, [], b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:  # too little for a piece: the rest of a block is empty
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        pieces += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            records.append(Record.FromString(pieces))
            pieces = b""
    return records


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs wandb")
def test_wandb_offline_has_every_step_once_under_one_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert write_some(tmp_path, 0, 3, ["wandb"]) == []
    time.sleep(1)  # its folders are named by the second
    assert write_some(tmp_path, 2, 4, ["wandb"]) == []
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2 and len({file.name for file in files}) == 1, "what a resumed run adds goes to the same run"
    found: dict[str, list[tuple[int, float]]] = {}
    config, summary = {}, {}
    for record in (record for file in files for record in wandb_records(file)):
        config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        summary |= {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.summary.update}
        for item in record.history.item:
            key, value = "/".join(item.nested_key) or item.key, json.loads(item.value_json)
            found.setdefault(key, []).append((record.history.step.num, value))
    assert found["loss/total"] == [(step, pytest.approx(1 / step)) for step in (1, 2, 3, 4)]
    assert found["loss_by_source_text/train"] == [(step, 2.0 * step) for step in (1, 2, 3, 4)]
    assert not any("mfu" in key or "loss/image" in key for key in found), "what is not finite is not sent"
    assert found["samples/pictures/captions"] == [(3, ["a circle"]), (4, ["a circle"])]
    (name,) = found["samples/pictures/filenames"][0][1]
    assert Image.open(files[0].parent / "files" / name).size == (4, 4)
    assert config["train"]["steps"] == 4 and "global_batch_sequences" in summary["run/config"]


def test_a_tracker_that_is_not_installed_is_named_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config.model_validate(world_config(tmp_path).model_dump() | {"metrics": {"sinks": ["tensorboard", "wandb"]}})
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(UserError) as error:
        check_config(config, 1)
    assert str(error.value) == "metrics.sinks: wandb: is not installed: pip install 'fusiontrain[wandb]', or leave it out"


def test_tags_have_a_group_and_values_are_finite() -> None:
    values = {"step": 3, "loss": 1.0, "loss/source/a/text": 2.0, "tokens/source/a": 5, "mfu": None, "loss/image": math.nan, "skipped/decode": 0}
    assert shown(values) == {"loss/total": 1.0, "loss_by_source_text/a": 2.0, "skipped/decode": 0.0}
    assert all(tag is None or tag.count("/") == 1 for tag, _ in KEYS.values())
