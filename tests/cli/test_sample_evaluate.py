"""`fusiontrain sample` and `fusiontrain evaluate`, as a person calls them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fusiontrain.cli.main import main
from fusiontrain.config.load import to_yaml
from fusiontrain.testing.recipes import make_recipe_world, recipe_config
from fusiontrain.testing.training import world_config


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """A run of one step of LMFusion on a small demo world of 32 x 32 pixels."""
    folder = tmp_path_factory.mktemp("trained")
    image = {"size": 32, "patch_size": 8}
    config = world_config(folder, {"train.steps": 1, "optimizer.warmup_steps": 0, "sample": {"steps": 2, "max_new_tokens": 6}, "data.image": image})
    (folder / "config.yaml").write_text(to_yaml(config))
    assert main(["train", str(folder / "config.yaml")]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("pictures") / "p.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, size=(40, 50, 3), dtype=np.uint8)).save(path)
    return str(path)


def sampled(capsys: pytest.CaptureFixture, *arguments: str) -> dict:
    capsys.readouterr()
    assert main(["sample", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_prompts_are_painted(run_dir, tmp_path, capsys) -> None:
    record = sampled(capsys, str(run_dir), "--prompt", "a red circle", "--prompt", "blau: größer", "--out", str(tmp_path), "--seed", "5")
    assert record["mode"] == "paint" and record["checkpoint"].endswith("step-00000001")
    assert record["samples"] == [{"prompt": "a red circle", "file": "000.png"}, {"prompt": "blau: größer", "file": "001.png"}]
    assert (record["seed"], record["steps"], record["guidance"]) == (5, 2, 3.0), "what is not given is the config's"
    assert json.loads((tmp_path / "samples.json").read_text(encoding="utf-8")) == record
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000.png", "001.png", "contact-sheet.png", "samples.json"]
    first = np.asarray(Image.open(tmp_path / "000.png"))
    assert first.shape == (32, 32, 3)

    assert record["sampler"] == "euler", "what ran, not the config's auto"
    assert not record.keys() & {"eta", "temperature", "max_new_tokens", "max_images"}, "nor what had no part in it"
    checkpoint = str(run_dir / "checkpoints" / "step-00000001")
    again = tmp_path / "again"
    arguments = [checkpoint, "--prompt", "a red circle", "--out", str(again)]
    assert main(["sample", *arguments, "--seed", "5"]) == 0
    assert str(again / "000.png") + ": a red circle" in capsys.readouterr().out
    assert np.abs(np.asarray(Image.open(again / "000.png")).astype(int) - first).max() <= 1, "the second prompt was no part of the first picture"
    assert sampled(capsys, *arguments, "--seed", "5", "--sampler", "ddim", "--eta", "1", "--steps", "3")["eta"] == 1
    assert np.abs(np.asarray(Image.open(again / "000.png")).astype(int) - first).max() > 8
    sampled(capsys, *arguments, "--seed", "6")
    assert np.abs(np.asarray(Image.open(again / "000.png")).astype(int) - first).max() > 8


def test_pictures_are_captioned(run_dir, picture, tmp_path, capsys) -> None:
    record = sampled(capsys, str(run_dir), "--image", picture, "--out", str(tmp_path))
    assert record["mode"] == "caption"
    assert [sample["image"] for sample in record["samples"]] == [picture] and isinstance(record["samples"][0]["text"], str)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["contact-sheet.png", "samples.json"]


def test_both_make_one_document_in_the_order_given(run_dir, picture, tmp_path, capsys) -> None:
    record = sampled(capsys, str(run_dir), "--prompt", "one", "--image", picture, "--prompt", "two", "--out", str(tmp_path))
    assert record["mode"] == "interleave"
    (sample,) = record["samples"]
    assert sample["prompt"] == [{"prompt": "one"}, {"image": picture}, {"prompt": "two"}]
    assert all(set(piece) in ({"text"}, {"file"}) for piece in sample["pieces"])
    assert all((tmp_path / piece["file"]).is_file() for piece in sample["pieces"] if "file" in piece)
    assert sampled(capsys, str(run_dir), "--prompt", "one", "--mode", "interleave", "--out", str(tmp_path))["mode"] == "interleave"


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "nothing to do"),
        (["--prompt", "x", "--mode", "caption"], "takes --image only"),
        (["--prompt", "x", "--steps", "0"], "--steps 0: must be a number of at least 1"),
        (["--prompt", "x", "--eta", "1.5"], "--eta 1.5: must be a number from 0 to 1"),
        (["--prompt", "x", "--guidance", "nan"], "--guidance nan"),
        (["--prompt", "x", "--guidance", "inf"], "--guidance inf"),
        (["--prompt", "x" * 300], "data.sequence_length) is 256"),
        (["--prompt", "x", "--mode", "interleave", "--max-new-tokens", "500"], "max_new_tokens of text: needs 502 tokens"),
        (["--prompt", ""], "--prompt is empty"),
        (["--prompt", "   "], "--prompt is empty"),
        (["--prompt", "x", "--prompt", " ", "--mode", "interleave"], "--prompt is empty"),
        (["--prompt", "x", "--eta", "1"], "--eta 1.0 does not apply: the sampler is euler"),
        (["--prompt", "x", "--eta", "0", "--sampler", "heun"], "--eta 0.0 does not apply: the sampler is heun"),
        (["--prompt", "x", "--temperature", "1"], "--temperature 1.0 does not apply: --mode paint writes no text"),
        (["--prompt", "x", "--max-new-tokens", "9"], "--max-new-tokens 9 does not apply: --mode paint writes no text"),
        (["--prompt", "x", "--max-images", "2"], "--max-images 2 does not apply: only --mode interleave"),
        (["--prompt", "x", "--mode", "write", "--steps", "3"], "--steps 3 does not apply: --mode write makes no pictures"),
        (["--image", "nowhere.png"], "nowhere.png: no such picture"),
        (["--image", __file__], "not a picture"),
    ],
)
def test_mistakes_are_one_sentence(run_dir, tmp_path, capsys, arguments, word) -> None:
    capsys.readouterr()
    folder = tmp_path / "new" / "out"
    assert main(["sample", str(run_dir), "--out", str(folder), *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and word in err
    assert not folder.parent.exists(), "there is a folder only when there is something in it"


def test_folders_that_cannot_be_are_refused(run_dir, tmp_path, capsys) -> None:
    (tmp_path / "file").write_text("")
    for out in ("file", "file/below/it"):
        assert main(["sample", str(run_dir), "--prompt", "x", "--out", str(tmp_path / out)]) == 2
        assert "cannot be written" in capsys.readouterr().err
    assert main(["sample", str(tmp_path), "--prompt", "x", "--out", str(tmp_path / "out")]) == 2
    assert "neither a complete checkpoint nor a run" in capsys.readouterr().err


def test_a_language_model_continues_its_prompt_and_asked_to_paint_says_what_it_is(run_dir, tmp_path, capsys) -> None:
    overrides = {"model.recipe": "dense", "data.modalities": ["text"], "run.dir": str(tmp_path / "run"), "train.steps": 1, "sample.prompts": ()}
    (tmp_path / "config.yaml").write_text(to_yaml(world_config(run_dir.parent, {**overrides, "optimizer.warmup_steps": 0})))
    assert main(["train", str(tmp_path / "config.yaml")]) == 0
    prompt, out = ["--prompt", "a red"], ["--out", str(tmp_path / "out")]
    record = sampled(capsys, str(tmp_path / "run"), *prompt, *out, "--max-new-tokens", "6")
    assert record["mode"] == "write" and [sample["prompt"] for sample in record["samples"]] == ["a red"]
    assert main(["sample", str(tmp_path / "run"), *prompt, *out, "--max-new-tokens", "6"]) == 0
    assert capsys.readouterr().out.startswith("a red" + record["samples"][0]["text"])
    assert sampled(capsys, str(tmp_path / "run"), "--prompt", "", *out, "--max-new-tokens", "2")["samples"][0]["prompt"] == "", "text from nothing"
    for option in ("--sampler", "ddim"), ("--guidance", "2"), ("--eta", "0"):
        assert main(["sample", str(tmp_path / "run"), *prompt, *out, *option]) == 2
        assert f"{option[0]} " in (error := capsys.readouterr().err) and "--mode write makes no pictures" in error
    for mode, sentence in (("paint", "reads and writes text only"), ("speak", "learnt no speech")):
        assert main(["sample", str(tmp_path / "run"), *prompt, *out, "--mode", mode]) == 2
        assert sentence in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path / "run"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report["validation"]) == {"text"} and "scores" not in report


@pytest.fixture(scope="module")
def codes_run(tmp_path_factory) -> Path:
    """A run of one step of Chameleon on a small demo world in codes, 16 an image."""
    folder = make_recipe_world(tmp_path_factory.mktemp("codes"))
    (folder / "config.yaml").write_text(to_yaml(recipe_config(folder, "Chameleon", "run", 2, {"train.steps": 1, "optimizer.warmup_steps": 0})))
    assert main(["train", str(folder / "config.yaml")]) == 0
    return folder / "run"


def test_a_model_of_codes_takes_what_applies_to_codes(codes_run, tmp_path, capsys) -> None:
    record = sampled(capsys, str(codes_run), "--prompt", "a red circle", "--temperature", "1", "--seed", "5", "--out", str(tmp_path / "out"))
    assert record.keys() == {"checkpoint", "mode", "seed", "temperature", "samples"} and len(record["samples"][0]["codes"]) == 16
    for option in ("--sampler", "euler"), ("--steps", "2"), ("--guidance", "1"), ("--eta", "0"):
        assert main(["sample", str(codes_run), "--prompt", "a red circle", "--out", str(tmp_path / "no"), *option]) == 2
        error = capsys.readouterr().err
        assert f"{option[0]} " in error and "writes its images as codes, without denoising" in error and error.count("\n") == 1
    arguments = ["sample", str(codes_run), "--prompt", "a", "--mode", "interleave", "--max-new-tokens", "500", "--out", str(tmp_path / "no")]
    assert main(arguments) == 2
    assert "max_new_tokens of text: needs 502 tokens" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_codes_are_captioned_and_continued(codes_run, run_dir, picture, tmp_path, capsys) -> None:
    path, out = str(tmp_path / "x.vq.npy"), ["--out", str(tmp_path / "out")]
    np.save(path, np.arange(16).reshape(4, 4))
    record = sampled(capsys, str(codes_run), "--image", path, "--max-new-tokens", "4", *out)
    assert record["mode"] == "caption" and [sample["image"] for sample in record["samples"]] == [path] and isinstance(record["samples"][0]["text"], str)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["samples.json"]
    record = sampled(capsys, str(codes_run), "--prompt", "look:", "--image", path, "--max-new-tokens", "4", "--max-images", "1", *out)
    assert record["mode"] == "interleave" and record["samples"][0]["prompt"] == [{"prompt": "look:"}, {"image": path}]
    np.save(tmp_path / "large.vq.npy", np.zeros((5, 5), np.int64))
    for model, file, sentence in (
        (codes_run, picture, "reads images as codes, which nothing here makes of a picture: give its .vq.npy"),
        (run_dir, path, "this model reads no codes: give a picture"),
        (codes_run, str(tmp_path / "large.vq.npy"), "must be 16 codes"),
        (codes_run, str(tmp_path / "none.vq.npy"), "cannot be read (No such file or directory)"),
    ):
        assert main(["sample", str(model), "--image", file, "--out", str(tmp_path / "no")]) == 2
        error = capsys.readouterr().err
        assert sentence in error and error.count("\n") == 1
    assert not (tmp_path / "no").exists()


def test_evaluate_says_why_codes_have_no_scores(codes_run, capsys) -> None:
    assert main(["evaluate", str(codes_run), "evaluate.batches=1", "--json"]) == 0
    out, err = capsys.readouterr()
    assert "scores" not in json.loads(out)
    assert err.splitlines()[-1].startswith("no scores of the judge: ") and "codes" in err
    assert main(["evaluate", str(codes_run), "evaluate.batches=1", "--judge", "0", "--json"]) == 0
    assert "judge" not in capsys.readouterr().err


def test_evaluate_reports_losses_and_scores(run_dir, capsys) -> None:
    def evaluated(*arguments: str) -> dict:
        capsys.readouterr()
        assert main(["evaluate", str(run_dir), *arguments, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    report = evaluated("--judge", "2")
    assert set(report["validation"]) == {"text", "image"}
    assert set(report["scores"]) == {"color_accuracy", "shape_accuracy", "size_accuracy", "place_accuracy", "caption_accuracy"}
    assert report["details"]["painting"]["all"]["count"] <= 2
    assert evaluated("--judge", "2") == report
    world = run_dir.parent / "world"
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    assert report["validation"]["image"] == pytest.approx(json.loads(lines[-1])["validation/image"]), "the numbers that training wrote"

    globbed = evaluated(f"data.validation_sources.0.path={world}/validation/*.tar", "sample.steps=1", "--judge", "1")
    assert globbed["validation"] == report["validation"] and "scores" in globbed
    assert "scores" not in evaluated("--judge", "0")
    capsys.readouterr()
    assert main(["evaluate", str(run_dir), "--judge", "2"]) == 0
    out = capsys.readouterr().out
    assert "color_accuracy" in out and "painting: shares that are right" in out
    assert main(["evaluate", str(run_dir), "data.image.patch_size=4"]) == 2
    assert "was trained with 8" in capsys.readouterr().err
    assert main(["evaluate", str(run_dir), "data.validation_sources=[]"]) == 2
    assert "validation_sources" in capsys.readouterr().err


def test_an_exported_folder_serves_like_its_run(run_dir, tmp_path, capsys) -> None:
    out = str(tmp_path / "model")
    assert main(["checkpoint", "export", str(run_dir), "--out", out]) == 0
    assert f'fusiontrain.load("{out}")' in capsys.readouterr().out
    pictures = []
    for source in (str(run_dir), out):
        folder = tmp_path / Path(source).name
        sampled(capsys, source, "--prompt", "a red circle", "--out", str(folder / "samples"), "--steps", "2")
        pictures.append(np.asarray(Image.open(folder / "samples" / "000.png")))
    assert np.array_equal(*pictures)
    reports = []
    for source in (str(run_dir), out):
        assert main(["evaluate", source, "--judge", "1", "--json"]) == 0
        reports.append(json.loads(capsys.readouterr().out))
    assert reports[1]["checkpoint"] == out and reports[0]["validation"] == reports[1]["validation"] and reports[0]["scores"] == reports[1]["scores"]
