"""Every mistake of a user is one sentence on stderr and exit code 2, without a traceback."""

from __future__ import annotations

import json

import pytest

from fusiontrain.cli.main import main
from fusiontrain.config.load import to_yaml
from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.models import write_tiny_llama
from fusiontrain.testing.shards import write_shards

NO_SHAPE = dict.fromkeys(("model.vocab_size", "model.dim", "model.num_layers", "model.num_heads", "model.num_kv_heads", "model.ffn_dim"))


@pytest.fixture
def config_file(tmp_path, monkeypatch):
    """A whole run in `tmp_path`: shards, a config that points at them, and that folder as the working directory."""
    monkeypatch.chdir(tmp_path)
    write_shards(tmp_path / "shards", shards=1, samples=8)
    config = tiny_config({"data.sources": [{"path": "shards"}], "train.steps": 2, "train.global_batch_sequences": 2, "checkpoint.every_steps": 2})
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    return "run.yaml"


def fails_with(capsys, *argv: str) -> str:
    """Run the command, check the law, and return what it said."""
    try:
        code = main(list(argv))
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2, captured.err
    said = [line for line in captured.err.splitlines() if line.startswith("fusiontrain: error: ")]
    assert said, captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""
    return "\n".join(said)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "missing.yaml"], "missing.yaml: no such file"),
        (["config", "check", "."], "is a folder"),
        (["trian", "run.yaml"], "did you mean train?"),
        (["train", "run.yaml", "train.stepz=3"], "train.steps"),
        (["train", "run.yaml", "train.steps=many"], "train.steps"),
        (["train", "run.yaml", "train.steps=0", "optimizer.beta1=2"], "optimizer.beta1"),
        (["train", "run.yaml", "data.sources.0.path=nowhere"], "nowhere"),
        (["train", "run.yaml", "model.recipe=lmfusion", *(f"{key}=null" for key in NO_SHAPE)], "model.base"),
        (["train", "run.yaml", "--resume", "nowhere"], "nowhere"),
        (["sample", "nowhere", "--prompt", "x", "--out", "out"], "nowhere"),
        (["evaluate", "nowhere"], "nowhere"),
        (["checkpoint", "verify", "nowhere"], "nowhere"),
        (["data", "index", "nowhere"], "nowhere"),
        (["data", "make-world", "world", "--documents", "1"], "at least 2"),
        (["data", "make-world", "."], "not a demo world"),
        (["data", "inspect", "shards", "--sample", "99"], "the shards hold 8 samples, counted from 0"),
    ],
)
def test_one_sentence_and_exit_code_2(config_file, capsys, argv, message):
    assert message in fails_with(capsys, *argv)


def test_all_problems_are_told_at_once(config_file, capsys):
    said = fails_with(capsys, "config", "check", config_file, "train.steps=0", "seed=-1", "model.dmi=8")
    assert all(key in said for key in ("train.steps", "seed", "model.dmi"))
    assert "model.dim" in said


def test_a_run_folder_that_cannot_be_made(config_file, tmp_path, capsys):
    (tmp_path / "taken").touch()
    said = fails_with(capsys, "train", config_file, "run.dir=taken")
    assert "run.dir: taken cannot be written to" in said


def test_a_folder_of_empty_shards(config_file, tmp_path, capsys):
    (tmp_path / "shards" / "shard-000.tar").write_bytes(bytes(1024))
    assert "without a usable sample" in fails_with(capsys, "train", config_file)


def test_a_damaged_shard(config_file, tmp_path, capsys):
    path = tmp_path / "shards" / "shard-000.tar"
    path.write_bytes(path.read_bytes()[:700])
    assert "damaged at offset" in fails_with(capsys, "train", config_file)


def test_a_base_that_is_no_llama(config_file, tmp_path, capsys):
    write_tiny_llama(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    shape = [f"{key}=null" for key in NO_SHAPE]
    capsys.readouterr()  # what packages print when transformers writes a model
    said = fails_with(capsys, "train", config_file, "model.recipe=lmfusion", "model.base=base", *shape)
    assert "model_type is 'gpt2'" in said


def test_a_checkpoint_of_another_model(config_file, capsys):
    assert main(["train", config_file, "run.dir=one"]) == 0
    capsys.readouterr()
    said = fails_with(capsys, "train", config_file, "run.dir=two", "model.ffn_dim=64", "--resume", "one/checkpoints/step-00000002")
    assert "another model" in said
    assert "ffn_dim" in said
    said = fails_with(capsys, "train", config_file, "run.dir=two", "data.sequence_length=128", "--resume", "one/checkpoints/step-00000002")
    assert "data.sequence_length" in said
    other = ["data.sequence_length=128", "data.oversize=split", "train.steps=4", "run.dir=two", "data.from_step=[[2,0]]"]
    assert main(["train", config_file, *other, "checkpoint.accept_data_change=true", "--resume", "one/checkpoints/step-00000002"]) == 0
    assert main(["train", config_file, *other, "train.steps=5"]) == 0, "from then on the other data are the run's own"


def test_a_schedule_or_a_jump_out_of_order(config_file, capsys):
    assert "data.from_step" in fails_with(capsys, "config", "check", config_file, "data.from_step=[[5,1],[3,2]]")
    sources = "data.sources=[{path: shards, weight_schedule: [[9,1],[3,2]]}]"
    assert "data.sources.0.weight_schedule" in fails_with(capsys, "config", "check", config_file, sources)


def test_peek_and_plan_refuse_what_makes_no_sense(config_file, capsys, tmp_path):
    assert main(["data", "peek", config_file, "--step", "2", "--out", str(tmp_path / "seen")]) == 0
    capsys.readouterr()
    assert (tmp_path / "seen" / "sources.json").is_file()
    assert "steps count from 1" in fails_with(capsys, "data", "peek", config_file, "--step", "0")
    assert "at least 1" in fails_with(capsys, "data", "plan", config_file, "--steps", "0")
    assert "cannot share it evenly" in fails_with(capsys, "data", "plan", config_file, "--world-size", "7")


def test_json_commands_print_one_document(config_file, capsys):
    assert main(["data", "index", "shards", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 8
    assert main(["config", "show", config_file, "train.steps=7", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["train"]["steps"] == 7
    assert main(["data", "plan", config_file, "--steps", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["documents"] > 0
