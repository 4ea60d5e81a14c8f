"""Studies: every one's trainings have a config that stands, and one is carried out, stopped and taken up again."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil

import pytest

from fusiontrain.cli.main import main
from fusiontrain.config.load import load
from fusiontrain.studies.child import find_config, read_metrics
from fusiontrain.studies.report import Made, markdown, shown
from fusiontrain.studies.run import CONFIG, Work
from fusiontrain.studies.study import Expectation, Scale, Study, Variant, judge_expectations
from fusiontrain.studies.tables import SCALES, STUDIES
from fusiontrain.utils.errors import UserError

TINIEST = Scale(
    "tiniest",
    200,
    2,
    (
        *("train.steps=3", "optimizer.warmup_steps=0", "checkpoint.every_steps=1", "checkpoint.keep_last=3", "evaluate.every_steps=3"),
        *("evaluate.batches=1", "sample.steps=2"),
    ),
    ("train.steps=2", "optimizer.warmup_steps=0", "evaluate.batches=1"),
)
STUDY = Study(
    name="a-study",
    title="Two paces",
    source="nowhere",
    variants=(Variant("frozen", ("optimizer.learning_rate=0.001",)), Variant("learning", ("model.freeze_text=false",))),
    columns=("loss/image", "validation/text", "slope/image", "text drift", "step time"),
    expectations=(Expectation("frozen text stays", lambda v: v["frozen"]["text drift"] == 0 != v["learning"]["text drift"]),),
    published_columns=("a figure",),
    published={"frozen": ("12.5",)},
    baseline="frozen",
)


@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES.keys())
@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES.keys())
def test_every_variant_is_a_config_that_stands_and_differs_from_all_others(study, scale, tmp_path):
    place = Work(study, scale, (), tmp_path, 1, 0, print, lambda *_: None)
    configs = [load(find_config(CONFIG), place.settings(variant)) for variant in study.variants]
    assert len({config.model_dump_json() for config in configs}) == len(configs) > 1
    assert set(study.published) <= {variant.name for variant in study.variants}
    assert all(len(figures) == len(study.published_columns) for figures in study.published.values())


REFUSED = {
    "mot-step-matching": ("model.untied=[]", "model.recipe=dense", "model={recipe: mot}", "data.sources.0.path=elsewhere", "data.sources=[]"),
    "transfusion-mask": ("model.recipe=mot", "model.image={patcher: linear}", "data.tokenizer.path=bytes", "model.base=elsewhere", "run.dir=x", "seed=3"),
    "lmfusion-ablation": ("model.freeze_text=false", "optimizer.text_learning_rate_ratio=0.5", "data.validation_sources.0.path=x"),
    "transfusion-patcher": ("model.dim=64", "data.image.representation=latents"),
}


@pytest.mark.parametrize(("table", "override"), [(table, override) for table, overrides in REFUSED.items() for override in overrides])
def test_what_a_table_compares_or_stands_on_is_no_override(table, override, tmp_path, capsys):
    assert main(["reproduce", table, "--out", str(tmp_path / "out"), override]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and f"{override.partition('=')[0]}: cannot be overridden for the table {table}" in error
    assert not (tmp_path / "out").exists(), "nothing was made"


def test_other_keys_are_free(tmp_path):
    free = ("model.dim=32", "train.steps=50", "optimizer.learning_rate=0.01", "data.sources.0.image_first_probability=0.5", "model.untied_not=1")
    work = work_of("mot-step-matching", tmp_path, *free[:-1])
    assert {config.model.dim for config in work.check().values()} == {32}
    with pytest.raises(UserError, match=r"model\.untied_not: unknown key"):
        dataclasses.replace(work, overrides=free).check()


def work_of(table, out, *overrides, seed=0, processes=1):
    return Work(STUDIES[table], SCALES["tiny"], overrides, out, processes, seed, print, lambda *_: None)


def test_a_table_with_overrides_takes_no_other_ones_place(tmp_path):
    plain = work_of("transfusion-mask", tmp_path).folder
    assert plain == tmp_path / "tiny" / "transfusion-mask"
    alike = [
        work_of("transfusion-mask", tmp_path, *overrides).folder
        for overrides in (("a.b=1", "c.d=2"), ("c.d=2", "a.b=1"), ("c.d=3", "a.b=1", "c.d=2"))
    ]
    others = [
        work_of("transfusion-mask", tmp_path, *overrides, seed=seed).folder
        for overrides, seed in ((("a.b=1", "c.d=3"), 0), (("a.b=1", "c.d=2"), 1), ((), 1), (("a.b=1",), 0))
    ]
    assert len(set(alike)) == 1 and len({plain, alike[0], *others}) == 6
    assert all(folder.name.startswith("transfusion-mask-") for folder in (*alike, *others))


@pytest.mark.parametrize(
    ("overrides", "warmup"),
    [((), 30), (("train.steps=20",), 2), (("train.steps=5",), 0), (("train.steps=9000",), 30), (("train.steps=20", "optimizer.warmup_steps=15"), 15)],
)
def test_fewer_steps_need_no_second_override(overrides, warmup, tmp_path):
    assert {config.optimizer.warmup_steps for config in work_of("transfusion-noise-cap", tmp_path, *overrides).check().values()} == {warmup}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train.steps=0"], "train.steps: given 0"),
        (["train.steps=many"], "train.steps: "),
        (["foo.bar=1"], "foo: unknown key"),
        (["model.num_heads=7"], "model.dim: 128 is no multiple of model.num_heads=7"),
        (["train.global_batch_sequences=9", "--processes", "2"], "train.global_batch_sequences=9: must be a multiple"),
        (["--processes", "0"], "--processes 0: must be at least 1"),
        (["--processes=-1"], "--processes -1: must be at least 1"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_made(arguments, sentence, tmp_path, capsys):
    assert main(["reproduce", "transfusion-mask", "--out", str(tmp_path / "out"), *arguments]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and sentence in errors[0]
    assert not (tmp_path / "out").exists()


def test_two_steps_with_pictures_as_codes_and_no_llama(tmp_path):
    """Of a world of its own, beside the one of the other tables."""
    study = dataclasses.replace(STUDIES["mot-chameleon"], variants=STUDIES["mot-chameleon"].variants[-1:])
    said: list[str] = []
    short = dataclasses.replace(TINIEST, overrides=(*TINIEST.overrides, "train.steps=2", "evaluate.every_steps=2"))
    report = Work(study, short, (), tmp_path, 1, 7, said.append, lambda *_: None).run()
    assert report["made"]["seed"] == 7 and report["made"]["world"]["seed"] == 0, "all seeds are trained on one world"
    assert said == ["making a demo world of 200 documents", "mot: training", "measuring"]
    assert sorted(path.name for path in (tmp_path / "tiniest" / "ground-codes").iterdir()) == ["tokenizer.json", "world"]
    values = report["values"]["mot"]
    assert 0 < values["validation/image"] < 10 and 0 < values["validation/text"] < 10 and values["slope/image"] is None
    rows = read_metrics(tmp_path / "tiniest" / "trainings" / report["trainings"]["mot"])
    assert len(rows) == 2 and rows[0]["loss/image"] == pytest.approx(math.log(576), rel=0.2), "a code among all tokens, not yet learnt"


def test_expectations_say_when_they_cannot_tell():
    def image_of(values):
        return values["a"]["x"] < values["b"]["x"]

    study = dataclasses.replace(STUDY, expectations=(Expectation("a < b", image_of),))
    outcomes = [judge_expectations(study, {"a": {"x": 1.0}, "b": {"x": other}})[0][1] for other in (2.0, 0.5, None)]
    assert outcomes == [True, False, None]
    assert judge_expectations(study, {"a": {"x": 1.0}})[0][1] is None


def test_the_table_stands_beside_the_published_figures():
    values = {"frozen": dict.fromkeys(STUDY.columns, 1.25), "learning": dict.fromkeys(STUDY.columns)}
    text = markdown(STUDY, TINIEST, Made((), 0, {"frozen": 1, "learning": 1}, {"seed": 5}), values, [("frozen text stays", False)], 3)
    assert "Made with seed 0, a world of seed 5, 1 process a training, and no overrides." in text
    made = str(Made(("train.steps=50", "model.dim=32"), 3, {"frozen": 2, "learning": 1}, None))
    assert made == "Made with seed 3, 1 or 2 processes a training, and these overrides: `train.steps=50`, `model.dim=32`."
    assert "| frozen | 1.250 | 1.250 | 1.250 | 1.250 | 1.250 | 12.5 |" in text
    assert "| learning | - | - | - | - | - |  |" in text
    assert "| frozen text stays | not seen |" in text
    assert [shown(0.0), shown(1e-9)] == ["0", "0.000"]


def test_a_study_is_carried_out_and_goes_on_where_it_stopped(tmp_path):
    said: list[str] = []
    work = Work(STUDY, TINIEST, (), tmp_path, 1, 0, said.append, lambda *_: None)
    first = dataclasses.replace(work, study=dataclasses.replace(STUDY, name="first", variants=STUDY.variants[:1])).run()
    run = tmp_path / TINIEST.name / "trainings" / first["trainings"]["frozen"]
    shutil.rmtree(run / "checkpoints" / "step-00000003")  # as if it had been cut short
    report = work.run()
    assert report["steps"] == {"frozen": 3, "learning": 3} and report["trainings"]["frozen"] == run.name, "of both studies"
    assert said.count("frozen: training") == 1 and "frozen: training from step 3 on" in said
    values, folder = report["values"], work.folder
    assert values["frozen"]["loss/image"] == first["values"]["frozen"]["loss/image"]
    rows = {name: read_metrics(run.parent / place) for name, place in report["trainings"].items()}
    assert [row["step"] for row in rows["frozen"]] == [1, 2, 3]
    assert values["frozen"]["loss/image"] == rows["frozen"][-1]["loss/image"]
    assert values["frozen"]["text drift"] == 0 and abs(values["learning"]["text drift"]) > 1e-6
    assert values["frozen"]["step time"] == 1.0
    assert report["expectations"] == [{"expected": "frozen text stays", "seen": True}]
    assert json.loads((folder / "table.json").read_text())["values"] == values
    assert (folder / "curves.png").stat().st_size > 10_000
    assert report["made"]["overrides"] == () and report["made"]["seed"] == report["made"]["world"]["seed"] == 0
    assert report["made"]["processes"] == {"frozen": 1, "learning": 1}
    assert "1 process a training, and no overrides." in (folder / "table.md").read_text()
    said.clear()
    assert work.run()["values"] == values
    assert said == ["measuring"], "what is done is not done again"


def test_the_command_names_its_tables_and_refuses_others(capsys):
    assert main(["reproduce", "--json"]) == 0
    assert [row["table"] for row in json.loads(capsys.readouterr().out)["tables"]] == list(STUDIES)
    assert main(["reproduce", "nothing"]) == 2
    assert re.search(r"there is no table 'nothing' to reproduce: choose from lmfusion-ablation", capsys.readouterr().err)
