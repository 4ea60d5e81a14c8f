"""`fusiontrain profile` as a user types it: one document on stdout, files in the run's folder, mistakes as one sentence."""

from __future__ import annotations

import json
import re

import pytest

from fusiontrain.cli import profile
from fusiontrain.cli.main import main
from fusiontrain.config.load import to_yaml
from fusiontrain.data.world.make import make_world
from fusiontrain.testing.configs import tiny_config


@pytest.fixture
def config(tmp_path):
    make_world(tmp_path / "world", 20, seed=1)
    settings = {"model.recipe": "dense", "data.modalities": ["text"], "data.sources": [{"path": str(tmp_path / "world" / "train")}]}
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(tiny_config({**settings, "train.threads": 1, "run.dir": str(tmp_path / "run")})))
    return path


def test_json_alone_on_stdout_and_files_in_the_runs_folder(config, tmp_path, capfd):
    assert main(["profile", str(config), "--steps", "1", "--warmup", "1", "--json", "data.sequence_length=64"]) == 0
    found = json.loads(capfd.readouterr().out)
    folder = tmp_path / "run" / "profile"
    assert found["folder"] == str(folder) and sorted(path.name for path in folder.iterdir()) == sorted(found["files"])
    assert sum(row["share"] for row in found["rows"]) == pytest.approx(1) and found["steps"] == found["warmup"] == 1
    assert json.loads((folder / "report.json").read_text())["rows"] == found["rows"]
    assert sum(found["ranks"][0]["tokens"].values()) <= 2 * 64


@pytest.mark.parametrize("option", ["--steps", "--warmup"])
def test_a_window_needs_a_step(option, config, capsys):
    assert main(["profile", str(config), option, "0"]) == 2
    assert capsys.readouterr().err == f"fusiontrain: error: {option} 0: must be at least 1\n"


def test_a_folder_that_cannot_be_written_to(config, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["profile", str(config), "--out", str(tmp_path / "file")]) == 2
    assert "cannot be written to" in capsys.readouterr().err.splitlines()[-1]


def test_the_printed_parts_sum_to_the_step(config, capfd, monkeypatch):
    monkeypatch.setattr(profile, "TOLD", 0.05)  # of which there are smaller ones on any machine
    assert main(["profile", str(config), "--steps", "1", "--warmup", "1"]) == 0
    table = capfd.readouterr().out.split("\n\n")[1].splitlines()[1:]
    shares = {re.split(r"\s{2,}", line.strip())[0]: float(re.search(r"(\d+\.\d)%", line)[1]) for line in table}
    assert shares.pop("a step") == 100 and sum(shares.values()) == pytest.approx(100, abs=0.05 * len(shares))
    assert any(name.startswith("smaller parts") for name in shares)
