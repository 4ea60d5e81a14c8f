"""Checks that need more than one section, each against a configuration that is right but for one thing."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusiontrain.config.load import load
from fusiontrain.config.validate import cross_section_problems, file_problems, image_tokens
from fusiontrain.testing.configs import tiny_config
from fusiontrain.utils.errors import UserError

RIGHT = """
model: {recipe: transfusion, vocab_size: 300, dim: 32, num_layers: 1, num_heads: 4, ffn_dim: 64}
data:
  tokenizer: {path: bytes}
  image: {size: 16, patch_size: 4}
  sources: [{path: a.tar}]
  sequence_length: 64
train: {steps: 10, global_batch_sequences: 12}
optimizer: {warmup_steps: 1}
sample: {prompts: [a circle]}
"""
DENSE, CODES = "model.recipe=dense", "data.image={representation: codes, codebook_size: 9}"
SPEECH = ("data.speech.num_units=9", "data.tokenizer.begin_speech_token=a", "data.tokenizer.end_speech_token=b")
BASE = "model={recipe: lmfusion, base: llama}"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "x.yaml"
    file.write_text(RIGHT)
    return file


@pytest.mark.parametrize(
    ("overrides", "key", "word"),
    [
        (["model={recipe: lmfusion}"], "model.base", "give its Hugging Face folder"),
        ([BASE, "model.dim=32", "model.norm_eps=1e-6"], "model.dim", "set it to null"),
        ([BASE, "model.tie_embeddings=false"], "model.tie_embeddings", "set it to null"),
        (["model.ffn_dim=null"], "model.ffn_dim", "is not set"),
        (["data.tokenizer.path=null"], "data.tokenizer.path", "no model.base"),
        (["model.num_heads=5"], "model.dim", "no multiple of model.num_heads=5"),
        (["model.num_kv_heads=3"], "model.num_kv_heads", "does not divide"),
        (["model.head_dim=7"], "model.head_dim", "odd"),
        (["model.recipe=dense"], "data.modalities", "the dense recipe needs ['text']"),
        (["data.modalities=[text]"], "data.modalities", "the transfusion recipe needs ['text', 'image']"),
        (["data.image.size=18"], "data.image.size", "no multiple of data.image.patch_size=4"),
        (["data.image.resize=native", "data.image.min_tokens=40", "data.image.max_tokens=32"], "data.image.min_tokens", "max_tokens=32"),
        (["data.image.resize=native", "data.image.min_tokens=4", "data.image.max_tokens=15"], "data.image.size", "16 patches"),
        (["data.image.resize=native", "data.image.min_tokens=4", "data.image.max_tokens=61"], "data.sequence_length", "61 patches"),
        (["data.image.representation=codes", "data.image.codebook_size=9"], "data.image.representation", "transfusion needs pixels or latents"),
        ([DENSE, "data.image.representation=codes"], "data.image.codebook_size", "is not set"),
        ([DENSE, CODES, "data.modalities=[text]"], "data.modalities", "needs ['text', 'image']"),
        (["data.image.channels=4"], "data.image.channels", "pixels have 3"),
        (["data.sequence_length=19"], "data.sequence_length", "16 patches"),
        (["model.image.unet_channels=12"], "model.image.unet_channels", "no multiple of 8"),
        (["objective.text_weight=0", "objective.image_weight=0"], "objective", "nothing to learn"),
        (["train.micro_batch_sequences=5"], "train.global_batch_sequences", "train.micro_batch_sequences=5"),
        (["parallel.dp_replicate=5"], "train.global_batch_sequences", "parallel.dp_replicate=5"),
        (["parallel.dp_shard=4", "train.micro_batch_sequences=2"], "train.global_batch_sequences", "2 x parallel.dp_shard=4"),
        (["parallel.dp_shard=0"], "parallel.dp_shard", "or -1"),
        (["parallel.dp_replicate=-2"], "parallel.dp_replicate", "or -1"),
        (["parallel.dp_replicate=-1"], "parallel.dp_replicate", "only one of them"),
        (["parallel.reshard_after_forward=1"], "parallel.reshard_after_forward", "a number >= 2"),
        (["parallel.dp_shard=4", "parallel.reshard_after_forward=3"], "parallel.reshard_after_forward", "divides parallel.dp_shard"),
        (["optimizer.warmup_steps=11"], "optimizer.warmup_steps", "train.steps=10"),
        (["optimizer.final_learning_rate=1"], "optimizer.final_learning_rate", "above"),
        (["optimizer.text_learning_rate_ratio=0"], "optimizer.text_learning_rate_ratio", "is model.freeze_text=true"),
        (["optimizer.text_learning_rate_ratio=0.1"], "optimizer.text_learning_rate_ratio", "only the lmfusion recipe"),
        ([BASE, "optimizer.text_learning_rate_ratio=0.1"], "optimizer.text_learning_rate_ratio", "set model.freeze_text=false"),
        (["objective.image=flow_matching", "objective.prediction=v"], "objective.prediction", "the velocity in any case"),
        (["model.separation=shallow"], "model.separation", "only the lmfusion recipe has a use for; set it to deep"),
        (["model.untied=[ffn]"], "model.untied", "only the mot recipe has a use for; set it to [ffn, qkv, o, norms]"),
        (["model.merged=[text, image]"], "model.merged", "only the mot recipe has a use for; set it to []"),
        (["model.recipe=mot", "model.untied=[ffn, ffn]"], "model.untied", "name each part once"),
        ([DENSE, CODES, "data.image.codebook_size=9", "data.sequence_length=19"], "data.sequence_length", "16384 codes (data.image.size and patch_size)"),
        ([DENSE, CODES, "data.image.size=16", "data.image.patch_size=5"], "data.image.size", "no multiple of data.image.patch_size=5"),
        ([DENSE, "data.modalities=[text]", "objective.text_weight=0"], "objective", "text_weight is 0, so there is nothing to learn"),
        ([DENSE, CODES, "data.image.codebook_size=9", "objective.text_weight=0", "objective.image_weight=0"], "objective", "are all 0"),
        (["objective.time_shift=3"], "objective.time_shift", "only flow_matching has times to shift"),
        (["sample.ddim_eta=1"], "sample.ddim_eta", "set it to 0, or the sampler to ddim"),
        (["sample.prompts=[a, ' ']"], "sample.prompts.1", "is empty"),
        (["sample.prompts=[a]", "data.image.representation=latents", "data.image.channels=4"], "sample.prompts", "latents are no pictures"),
        ([DENSE, CODES, "data.image.codebook_size=9", "sample.prompts=[a]"], "sample.prompts", "codes are no pictures"),
        ([DENSE, "data.modalities=[text]", "sample.prompts=[a]"], "sample.prompts", "the run has no pictures"),
        (["sample.steps=1001"], "sample.steps", "objective.num_timesteps=1000"),
        (["data.condition_dropout=0"], "sample.guidance", "without text"),
    ],
)
def test_one_wrong_thing(path: Path, overrides: list[str], key: str, word: str) -> None:
    load(path)
    with pytest.raises(UserError) as caught:
        load(path, overrides)
    found = [line for line in str(caught.value).splitlines() if f": {key}: " in line and word in line]
    assert len(found) == 1, str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        [BASE, "data.tokenizer.path=null"],
        ["data.sequence_length=20"],
        ["data.image.resize=native", "data.image.min_tokens=4", "data.image.max_tokens=60"],
        ["data.image.representation=latents", "data.image.channels=4", "data.sequence_length=8", "sample.prompts=[]"],
        ["parallel.dp_shard=3", "parallel.dp_replicate=2", "train.micro_batch_sequences=2"],
        ["data.condition_dropout=0", "sample.guidance=1"],
        ["data.condition_dropout=0", "sample.prompts=[]"],
        ["objective.image=flow_matching", "sample.steps=2000"],
        ["optimizer.warmup_steps=10"],
        [BASE, "model.freeze_text=false", "optimizer.text_learning_rate_ratio=0.1"],
        ["objective.prediction=v"],
        ["model.num_heads=5", "model.head_dim=8"],
        ["model.recipe=mot", "data.modalities=[text, speech]", "data.image={representation: codes}", *SPEECH, "sample.prompts=[]"],
        ["model.recipe=dense", "data.modalities=[text]", "data.image.size=17", "sample.prompts=[]"],
        [DENSE, CODES, "data.image.size=16", "data.image.patch_size=4", "objective.image_weight=0", "sample.steps=2000", "sample.prompts=[]"],
    ],
)
def test_right_things_are_let_through(path: Path, overrides: list[str]) -> None:
    config = load(path, overrides)
    assert load(path, []) != config, "the overrides say nothing that the file does not say already"


def test_image_tokens_are_known_for_pixels_only(path: Path) -> None:
    assert image_tokens(load(path)) == 16
    assert image_tokens(load(path, ["data.image.representation=latents", "sample.prompts=[]"])) is None


def test_files_are_looked_for_only_when_asked(path: Path, tmp_path: Path) -> None:
    names = {"base": tmp_path / "llama", "tokenizer": tmp_path / "tokenizer.json", "vae": tmp_path / "vae", "shards": tmp_path / "shards"}
    config = load(
        path,
        [
            f"model={{recipe: lmfusion, base: {names['base']}}}",
            f"model.image.vae={names['vae']}",
            f"data.tokenizer.path={names['tokenizer']}",
            f"data.sources=[{{path: {names['shards']}}}, {{path: '{names['shards']}/s-{{00..01}}.tar'}}]",
            f"data.validation_sources=[{{path: '{names['shards']}/*.tar'}}]",
        ],
    )
    wanted = ["model.base", "data.tokenizer.path", "model.image.vae", "data.sources.0.path", "data.sources.1.path", "data.validation_sources.0.path"]
    assert [problem.key for problem in file_problems(config)] == wanted
    for folder in ("base", "vae", "shards"):
        names[folder].mkdir()
    for file in (names["base"] / "config.json", names["vae"] / "config.json", names["tokenizer"], names["shards"] / "s-00.tar"):
        file.touch()
    assert file_problems(config) == []


def test_what_deepspeed_cannot_do_is_said_and_what_it_can_is_not():
    for stage in (1, 2, 3):
        engine = {"parallel.engine": "deepspeed", "parallel.zero_stage": stage}
        assert cross_section_problems(tiny_config(engine)) == []
        assert {problem.key for problem in cross_section_problems(tiny_config({**engine, "parallel.dp_replicate": 2}))} == {"parallel.dp_replicate"}
        problems = cross_section_problems(tiny_config({**engine, "parallel.precision": "bfloat16"}))
        assert {problem.key for problem in problems} == ({"parallel.zero_stage"} if stage == 1 else set())
    assert cross_section_problems(tiny_config({"parallel.dp_replicate": 2, "parallel.precision": "bfloat16", "parallel.zero_stage": 1})) == []
