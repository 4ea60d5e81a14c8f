"""`fusiontrain launch slurm` where no Slurm is: what it shows, writes, refuses and hands to sbatch. The programs of Slurm are shell scripts here."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fusiontrain.cli.main import main
from fusiontrain.config.load import load, to_yaml
from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.shards import write_shards

TWO_NODES = ("--nodes=2", "--gpus-per-node=0", "--procs-per-node=1")
SBATCH = """#!/bin/sh
printf '%s\\n' "$@" >> "$PWD/sbatch.arguments"
[ ! -f "$PWD/refuse" ] || { cat "$PWD/refuse" >&2; exit 1; }
echo "$(( 40 + $(wc -l < "$PWD/sbatch.arguments") / 2 ));mini"
"""
SQUEUE = """#!/bin/sh
[ ! -f "$PWD/squeue.error" ] || { cat "$PWD/squeue.error" >&2; exit 1; }
cat "$PWD/squeue.state" 2>/dev/null || true
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The working directory, with a config and shards; no program of Slurm is on PATH."""
    monkeypatch.chdir(tmp_path)
    write_shards(tmp_path / "shards", shards=1, samples=8)
    config = tiny_config({"data.sources": [{"path": "shards"}], "train.steps": 4, "train.global_batch_sequences": 2, "run.dir": "runs/first run"})
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    # Slurm may be installed: so not all of /usr/bin.
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "sh", "cat", "wc"):
        (tools / name).symlink_to(str(shutil.which(name)))
    monkeypatch.setenv("PATH", str(tools))
    return tmp_path


@pytest.fixture
def slurm(home, monkeypatch):
    """The same with an sbatch that records its arguments and an squeue that answers what `squeue.state` holds."""
    programs = home / "programs"
    programs.mkdir()
    for name, text in (("sbatch", SBATCH), ("squeue", SQUEUE)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return home


def launch(*more: str) -> int:
    return main(["launch", "slurm", "run.yaml", *TWO_NODES, *more])


def document(capsys, *more: str) -> dict:
    capsys.readouterr()
    assert launch("--json", *more) == 0
    return json.loads(capsys.readouterr().out)


def refusal(capsys, *argv: str) -> str:
    assert main(list(argv)) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    return captured.err


def everything(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.lstat().st_mtime_ns for path in folder.rglob("*")}


def options(script: str) -> list[str]:
    """What sbatch would read from a job's file."""
    return [word for line in script.splitlines() if line.startswith("#SBATCH ") for word in shlex.split(line.removeprefix("#SBATCH "))]


def test_a_dry_run_prints_everything_and_writes_nothing(home, capsys):
    before = everything(home)
    assert launch("--dry-run", "train.steps=7", "--time=1:00:00") == 0
    printed = capsys.readouterr().out
    folder = home / "runs" / "first run" / "slurm"
    assert f"# {folder / 'job.sbatch'}\n#!/usr/bin/env bash\n" in printed
    assert "#SBATCH --time=1:00:00\n" in printed and "\n  steps: 7\n" in printed
    copied = printed.split(f"# {folder / 'code'}: a copy of\n")[1].split()
    assert [Path(path).name for path in copied if path != "#"] == ["fusiontrain", "fusiontrain_kernels", "launch"]
    shown = document(capsys, "--dry-run", "train.steps=7", "--time=1:00:00")
    assert shown["script"] in printed and shown["job"] is None and shown["config"]["train"]["steps"] == 7
    assert everything(home) == before


def test_without_sbatch_there_is_one_sentence_and_nothing_is_written(home, capsys):
    before = everything(home)
    assert "sbatch: not found; call this on a machine of the cluster" in refusal(capsys, "launch", "slurm", "run.yaml", *TWO_NODES)
    assert everything(home) == before


