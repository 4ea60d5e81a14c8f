"""`fusiontrain train` and `fusiontrain checkpoint`, as a person calls them."""

from __future__ import annotations

import ctypes
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from rich.console import Console

from fusiontrain.cli import reporters as command
from fusiontrain.cli.main import main
from fusiontrain.config.load import to_yaml
from fusiontrain.testing.training import world_config
from fusiontrain.train.metrics import read_metrics

ROOT = Path(__file__).parents[2]
VALUES = {
    "step": 2, "loss": 1.5, "loss/text": 0.5, "loss/image": None, "targets/text": 3, "targets/image": 0, "grad_norm": 1.0, "lr": 1e-3,
    "tokens_per_second": 1234.5, "mfu": 0.4, "data_seconds": 0.02, "step_seconds": 0.5, "memory_gib": 1.25, "skipped": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def config_file(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("command")
    config = world_config(folder, {"train.steps": 2, "optimizer.warmup_steps": 0, "sample.prompts": (), "train.log_every_steps": 2})
    (folder / "config.yaml").write_text(to_yaml(config))
    return folder / "config.yaml"


def test_train_then_list_and_verify(config_file: Path, capsys: pytest.CaptureFixture) -> None:
    run_dir = config_file.parent / "run"
    assert main(["train", str(config_file), "train.steps=1", "--json"]) == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert document == {"run": str(run_dir), "step": 1, "finished": True, "checkpoint": str(run_dir / "checkpoints/step-00000001")}
    assert re.search(r"^step 1/1 loss \d+\.\d+ text \d", err, re.MULTILINE) and "saved" in err
    log = (run_dir / "logs/rank-0.log").read_text()
    assert "rank 0" in log and log.count("kernels on cpu: attention chunked") == 1
    (begun,) = [line for line in err.splitlines() if line.startswith("training ")]
    (saved,) = [line for line in err.splitlines() if line.startswith("step 1: saved ")]
    assert [line.partition("fusiontrain.cli.reporters: ")[2] for line in log.splitlines() if "cli.reporters" in line][::2] == [begun, saved]

    assert main(["train", str(config_file)]) == 0  # resumes by itself
    assert "from step 1 to 2" in capsys.readouterr().err
    assert [line["step"] for line in read_metrics(run_dir / "metrics.jsonl")] == [1, 2]

    assert main(["train", str(config_file)]) == 0
    last = run_dir / "checkpoints/step-00000002"
    assert f"step 2 of train.steps=2 is done already, in {last}: raise train.steps" in capsys.readouterr().err
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file() and "logs" not in path.parts}
    assert main(["train", str(config_file), "train.steps=1"]) == 2
    assert f"{last}: is at step 2, beyond train.steps=1: raise train.steps, or give an earlier checkpoint" in capsys.readouterr().err
    assert all(path.read_bytes() == content for path, content in before.items()), "nothing was begun"
    assert main(["train", str(config_file), f"run.dir={run_dir}-2", "train.steps=1"]) == 0
    assert main(["train", str(config_file), f"run.dir={run_dir}-2", "--resume", str(run_dir)]) == 0
    err = capsys.readouterr().err
    assert "is done already" in err and "set aside" not in err
    assert (Path(f"{run_dir}-2") / "checkpoints/step-00000001").is_dir(), "where nothing is trained nothing is set aside"

    assert main(["train", str(config_file), "--resume", "none"]) == 0
    err = capsys.readouterr().err
    assert "from step 0 to 2" in err
    assert f"starting anew (--resume none): what {run_dir} held (2 checkpoints, lines of metrics) is set aside under names that end in" in err
    assert (run_dir / "checkpoints/step-00000001.stale").is_dir(), "the older run's checkpoints are set aside, not lost"
    assert [line["step"] for line in read_metrics(run_dir / "metrics.jsonl.stale")] == [1, 2], "and so are its metrics"

    assert main(["checkpoint", "list", str(run_dir), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["checkpoints"]
    assert [(row["step"], row["world_size"], row["recipe"]) for row in rows] == [(2, 1, "lmfusion")]
    assert main(["checkpoint", "verify", str(run_dir)]) == 0
    data = run_dir / "checkpoints/step-00000002/__0_0.distcp"
    content = bytearray(data.read_bytes())
    content[500] ^= 1
    data.write_bytes(content)
    capsys.readouterr()
    assert main(["checkpoint", "verify", str(run_dir)]) == 2
    assert "does not match its checksum" in capsys.readouterr().err


def test_evaluation_and_samples_can_be_switched_off(config_file: Path, tmp_path: Path) -> None:
    """Not even after the last step."""
    off = ["evaluate.every_steps=null", "sample.every_steps=null", "sample.prompts=[a red circle.]", "train.steps=1"]
    assert main(["train", str(config_file), f"run.dir={tmp_path}", *off]) == 0
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert not [key for key in line if key.startswith("validation/")]
    assert not (tmp_path / "samples").exists()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--resume", "{folder}/nowhere"], "nowhere: no complete checkpoint there"),
        (["parallel.dp_shard=2"], "parallel.dp_shard=2: must divide the number of ranks"),
        (["model.base={folder}"], "not a Hugging Face Llama folder"),
        (["data.sources=[{{path: {folder}/none}}]"], "matches no tar file"),
        (["train.stepz=3"], "stepz"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_2(config_file: Path, arguments: list[str], word: str, capsys: pytest.CaptureFixture) -> None:
    filled = [argument.format(folder=config_file.parent) for argument in arguments]
    assert main(["train", str(config_file), f"run.dir={config_file.parent}/mistake", *filled]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("indexed ")]
    assert len(lines) == 1 and word in lines[0] and "Traceback" not in lines[0]


def test_a_checkpoint_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["checkpoint", "list", str(tmp_path)]) == 2
    assert "no complete checkpoint there" in capsys.readouterr().err


def test_a_run_that_diverges_exits_1(config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    from fusiontrain.train.trainer import Trainer, TrainingDiverged

    def diverge(self: Trainer) -> bool:
        raise TrainingDiverged("the loss is not finite")

    monkeypatch.setattr(Trainer, "run", diverge)
    assert main(["train", str(config_file), f"run.dir={config_file.parent}/diverged"]) == 1
    assert "error: the loss is not finite" in capsys.readouterr().err
    assert (config_file.parent / "diverged/logs/rank-0.log").read_text().endswith("error: the loss is not finite\n")


def test_the_live_line_shows_progress_and_events(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr("rich.console.Console", lambda **_: Console(file=screen, force_terminal=True, width=200))
    reporter = command.LiveReporter()
    reporter.started(0, 4, Path("runs/x"))
    reporter.step({**VALUES, "step": 1}, due=False)
    reporter.step(VALUES, due=False)
    reporter.event("saved [step-00000002]")
    reporter.finished()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert "2/4" in text and "loss 1.5000 text 0.5000 norm" in text and "saved [step-00000002]" in text and "eta 0:00" in text
    assert "1,234 tok/s mfu 40.0% wait 4% memory 1.2 GiB skipped 3" in text and "last checkpoint none yet" in text


def test_only_the_main_rank_speaks() -> None:
    assert type(command.make_reporter(is_main=False)) is command.LogReporter
    assert type(command.make_reporter(is_main=True)) is command.PlainReporter


def test_eta_leaves_out_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 102.0, 104.0])
    monkeypatch.setattr(command.time, "monotonic", lambda: next(clock))
    eta = command.Eta(0, 10)
    assert [eta.update(step) for step in (1, 2, 3)] == [None, 16.0, 14.0]
    assert [command.format_seconds(seconds) for seconds in (None, 14.2, 125, 3725)] == ["-", "0:14", "2:05", "1:02:05"]


@pytest.mark.skipif(sys.platform != "linux", reason="the system call is Linux's")
def test_a_rank_of_an_agent_dies_with_it() -> None:
    """As the system has it noted: see also `utils/orphans.py`, whose test lets one die."""
    child = os.fork()
    if child == 0:
        number = ctypes.c_int(-1)
        try:
            os.environ["TORCHELASTIC_RUN_ID"] = "a job"
            main(["train", "nowhere.yaml"])
            ctypes.CDLL(None).prctl(2, ctypes.byref(number))  # PR_GET_PDEATHSIG
        finally:
            os._exit(number.value)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == signal.SIGKILL


def test_torchrun_with_two_processes_and_a_signal(config_file: Path) -> None:
    """Rank 1 alone gets a SIGTERM: both ranks save the same step and exit 0."""
    run_dir = config_file.parent / "torchrun"
    arguments = ["train.steps=100000", "checkpoint.every_steps=100000", "evaluate.every_steps=100000", "train.log_every_steps=1"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.Popen(
        [*torchrun, "-m", "fusiontrain", "train", str(config_file), f"run.dir={run_dir}", *arguments, "--json"],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    watchdog = threading.Timer(90, process.kill)
    watchdog.start()
    try:
        assert process.stderr is not None
        seen = []
        for line in process.stderr:
            seen.append(line)
            if line.startswith("step 2/"):
                break
        pid = re.search(r"process (\d+), rank 1", (run_dir / "logs/rank-1.log").read_text())
        assert pid is not None, "".join(seen)
        os.kill(int(pid.group(1)), signal.SIGTERM)
        out, err = process.communicate()
    finally:
        watchdog.cancel()
        process.kill()
    assert process.returncode == 0, "".join(seen) + err
    document = json.loads(out)
    assert not document["finished"] and Path(document["checkpoint"]).is_dir()
    assert len(read_metrics(run_dir / "metrics.jsonl")) == document["step"]
    assert sum(line.startswith("training ") for line in seen) == 1, "only rank 0 speaks"
