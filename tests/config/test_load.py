"""Configuration files: overrides, the way back to YAML, and the sentences for everything that can be wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusiontrain.config.explain import all_keys
from fusiontrain.config.load import load, to_yaml
from fusiontrain.config.schema import Config, DataConfig, ImageDataConfig, ObjectiveConfig, OptimizerConfig, SourceConfig
from fusiontrain.utils.errors import UserError

TEXT = """
model: {recipe: dense, vocab_size: 300, dim: 32, num_layers: 1, num_heads: 4, ffn_dim: 64}
data:
  modalities: [text]
  tokenizer: {path: bytes}
  sources: [{path: a.tar}, {path: "b-{000..003}.tar", weight: 2}]
train: {steps: 10, global_batch_sequences: 4}
optimizer: {warmup_steps: 1}
"""
PICTURES = ("model.recipe=transfusion", "data.modalities=[text, image]", "data.image.size=32")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "x.yaml"
    file.write_text(TEXT)
    return file


def lines_of(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        load(path, overrides)
    return [line.replace(str(path), "FILE") for line in str(caught.value).splitlines()]


def test_overrides_reach_values_lists_and_whole_sections(path: Path) -> None:
    config = load(
        path,
        [
            *PICTURES, "train.steps=50", "data.sources.1.weight=3", "sample.prompts=[a b, '7']", "optimizer.learning_rate=1e-3",
            "train.micro_batch_sequences=null",
        ],
    )
    assert config.train.steps == 50
    assert [source.weight for source in config.data.sources] == [1.0, 3.0]
    assert config.sample.prompts == ("a b", "7")
    assert config.optimizer.learning_rate == 1e-3
    replaced = load(path, ["data.sources=[{path: c.tar}]"])
    assert [source.path for source in replaced.data.sources] == ["c.tar"]


def test_a_value_may_name_another_and_the_environment(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUN_NAME", "seven")
    assert load(path, ["run.dir=runs/${oc.env:RUN_NAME}-${train.steps}"]).run.dir == "runs/seven-10"


@settings(max_examples=25)
@given(
    prompt=st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]))
    | st.sampled_from(["1e3", "null", "${a}", "\\${a}", "${", "a\\", "yes", "'", "1_000"])
)
def test_the_resolved_yaml_loads_back_equal(prompt: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("yaml") / "x.yaml"
    file.write_text(TEXT)
    config = load(file, PICTURES)
    config = config.model_copy(update={"sample": config.sample.model_copy(update={"prompts": ("before " + prompt,)})})
    file.write_text(to_yaml(config), encoding="utf-8")
    assert load(file) == config


def test_everything_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("""
model: {recipe: lmfusoin, vocab_size: "12"}
data:
  sources: [{path: 3, wieght: 2}]
  modalities: [text, imag]
  sequence_length: true
  image: 5
