"""The run folder's files and the polite stop."""

from __future__ import annotations

import json
import logging
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fusiontrain.train import signals
from fusiontrain.train.metrics import MetricsWriter, close_log, memory_gib, open_log, read_metrics, truncate_metrics
from fusiontrain.train.signals import stop_on_signals


def test_metrics_go_on_after_the_resumed_step_without_repeats(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 6)) + '{"step": 6, "lo')
    writer = MetricsWriter(tmp_path, 3)
    writer.write({"step": 4, "loss": float("nan"), "mfu": None, "lr": 0.5})
    writer.close()
    assert read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 3}, {"step": 4, "loss": None, "mfu": None, "lr": 0.5}]
    truncate_metrics(path, 0)
    assert path.read_text() == ""


def test_bad_samples_go_on_after_the_resumed_step_and_are_counted_over_the_whole_run(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, 0)
    writer.bad_samples([{"step": 1, "reason": "decode", "key": "a"}, {"step": 1, "reason": "read", "key": "b"}])
    writer.bad_samples([{"step": 3, "reason": "decode", "key": "c"}])
    writer.close()
    writer = MetricsWriter(tmp_path, 2)
    counts = writer.bad_samples([{"step": 3, "reason": "decode", "key": "d"}])
    writer.close()
    assert counts == {"skipped/format": 0, "skipped/decode": 2, "skipped/checksum": 0, "skipped/read": 1, "skipped/changed": 0}
    assert [line["key"] for line in read_metrics(tmp_path / "bad_samples.jsonl")] == ["a", "b", "d"]


def test_tensorboard_groups_scalars_and_shows_pictures_with_prompts(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = MetricsWriter(tmp_path, 0)
    writer.board({"step": 2, "loss": 1.5, "loss/image": float("nan"), "tokens_per_second": 3.0, "validation/text": 2.5, "mfu": None})
    path = writer.pictures(2, ["a *red* circle"], [np.zeros((4, 6, 3), np.uint8)])
    writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"loss/total", "throughput/tokens_per_second", "validation/text"}
    assert [(event.step, event.value) for event in events.Scalars("loss/total")] == [(2, 1.5)]
    assert events.Tags()["images"] == ["samples/pictures"]
    text = events.Tensors("samples/prompts/text_summary")[0].tensor_proto.string_val[0]
    assert b"a *red* circle" in text
    assert path == tmp_path / "samples/step-00000002/grid.png" and Image.open(path).size[0] > 100


def test_every_rank_has_a_log_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    handler = open_log(tmp_path, 3)
    logging.getLogger("fusiontrain.some.module").warning("seen")
    close_log(handler)
    logging.getLogger("fusiontrain.some.module").warning("not seen")
    text = (tmp_path / "logs" / "rank-3.log").read_text()
    assert "rank 3" in text and "WARNING fusiontrain.some.module: seen" in text and "not seen" not in text


def test_memory() -> None:
    assert 0.05 < memory_gib(torch.device("cpu")) < 64


@pytest.mark.parametrize("number", signals.STOP_SIGNALS)
def test_a_signal_sets_a_flag_and_handlers_are_put_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_on_signals() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop and stop.reason == number.name
        os.kill(os.getpid(), number)  # torchrun passes on what the terminal has sent already
    assert signal.getsignal(number) is before


def test_an_impatient_person_gets_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "PATIENCE_SECONDS", -1.0)
    with pytest.raises(KeyboardInterrupt), stop_on_signals():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
