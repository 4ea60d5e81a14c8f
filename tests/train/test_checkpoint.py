"""A checkpoint is complete or it does not exist, and it is what was written."""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fusiontrain.cli.main import main
from fusiontrain.config.load import to_yaml
from fusiontrain.parallel.mesh import Ranks
from fusiontrain.testing.configs import tiny_config
from fusiontrain.train.checkpoint import (
    DamagedCheckpoint,
    foreign_files,
    list_checkpoints,
    load_checkpoint,
    prune,
    read_manifest,
    resume_candidates,
    save_checkpoint,
    set_aside_newer,
    verify_checkpoint,
)
from fusiontrain.train.checkpoint import manifest as manifest_module
from fusiontrain.train.checkpoint import save as save_module
from fusiontrain.train.identity import first_difference, folder_identity, other_objective_of_base
from fusiontrain.train.retention import Retention
from fusiontrain.train.state import TrainState
from fusiontrain.utils.errors import UserError

MODEL = {"recipe": "dense", "config": {"recipe": "dense"}, "objective": {}, "tensors": {"weight": [3, 2]}, "folders": {}}


def tensors(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"model": {"weight": torch.full((3, 2), value)}, "optimizer": {"weight.step": torch.tensor(value)}}


ALL = Retention(last=9)


def save(folder: Path, step: int, keep: Retention = ALL, **metrics: float) -> Path:
    state = TrainState(step=step, data={"step": step})
    return save_checkpoint(folder, state, tensors(float(step)), MODEL, "seed: 0\n", Ranks(), keep, metrics)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    assert path.name == "step-00000007" and names(tmp_path) == [path.name]
    target = tensors(0.0)
    weight = target["model"]["weight"]
    state = load_checkpoint(path, target, Ranks())
    assert state == TrainState(step=7, data={"step": 7})
    assert weight.eq(7).all() and target["optimizer"]["weight.step"] == 7, "tensors are filled in place"
    assert (path / "config.yaml").read_text() == "seed: 0\n"
    manifest = read_manifest(path)
    assert set(manifest["files"]) == {"__0_0.distcp", ".metadata", "config.yaml"}
    assert (manifest["step"], manifest["world_size"], manifest["versions"]["torch"]) == (7, 1, torch.__version__)
    assert verify_checkpoint(path) == []


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = save_checkpoint(tmp_path, TrainState(step=1), tensors(5.0), MODEL, "", Ranks(), ALL, {})
    target = tensors(0.0)
    load_checkpoint(path, target, Ranks())
    assert target["model"]["weight"].eq(5).all() and names(tmp_path) == [path.name]


def test_the_newest_are_kept_and_leftovers_go(tmp_path: Path) -> None:
    (tmp_path / "step-00000002.tmp").mkdir(parents=True)
    for step in (1, 2, 3, 10):
        save(tmp_path, step, Retention(2))
    assert names(tmp_path) == ["step-00000003", "step-00000010"]
    assert [path.name for path in list_checkpoints(tmp_path)] == names(tmp_path)


def test_round_steps_and_the_best_are_kept_too(tmp_path: Path) -> None:
    keep = Retention(2, every=4, best="image")
    losses = {1: 0.9, 2: 0.3, 3: 0.5, 4: 0.7, 5: 0.3, 6: 0.8, 7: 0.6}
    for step, loss in losses.items():
        save(tmp_path, step, keep, image=loss)
    assert names(tmp_path) == [f"step-0000000{step}" for step in (4, 5, 6, 7)], "of two equally good ones the later stays"
    save(tmp_path, 8, keep)
    save(tmp_path, 9, keep)
    assert names(tmp_path) == [f"step-0000000{step}" for step in (4, 5, 8, 9)], "without the metric nothing is the best"
    (tmp_path / "step-00000005" / "manifest.json").write_text("{}")
    assert [path.name for path in prune(tmp_path, Retention(1, best="image"), dry_run=True)] == ["step-00000005", "step-00000008"]
    assert len(names(tmp_path)) == 4
    prune(tmp_path, Retention(1))
    assert names(tmp_path) == ["step-00000009"]