def test_the_file_that_is_submitted(slurm, capsys):
    extra = ("--partition=main", "--time=2-00:00:00", "--cpus-per-node=12", "--sbatch-arg=--comment=two words", "--no-requeue", "--signal-seconds=300")
    submitted = document(capsys, *extra)
    folder = slurm / "runs" / "first run" / "slurm"
    assert (slurm / "sbatch.arguments").read_text().splitlines() == ["--parsable", str(folder / "job.sbatch")]
    assert submitted == {"run": "runs/first run", "folder": str(folder), "step": 0, "steps": 4, "job": 41}
    assert (folder / "jobs").read_text() == "41\n"
    script = (folder / "job.sbatch").read_text()
    assert options(script) == [
        "--job-name=first run", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=12", "--partition=main", "--time=2-00:00:00", "--signal=B:USR1@300",
        "--open-mode=append", f"--chdir={slurm}", f"--output={folder / 'logs' / 'job-%j.log'}", "--no-requeue", "--comment=two words",
    ]
    subprocess.run(["bash", "-n", folder / "job.sbatch"], check=True)
    assert to_yaml(load(folder / "config.yaml")) == (slurm / "run.yaml").read_text()
    assert (folder / "logs").is_dir() and not (folder / "code.tmp").exists()


def test_the_file_runs_the_code_of_its_snapshot(slurm, capsys):
    """The file itself is run; its last line finds, in the place of launch/slurm.sbatch, a script that tells what it was given."""
    document(capsys)
    folder = slurm / "runs" / "first run" / "slurm"
    for name in ("env.sh", "slurm.sbatch", "torchrun.sh"):
        subprocess.run(["bash", "-n", folder / "code" / "launch" / name], check=True)
    where = 'import fusiontrain, fusiontrain_kernels; print(fusiontrain.__file__); print(fusiontrain_kernels.__file__)'
    (folder / "code" / "launch" / "slurm.sbatch").write_text(f'echo "$1"; echo "$NPROC_PER_NODE"; echo "$FUSIONTRAIN_LOGS"; python -c \'{where}\'\n')
    (slurm / "fusiontrain.py").write_text("raise SystemExit('the working directory came first')")
    environment = {"PATH": os.environ["PATH"]}
    said = subprocess.run(["bash", folder / "job.sbatch"], cwd=slurm, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    assert said == [
        str(folder / "config.yaml"), "1", str(folder / "logs"),
        str(folder / "code" / "fusiontrain" / "__init__.py"), str(folder / "code" / "fusiontrain_kernels" / "__init__.py"),
    ]
    assert Path(sys.executable).parent.as_posix() in (folder / "job.sbatch").read_text()


def test_the_same_line_again_keeps_the_code_and_update_takes_todays(slurm, capsys):
    document(capsys)
    code = slurm / "runs" / "first run" / "slurm" / "code"
    (code / "fusiontrain" / "mark").touch()
    assert "code: stays as it is" in (launch("--dry-run"), capsys.readouterr().out)[1]
    assert document(capsys)["job"] == 42
    assert (code / "fusiontrain" / "mark").is_file()
    assert document(capsys, "--update")["job"] == 43
    assert not (code / "fusiontrain" / "mark").exists() and (code / "fusiontrain" / "__init__.py").is_file()
    assert (code.parent / "jobs").read_text().split() == ["41", "42", "43"]


def test_another_config_in_the_folder_is_refused_key_by_key_unless_it_is_to_be_updated(slurm, capsys):
    document(capsys)
    line = ("launch", "slurm", "run.yaml", *TWO_NODES)
    said = refusal(capsys, *line, "seed=5", "optimizer.learning_rate=0.5", "train.steps=9")
    assert "seed is 0 there and 5 now" in said and "optimizer.learning_rate is" in said and "train.steps" not in said
    assert "belongs to another config; set another run.dir, give the same values, or add --update" in said
    assert len((slurm / "sbatch.arguments").read_text().splitlines()) == 2, "not submitted"
    assert document(capsys, "train.steps=9")["steps"] == 9, "a run may be given more steps"
    document(capsys, "--update", "seed=5")
    assert load(slurm / "runs" / "first run" / "slurm" / "config.yaml").seed == 5


def test_a_run_whose_job_lives_is_not_submitted_again(slurm, capsys):
    document(capsys)
    for state in ("PENDING", "RUNNING", "SUSPENDED"):
        (slurm / "squeue.state").write_text(state)
        assert f"its job 41 is {state}; wait for its end or call: scancel 41" in refusal(capsys, "launch", "slurm", "run.yaml", *TWO_NODES)
    (slurm / "squeue.error").write_text("slurm_load_jobs error: Unable to contact slurm controller")
    assert "Unable to contact slurm controller; Slurm must answer" in refusal(capsys, "launch", "slurm", "run.yaml", *TWO_NODES)
    (slurm / "squeue.error").write_text("slurm_load_jobs error: Invalid job id specified")
    assert document(capsys)["job"] == 42, "Slurm has forgotten the job, so it has ended"


def test_what_sbatch_refuses_is_said_and_not_remembered(slurm, capsys):
    (slurm / "refuse").write_text("sbatch: error: invalid partition specified: nowhere")
    said = refusal(capsys, "launch", "slurm", "run.yaml", *TWO_NODES, "--partition=nowhere")
    assert "not submitted: sbatch: error: invalid partition specified: nowhere; change the options" in said
    assert not (slurm / "runs" / "first run" / "slurm" / "jobs").exists()
    (slurm / "refuse").unlink()
    assert document(capsys)["job"] == 42


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--nodes=0", "--gpus-per-node=8"], "--nodes 0: must be at least 1"),
        (["--nodes=1", "--gpus-per-node=0"], "training on CPUs also needs --procs-per-node"),
        (["--nodes=1", "--gpus-per-node=8", "--procs-per-node=4"], "one process per GPU; leave it out, or give 8"),
        ([*TWO_NODES, "--time=banana"], "--time 'banana': is none of Slurm's forms"),
        ([*TWO_NODES, "--time=1:75"], "--time '1:75': is none of Slurm's forms"),
        ([*TWO_NODES, "--sbatch-arg=mail"], "must start with a dash"),
        ([*TWO_NODES, "--name=a\nb"], "must be one line"),
        (["--nodes=3", "--gpus-per-node=0", "--procs-per-node=1"], "global_batch_sequences"),
    ],
)
def test_options_that_make_no_sense(home, capsys, arguments, sentence):
    before = everything(home)
    assert sentence in refusal(capsys, "launch", "slurm", "run.yaml", *arguments)
    assert everything(home) == before


@pytest.mark.parametrize("limit", ["90", "90:30", "12:00:00", "2-12", "2-12:30", "2-12:00:00", "UNLIMITED"])
def test_every_form_of_a_time_limit_that_slurm_takes(home, capsys, limit):
    launch(*TWO_NODES, "--dry-run", f"--time={limit}")
    assert f"--time={limit}\n" in capsys.readouterr().out


def test_status_of_a_run_that_has_not_begun(home, capsys):
    assert main(["launch", "status", "run.yaml", "--plain"]) == 0
    assert capsys.readouterr().out == "0 4\n"
    assert main(["launch", "status", "run.yaml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"run": "runs/first run", "step": 0, "steps": 4, "finished": False}


def test_a_debug_config_is_refused_before_its_world_is_made(home, capsys):
    config = str(Path(__file__).parents[2] / "configs" / "debug" / "lmfusion.yaml")
    line = ["launch", "slurm", config, "--nodes=3", "--gpus-per-node=0", "--procs-per-node=1", "--dry-run"]
    assert "must be a multiple of ranks x micro_batch_sequences = 3 x 1" in refusal(capsys, *line)
    assert not (home / "runs").exists()