train: {stepz: 4, learning_rate: 3, global_batch_sequences: 2.5}
""")
    assert lines_of(file) == [
        "FILE: model.recipe: given the text 'lmfusoin', expected one of dense, transfusion, lmfusion, mot, chameleon; did you mean lmfusion?",
        "FILE: model.vocab_size: given the text '12', expected a whole number >= 8 or null",
        "FILE: data.sources.0.path: given 3, expected a text",
        "FILE: data.sources.0.wieght: unknown key; did you mean data.sources.0.weight?",
        "FILE: data.modalities.1: given the text 'imag', expected one of text, image, speech; did you mean image?",
        "FILE: data.image: given 5, expected a section with the keys decoder, resize, size, min_tokens, max_tokens, patch_size, representation, "
        "codebook_size, channels, attention, image_first_noise_cap",
        "FILE: data.sequence_length: given true, expected a whole number >= 8",
        "FILE: train.steps: is missing; expected a whole number >= 1",
        "FILE: train.global_batch_sequences: given 2.5, expected a whole number >= 1",
        "FILE: train.stepz: unknown key; did you mean train.steps?",
        "FILE: train.learning_rate: unknown key; did you mean optimizer.learning_rate?",
    ]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.stepz=3", "command line: train.stepz: unknown key; did you mean train.steps?"),
        ("trian.steps=3", "command line: trian: unknown key; did you mean train?"),
        ("train.steps=many", "command line: train.steps: given the text 'many', expected a whole number >= 1"),
        ("train.steps=0", "command line: train.steps: given 0, expected a whole number >= 1"),
        ("train=3", "command line: train: given 3, expected a section with the keys steps,"),
        ("data.sources=[]", "command line: data.sources: given the list [], expected a list, each entry a section"),
        ("data.sources.5.weight=1", "command line: 'data.sources.5.weight=1' cannot be applied: the list has no such entry"),
        ("data.sources.0.wight=1", "command line: data.sources.0.wight: unknown key; did you mean data.sources.0.weight?"),
        ("demo.dri=x", "command line: demo.dri: unknown key; did you mean demo.dir?"),
        (
            "parallel.reshard_after_forward=nevr",
            "command line: parallel.reshard_after_forward: given the text 'nevr', expected one of default, always, never or a whole number; "
            "did you mean never?",
        ),
        (
            "data.sources=[{path: d, weight_schedule: [[5, .inf]]}]",
            "command line: data.sources.0.weight_schedule.0.1: given inf, expected a number that is finite",
        ),
        ("train.steps", "command line: 'train.steps' is not an override; write it as section.key=value"),
        ("run.dir=${nothing.here}", "command line: run.dir: Interpolation key 'nothing.here' not found"),
        ("run.dir=[", "command line: 'run.dir=[' cannot be applied"),
    ],
)
def test_wrong_overrides_are_blamed_on_the_command_line(path: Path, override: str, sentence: str) -> None:
    assert any(line.startswith(sentence) for line in lines_of(path, override)), lines_of(path, override)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "FILE: is empty; expected sections"),
        ("# only a comment", "FILE: is empty; expected sections"),
        ("3", "FILE: holds a single value; expected sections"),
        ("- a", "FILE: holds a list; expected sections"),
        ("a: 1\nb: [", "FILE:3: not valid YAML"),
        ("a: 1\na: 2", "FILE:2: not valid YAML: found duplicate key a"),
        ("run: {dir: '???'}", "FILE: run.dir: Missing mandatory value"),
        ("run: {dir: '${'}", "FILE: "),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, content: str, sentence: str) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(content)
    (line,) = lines_of(file)
    assert line.startswith(sentence)


def test_a_file_that_is_not_there_a_folder_and_a_binary(tmp_path: Path) -> None:
    assert lines_of(tmp_path / "none.yaml")[0].endswith("no such file; give the YAML file of a configuration")
    assert lines_of(tmp_path)[0].endswith("is a folder; give the YAML file of a configuration")
    (tmp_path / "x.yaml").write_bytes(b"\xff\x00\x01")
    assert lines_of(tmp_path / "x.yaml")[0].startswith("FILE: not valid YAML")


def test_no_key_of_the_schema_is_hidden_from_suggestions() -> None:
    keys = set(all_keys())
    assert {"data.tokenizer.path", "model.image.patcher", "demo.dir", "train"} <= keys
    assert {key.split(".")[0] for key in keys} == set(Config.model_fields)


def test_defaults_are_those_of_the_papers():
    """LMFusion (arXiv 2412.15188) and Transfusion (2408.11039): the image loss weighs 5, noise levels up to 0.5 for images that come first, 1,000
    steps of the cosine schedule, AdamW with betas 0.9 and 0.95 and clipping at 1, and a caption dropped in a tenth of documents."""
    assert (ObjectiveConfig().image_weight, ObjectiveConfig().text_weight) == (5.0, 1.0)
    assert (ObjectiveConfig().image, ObjectiveConfig().num_timesteps) == ("ddpm", 1000)
    assert ImageDataConfig().image_first_noise_cap == 0.5
    assert (OptimizerConfig().beta1, OptimizerConfig().beta2, OptimizerConfig().clip_norm) == (0.9, 0.95, 1.0)
    assert DataConfig(sources=(SourceConfig(path="x"),)).condition_dropout == 0.1
    assert SourceConfig(path="x").image_first_probability == 0.2


@pytest.mark.parametrize("key", ["optimizer.learning_rate", "optimizer.clip_norm", "objective.image_weight", "data.sources.0.weight", "sample.guidance"])
def test_numbers_are_finite(path: Path, key: str) -> None:
    with pytest.raises(UserError, match=key):
        load(path, [f"{key}=.inf"])