def test_a_foreign_file_is_named_and_does_no_harm(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    assert foreign_files(path) == []
    (path / "notes.txt").write_text("mine")
    assert foreign_files(path) == [f"{path / 'notes.txt'}: does not belong to the checkpoint: move it elsewhere, or delete it"]
    assert load_checkpoint(path, tensors(0.0), Ranks()).step == 3


@pytest.mark.parametrize("moment", ["seal", "write_manifest", "publish"])
def test_a_kill_while_saving_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """The process dies at a moment of its second save; what is found afterwards is the first one, whole."""
    save(tmp_path, 1)
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(save_module, moment, lambda *_: os._exit(9))
        save(tmp_path, 2)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert (tmp_path / "step-00000002.tmp").is_dir(), "the kill came too early to test anything"
    (found,) = resume_candidates("auto", tmp_path)
    assert found.name == "step-00000001" and verify_checkpoint(found) == []
    save(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_a_disk_without_room_is_named_and_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    """A process that may write no file above 4 KiB stands in for the full disk."""
    save(tmp_path, 1)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            save_checkpoint(tmp_path, TrainState(step=2), {"model": {"weight": torch.zeros(10_000)}, "optimizer": {}}, MODEL, "", Ranks(), ALL, {})
        except UserError as error:
            os._exit(7 if "step-00000002: cannot be saved" in str(error) else 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    (found,) = resume_candidates("auto", tmp_path)
    assert found.name == "step-00000001" and verify_checkpoint(found) == []


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda path: flip(path / "__0_0.distcp", 700), "__0_0.distcp: does not match its checksum"),
        (lambda path: flip(path / ".metadata", 50), r"\.metadata: does not match its checksum"),
        (lambda path: os.truncate(path / "__0_0.distcp", 100), "has 100 bytes instead of"),
        (lambda path: (path / "config.yaml").unlink(), "config.yaml: is missing"),
        (lambda path: flip(path / "manifest.json", (path / "manifest.json").read_text().index('"step": 4') + 8), "own checksum"),
        (lambda path: (path / "manifest.json").write_text("{"), "is not readable"),
        (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing"),
    ],
)
def test_damage_is_found_and_named(tmp_path: Path, damage: Callable[[Path], None], word: str) -> None:
    path = save(tmp_path, 4)
    damage(path)
    with pytest.raises(DamagedCheckpoint, match=word):
        load_checkpoint(path, tensors(0.0), Ranks())


def test_every_byte_of_the_manifest_counts(tmp_path: Path) -> None:
    path = save(tmp_path, 4)
    text = (path / "manifest.json").read_text()
    for place in range(0, len(text), 37):
        if text[place].isalnum():
            (path / "manifest.json").write_text(text[:place] + ("x" if text[place] != "x" else "y") + text[place + 1 :])
            with pytest.raises(UserError):
                read_manifest(path)


@pytest.mark.parametrize("change", [("\n ", "\n\t"), (": 4", ":4"), ("2.5e-07", "2.5E-07"), ("world_size", "world\\u005fsize")])
def test_a_manifest_that_means_the_same_is_damaged_all_the_same(tmp_path: Path, change: tuple[str, str]) -> None:
    """One flipped bit makes an E of an e; what was not written here is not to be trusted, whatever it means."""
    state = TrainState(step=4, history={"loss": [2.5e-7]})
    path = save_checkpoint(tmp_path, state, tensors(1.0), MODEL, "", Ranks(), ALL, {})
    text = (path / "manifest.json").read_text()
    changed = text.replace(*change, 1)
    assert changed != text and json.loads(changed) == json.loads(text)
    (path / "manifest.json").write_text(changed)
    with pytest.raises(DamagedCheckpoint, match="own checksum"):
        read_manifest(path)


def test_what_resume_means(tmp_path: Path) -> None:
    assert resume_candidates("auto", tmp_path / "nothing") == []
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    (tmp_path / "step-00000003").mkdir()  # no manifest: not complete
    assert resume_candidates("none", tmp_path) == []
    assert resume_candidates("auto", tmp_path) == [newer, older]
    assert resume_candidates(str(older), tmp_path) == [older]
    run = tmp_path / "run"
    in_run = [save(run / "checkpoints", step) for step in (1, 2)]
    assert resume_candidates(str(run), tmp_path) == in_run[::-1]
    with pytest.raises(UserError, match="no complete checkpoint"):
        resume_candidates("", tmp_path)
    with pytest.raises(UserError, match="step-00000003: no complete checkpoint"):
        resume_candidates(str(tmp_path / "step-00000003"), tmp_path)


def test_going_back_sets_the_abandoned_future_aside(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    set_aside_newer(tmp_path, 1)
    assert names(tmp_path) == ["step-00000001", "step-00000002.stale", "step-00000003.stale"]
    assert resume_candidates("auto", tmp_path) == [tmp_path / "step-00000001"]
    save(tmp_path, 2)
    set_aside_newer(tmp_path, 1)
    assert names(tmp_path) == ["step-00000001", "step-00000002.stale", "step-00000002.stale-2", "step-00000003.stale"]


def test_a_newer_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_module, "FORMAT_VERSION", 99)
    path = save(tmp_path, 1)
    monkeypatch.undo()
    with pytest.raises(UserError, match="format 99"):
        read_manifest(path)


def test_the_first_difference_of_two_models(tmp_path: Path) -> None:
    saved = {
        "config": {"recipe": "dense", "base": "a", "dim": 8, "dropout": 0.0, "image": {"vae": None, "patcher": "unet"}},
        "objective": {"image": "ddpm", "prediction": "eps", "num_timesteps": 1000},
        "tensors": {"a": [1], "b": [2]},
        "folders": {"base": {"path": "/a", "sha256": "1"}},
    }

    def changed(**values) -> str | None:
        return first_difference(saved, json.loads(json.dumps({**saved, **values})))

    assert changed() is None
    assert changed(config={**saved["config"], "base": "elsewhere"}) is None, "a folder may move"
    assert changed(config={**saved["config"], "dropout": 0.1}) is None, "it is trained in another way and is the same model"
    assert changed(config={**saved["config"], "recipe": "lmfusion", "dim": 9}) == "model.recipe is 'dense' there and 'lmfusion' here"
    assert "model.image.patcher is 'unet' there" in str(changed(config={**saved["config"], "image": {"vae": None, "patcher": "linear"}}))
    other = {**saved["objective"], "image": "flow_matching"}
    assert changed(objective=other) == "objective.image is 'ddpm' there and 'flow_matching' here"
    assert "its base was /a, and /b has other weights" in str(changed(folders={"base": {"path": "/b", "sha256": "2"}}))
    assert changed(tensors={"a": [1], "b": [3]}) == "b is [2] there and [3] here"
    assert changed(tensors={"a": [1]}) == "b is [2] there and absent here"


def test_a_base_that_learnt_to_predict_something_else_is_said(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "fusiontrain"}')
    (tmp_path / "config.yaml").write_text(to_yaml(tiny_config({"objective.image": "ddpm"})))

    def said(**objective: str) -> str | None:
        shape = dict.fromkeys(("vocab_size", "dim", "num_layers", "num_heads", "num_kv_heads", "ffn_dim"))
        return other_objective_of_base(tiny_config({"model": {"recipe": "transfusion", "base": str(tmp_path), **shape}, "objective": objective}))

    assert said(image="ddpm") is None
    assert "learnt with objective.image=ddpm; with objective.image=flow_matching" in str(said(image="flow_matching"))
    assert "objective.prediction=eps; with objective.prediction=v" in str(said(image="ddpm", prediction="v"))


def test_a_folder_is_known_by_its_content(tmp_path: Path) -> None:
    for name, content in (("one", b"x"), ("copy", b"x"), ("other", b"y")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(content)
    digests = {name: folder_identity(tmp_path / name)["sha256"] for name in ("one", "copy", "other")}
    assert digests["one"] == digests["copy"] != digests["other"]
    with pytest.raises(UserError, match=r"no \.safetensors"):
        folder_identity(tmp_path)


def test_a_damaged_manifest_hides_no_other_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, third = (save(tmp_path, step) for step in (1, 2, 3))
    (second / "manifest.json").write_text("{")
    next(first.glob("*.distcp")).unlink()
    assert main(["checkpoint", "list", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert str(first) in out and str(third) in out and str(second) not in out
    assert f"{second / 'manifest.json'}: is not readable" in err
    assert main(["checkpoint", "verify", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert f"{first}/" in err and "is missing" in err and f"{second / 'manifest.json'}: is not readable" in err


def test_what_is_incomplete_or_set_aside_is_listed_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unfinished = [tmp_path / "checkpoints" / name for name in ("step-00000003", "step-00000004.tmp")]
    for path in unfinished:
        path.mkdir(parents=True)
    assert main(["checkpoint", "list", str(tmp_path)]) == 2
    assert "no complete checkpoint there (incomplete: step-00000003, step-00000004.tmp)" in capsys.readouterr().err
    first, second = (save(tmp_path / "checkpoints", step) for step in (1, 2))
    set_aside_newer(tmp_path / "checkpoints", 1)
    unfinished[1].mkdir()  # the save has cleared it away
    assert main(["checkpoint", "list", str(tmp_path), "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [row["path"] for row in listed["checkpoints"]] == [str(first)]
    assert (listed["incomplete"], listed["set_aside"]) == ([str(path) for path in unfinished], [f"{second}.stale"])
    assert main(["checkpoint", "list", str(tmp_path / "checkpoints")]) == 0
    out = capsys.readouterr().out
    assert all(f"{path}: incomplete (" in out for path in unfinished) and f"{second}.stale: set aside" in out
    assert main(["checkpoint", "list", str(first), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["incomplete"] == [], "one was asked for"


def test_the_best_by_a_metric_that_no_checkpoint_has_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = to_yaml(tiny_config({"checkpoint.keep_best": "validation/text", "checkpoint.keep_last": 1, "data.validation_sources": [{"path": "x"}]}))
    for step, loss in enumerate((0.1, 0.9, 0.5), 1):
        save_checkpoint(tmp_path, TrainState(step=step), tensors(0.0), MODEL, config, Ranks(), ALL, {"loss": loss, "validation/image": loss})
    for asked, where in ((["--keep-best", "validation/imge"], "--keep-best validation/imge"), ([], "checkpoint.keep_best validation/text")):
        assert main(["checkpoint", "prune", str(tmp_path), *asked]) == 2
        err = capsys.readouterr().err
        assert f"{where}: no checkpoint in {tmp_path} has a value of that name" in err and "such as validation/image" in err
    assert len(names(tmp_path)) == 3
    assert main(["checkpoint", "prune", str(tmp_path / "step-00000003"), "--keep-best", "validation/image"]) == 0
    assert names(tmp_path) == ["step-00000001", "step-00000003"]


def test_the_last_sound_checkpoint_is_not_pruned_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = to_yaml(tiny_config())
    first, second, third = (save_checkpoint(tmp_path, TrainState(step=step), tensors(0.0), MODEL, config, Ranks(), ALL, {}) for step in (1, 2, 3))
    flip(third / "__0_0.distcp", 700)
    assert main(["checkpoint", "prune", str(tmp_path), "--keep-last", "1"]) == 2
    assert "__0_0.distcp" in (err := capsys.readouterr().err) and "none is sound, so nothing is deleted" in err
    assert len(names(tmp_path)) == 3
    assert main(["checkpoint", "prune", str(tmp_path), "--keep-last", "2"]) == 0
    assert names(tmp_path) == [second.name, third.name] and not first.exists()
