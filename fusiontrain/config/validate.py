"""Checks that need more than one section of a configuration, all reported at once.

`cross_section_problems` looks at the values alone. `file_problems` looks at the disk, so it is for the moment before a run, when the
files must be there; a configuration can be checked without it on a machine that has none of them.
"""

from __future__ import annotations

import glob
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from fusiontrain.config.schema import Config, ModelConfig, SourceConfig

SHAPE_FIELDS = (
    "vocab_size", "dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_dim", "rope_theta", "norm_eps", "tie_embeddings",
    "norm_position", "qk_norm",
)  # fmt: skip
"""What a base model's config.json says, so what must stay unset beside `model.base`."""

NEEDED_SHAPE_FIELDS = ("vocab_size", "dim", "num_layers", "num_heads", "ffn_dim")
PIXEL_CHANNELS = 3
MARKER_TOKENS = 4
"""Begin and end of text, begin and end of image: what a document with one picture needs besides its patches."""

BUILT_IN_TOKENIZER = "bytes"


class Problem(NamedTuple):
    """One thing that is wrong: the dotted key and a sentence that says what was given, what was expected and what to do."""

    key: str
    sentence: str

    def __str__(self) -> str:
        return f"{self.key}: {self.sentence}"


def cross_section_problems(config: Config) -> list[Problem]:
    """Everything that is wrong with the values together; needs no disk."""
    checks = (
        _base, _shape, _modalities, _recipe, _speech, _codes, _images, _objective, _formats, _stream, _data_order, _mesh, _deepspeed, _batch, _train,
        _optimizer, _sampling,
    )  # fmt: skip
    return [problem for check in checks for problem in check(config)]


def file_problems(config: Config) -> list[Problem]:
    """Everything that the configuration names and the disk lacks."""
    return list(_missing_files(config))


def uses_images(config: Config) -> bool:
    """Whether pictures reach the model as patches; their codes would be tokens like any other."""
    return "image" in config.data.modalities and config.data.image.representation != "codes"


def has_frozen_prefix(config: Config) -> bool:
    """Whether text that no image of its document comes before runs forward only: nothing that trains comes before it."""
    return config.parallel.frozen_prefix and config.model.recipe == "lmfusion" and config.model.freeze_text and uses_images(config)


def image_tokens(config: Config) -> int | None:
    """Patches of one picture, the most that it may have, or None where they depend on the files (latents made ahead of time)."""
    image = config.data.image
    if image.representation == "pixels" and image.resize == "native":
        return image.max_tokens
    return (image.size // image.patch_size) ** 2 if image.representation == "pixels" else None


def _base(config: Config) -> Iterator[Problem]:
    model = config.model
    if model.recipe == "lmfusion" and model.base is None:
        yield Problem("model.base", "is not set, but the lmfusion recipe starts from a Llama; give its Hugging Face folder")
    if model.base is None and config.data.tokenizer.path is None:
        yield Problem("data.tokenizer.path", f"is not set and there is no model.base to take it from; give a folder or '{BUILT_IN_TOKENIZER}'")


def _shape(config: Config) -> Iterator[Problem]:
    model = config.model
    if model.base is not None:
        for name in SHAPE_FIELDS:
            if getattr(model, name) is not None:
                yield Problem(f"model.{name}", "is given, but comes from the config.json in model.base; set it to null")
        return
    for name in NEEDED_SHAPE_FIELDS if model.recipe != "lmfusion" else ():
        if getattr(model, name) is None:
            yield Problem(f"model.{name}", "is not set; a model without model.base needs it")
    if model.dim and model.num_heads and model.head_dim is None and model.dim % model.num_heads:
        yield Problem("model.dim", f"{model.dim} is no multiple of model.num_heads={model.num_heads}; change one or give model.head_dim")
    if model.num_heads and model.num_kv_heads and model.num_heads % model.num_kv_heads:
        yield Problem("model.num_kv_heads", f"{model.num_kv_heads} does not divide model.num_heads={model.num_heads}")
    head_dim = model.head_dim or (model.dim or 0) // (model.num_heads or 1)
    if head_dim % 2:
        yield Problem("model.head_dim", f"{head_dim} is odd; rotary positions turn pairs of features, so it must be even")


def _modalities(config: Config) -> Iterator[Problem]:
    modalities, recipe = tuple(config.data.modalities), config.model.recipe
    wanted = ("text",) if recipe == "dense" and config.data.image.representation != "codes" else ("text", "image")
    others = {"mot": (("text", "image", "speech"), ("text", "speech")), "chameleon": (("text", "image", "speech"),)}
    choices = (wanted, *others.get(recipe, ()))
    if modalities not in choices:
        yield Problem("data.modalities", f"is {list(modalities)}, but the {recipe} recipe needs {' or '.join(str(list(choice)) for choice in choices)}")


OF_ONE_RECIPE = {"separation": "lmfusion", "untied": "mot", "merged": "mot"}
"""Settings of the model section that say what is per modality, and the recipe that has the choice."""


def _recipe(config: Config) -> Iterator[Problem]:
    """An ablation that would change nothing is refused."""
    model, modalities = config.model, config.data.modalities
    for name, recipe in OF_ONE_RECIPE.items():
        value, default = getattr(model, name), ModelConfig.model_fields[name].default
        if value != default and model.recipe != recipe:
            yield Problem(f"model.{name}", f"is {_words(value)}, which only the {recipe} recipe has a use for; set it to {_words(default)}")
    merged, untied = model.merged, model.untied
    if model.recipe == "mot" and merged and (len(set(merged)) != len(merged) or len(merged) < 2 or not set(merged) <= set(modalities)):
        yield Problem("model.merged", f"is {list(merged)}, expected two or more of data.modalities={list(modalities)}, or []")
    if len(set(untied)) != len(untied):
        yield Problem("model.untied", f"is {_words(untied)}; name each part once")


def _words(value: object) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else str(value)


def _speech(config: Config) -> Iterator[Problem]:
    if "speech" not in config.data.modalities:
        return
    if config.data.speech.num_units is None:
        yield Problem("data.speech.num_units", "is not set; with speech it is one more than the largest unit")
    tokens = (config.data.tokenizer.begin_speech_token, config.data.tokenizer.end_speech_token)
    if None in tokens:
        yield Problem("data.tokenizer.begin_speech_token", "is not set, or end_speech_token is not; speech stands between the two: name tokens")
    if config.data.mode == "stream":
        yield Problem("data.mode", "is stream, which reads no speech; set it to planned")


def _codes(config: Config) -> Iterator[Problem]:
    image = config.data.image
    if image.representation != "codes":
        if config.model.recipe == "chameleon":
            yield Problem("data.image.representation", f"is {image.representation}, but the chameleon recipe learns codes; set it to codes")
        return
    key = "data.image.representation"
    if config.model.recipe not in ("dense", "mot", "chameleon"):
        yield Problem(key, f"codes are tokens, which the dense, mot and chameleon recipes learn; {config.model.recipe} needs pixels or latents")
    if "image" not in config.data.modalities:
        return
    if image.codebook_size is None:
        yield Problem("data.image.codebook_size", "is not set; with codes it is one more than the largest of them")
    if image.size % image.patch_size:
        yield Problem("data.image.size", f"{image.size} is no multiple of data.image.patch_size={image.patch_size}, the side of what one code stands for")
    length, painted = config.data.sequence_length, (image.size // image.patch_size) ** 2
    if length < painted + MARKER_TOKENS:
        yield Problem(
            "data.sequence_length", f"{length} does not hold one picture of {painted} codes (data.image.size and patch_size) and its {MARKER_TOKENS} "
            "marker tokens; raise it, or correct the two"
        )  # fmt: skip


def _images(config: Config) -> Iterator[Problem]:
    if not uses_images(config):
        return
    image, length = config.data.image, config.data.sequence_length
    if image.size % image.patch_size:
        yield Problem("data.image.size", f"{image.size} is no multiple of data.image.patch_size={image.patch_size}")
    if image.representation == "pixels" and image.channels != PIXEL_CHANNELS:
        yield Problem("data.image.channels", f"is {image.channels}, but pixels have {PIXEL_CHANNELS}; use latents or set it to {PIXEL_CHANNELS}")
    if image.resize == "native" and image.min_tokens > image.max_tokens:
        yield Problem("data.image.min_tokens", f"{image.min_tokens} is more than data.image.max_tokens={image.max_tokens}")
    painted = (image.size // image.patch_size) ** 2
    if image.representation == "pixels" and image.resize == "native" and painted > image.max_tokens:
        yield Problem(
            "data.image.size", f"{image.size}: a square of that side, which sampling paints, has {painted} patches, more than "
            f"data.image.max_tokens={image.max_tokens}; lower the size"
        )  # fmt: skip
    tokens = image_tokens(config)
    if tokens is not None and length < tokens + MARKER_TOKENS:
        yield Problem(
            "data.sequence_length", f"{length} does not hold one picture of {tokens} patches and its {MARKER_TOKENS} marker tokens; "
            "raise it or data.image.patch_size"
        )  # fmt: skip
    patcher = config.model.image
    if patcher.patcher == "unet" and patcher.unet_channels % 8:
        yield Problem("model.image.unet_channels", f"{patcher.unet_channels} is no multiple of 8, the number of its normalisation groups")


def _objective(config: Config) -> Iterator[Problem]:
    objective, names = config.objective, [f"{name}_weight" for name in config.data.modalities]
    if not any(getattr(objective, name) for name in names):
        yield Problem("objective", f"{' and '.join(names)} {'is' if len(names) == 1 else 'are all'} 0, so there is nothing to learn")
    if not uses_images(config):
        return
    if objective.image != "ddpm" and objective.prediction != "eps":
        yield Problem("objective.prediction", f"is {objective.prediction}, but flow_matching predicts the velocity in any case; set it to eps")
    if objective.image != "flow_matching" and objective.time_shift != 1:
        yield Problem("objective.time_shift", f"is {objective.time_shift:g}, but only flow_matching has times to shift; set it to 1")


def _formats(config: Config) -> Iterator[Problem]:
    for name in ("sources", "validation_sources"):
        for index, source in enumerate(getattr(config.data, name)):
            if source.text_key is not None and source.format == "interleaved":
                yield Problem(f"data.{name}.{index}.text_key", f"is {source.text_key!r}, but an interleaved document's texts are in 'texts'; set it to null")


def _stream(config: Config) -> Iterator[Problem]:
    if config.data.mode != "stream":
        return
    if config.data.from_step:
        yield Problem("data.from_step", "needs a plan to jump in, and data.mode=stream has none; set it to []")
    if config.data.io_mode != "global":
        yield Problem("data.io_mode", "is about the order of a plan, and data.mode=stream has none; set it to global")
    if config.data.mix_by != "documents":
        yield Problem("data.mix_by", "tokens needs the lengths of all documents, which data.mode=stream does not know; set it to documents")
    for index, source in enumerate(config.data.sources):
        if source.max_epochs is not None or source.weight_schedule:
            yield Problem(f"data.sources.{index}", "max_epochs and weight_schedule need a plan, and data.mode=stream has none; set them to null and []")


def _data_order(config: Config) -> Iterator[Problem]:
    for index, source in enumerate(config.data.sources):
        schedule = source.weight_schedule
        if not _rises(schedule) or any(weight < 0 for _, weight in schedule):
            yield Problem(
                f"data.sources.{index}.weight_schedule",
                f"{[list(entry) for entry in schedule]}: expected [[document, weight], ...] with rising documents and weights >= 0",
            )
    if not _rises(config.data.from_step) or any(target < 0 for _, target in config.data.from_step):
        yield Problem(
            "data.from_step",
            f"{[list(entry) for entry in config.data.from_step]}: expected [[step, data step], ...] with rising steps, none below 0",
        )


def _rises(entries: Sequence[tuple[int, float]]) -> bool:
    """Whether the first numbers of the entries rise from 0 or more."""
    firsts = [-1, *(first for first, _ in entries)]
    return all(before < after for before, after in itertools.pairwise(firsts))


def _mesh(config: Config) -> Iterator[Problem]:
    parallel = config.parallel
    for name in ("dp_replicate", "dp_shard"):
        size = getattr(parallel, name)
        if size < 1 and size != -1:
            yield Problem(f"parallel.{name}", f"given {size}, expected a whole number >= 1, or -1 for all remaining ranks")
    if parallel.dp_replicate == parallel.dp_shard == -1:
        yield Problem("parallel.dp_replicate", "is -1, and so is parallel.dp_shard; only one of them can be all remaining ranks")
    near = parallel.reshard_after_forward
    if isinstance(near, int) and (near < 2 or (parallel.dp_shard > 0 and (near >= parallel.dp_shard or parallel.dp_shard % near))):
        yield Problem("parallel.reshard_after_forward", f"given {near}, expected a number >= 2 that divides parallel.dp_shard and is smaller")


def _deepspeed(config: Config) -> Iterator[Problem]:
    """What the other engine cannot do."""
    parallel = config.parallel
    if parallel.engine != "deepspeed":
        return
    if parallel.dp_replicate != 1:
        yield Problem("parallel.dp_replicate", f"is {parallel.dp_replicate}, but ZeRO spreads over all ranks; set it to 1, or parallel.engine to fsdp2")
    if parallel.dp_shard == 1:
        yield Problem("parallel.dp_shard", "is 1, but ZeRO spreads over all ranks; set it to -1, or parallel.engine to fsdp2")
    if parallel.frozen == "replicate" and parallel.zero_stage == 3:
        yield Problem("parallel.frozen", "is replicate, but ZeRO stage 3 shards all weights; set it to shard, or parallel.zero_stage to 2")
    if parallel.reshard_after_forward != "default" or parallel.cpu_offload or parallel.forward_prefetch or parallel.backward_prefetch != 1:
        yield Problem("parallel", "reshard_after_forward, cpu_offload and prefetching are FSDP2's; leave them at their defaults with engine: deepspeed")
    if config.train.ema_decay is not None:
        yield Problem("train.ema_decay", "needs weights that DeepSpeed keeps to itself; set it to null, or parallel.engine to fsdp2")
    if config.train.spike != "log":
        yield Problem("train.spike", f"is {config.train.spike}, but DeepSpeed updates before anybody can judge the step; set it to log")
    if parallel.precision == "bfloat16" and parallel.zero_stage == 1:
        yield Problem("parallel.zero_stage", "is 1, which DeepSpeed does in another way for bfloat16 that cannot be saved here; set it to 2 or 3")


def _batch(config: Config) -> Iterator[Problem]:
    """What can be said of the batch without the number of ranks, and more where `dp_replicate` and `dp_shard` fix that."""
    train, parallel = config.train, config.parallel
    batch, micro = train.global_batch_sequences, train.micro_batch_sequences or 1
    ranks = max(parallel.dp_replicate, 1) * max(parallel.dp_shard, 1)
    if batch % (ranks * micro) == 0:
        return
    parts = [
        f"{name}={number}"
        for name, number in (
            ("train.micro_batch_sequences", micro),
            ("parallel.dp_replicate", parallel.dp_replicate),
            ("parallel.dp_shard", parallel.dp_shard),
        )
        if number > 1
    ]
    yield Problem("train.global_batch_sequences", f"{batch} is no multiple of {' x '.join(parts)}")


def _train(config: Config) -> Iterator[Problem]:
    ranges = config.train.skip_steps
    if any(first < 1 or last < first for first, last in ranges):
        yield Problem("train.skip_steps", f"{[list(pair) for pair in ranges]}: expected [[first, last], ...] with 1 <= first <= last, as in metrics.jsonl")
    best = config.checkpoint.keep_best
    measured = [f"validation/{name}" for name in config.data.modalities]
    if best is not None and not (best in measured and config.data.validation_sources):
        yield Problem("checkpoint.keep_best", f"{best!r}: expected {' or '.join(measured)}, and data.validation_sources to measure it on")


def _optimizer(config: Config) -> Iterator[Problem]:
    optimizer, steps = config.optimizer, config.train.steps
    ratio, trains_text = optimizer.text_learning_rate_ratio, config.model.recipe == "lmfusion" and not config.model.freeze_text
    if ratio == 0:
        yield Problem("optimizer.text_learning_rate_ratio", "is 0; text that does not learn is model.freeze_text=true, which also spares its gradients")
    elif ratio != 1 and not trains_text:
        why = "the text is frozen (set model.freeze_text=false)" if config.model.recipe == "lmfusion" else "only the lmfusion recipe has two rates"
        yield Problem("optimizer.text_learning_rate_ratio", f"is {ratio:g}, but {why}; set it to 1")
    if optimizer.warmup_steps > steps:
        yield Problem("optimizer.warmup_steps", f"{optimizer.warmup_steps} is more than train.steps={steps}; lower it")
    if optimizer.final_learning_rate > optimizer.learning_rate:
        yield Problem(
            "optimizer.final_learning_rate",
            f"{optimizer.final_learning_rate:g} is above optimizer.learning_rate={optimizer.learning_rate:g}, where the cosine starts",
        )


def _shows_nothing(config: Config) -> str | None:
    """Why a run of such a model has no picture to show while it trains."""
    if "image" not in config.data.modalities:
        return "the run has no pictures (data.modalities)"
    what = config.data.image.representation
    return None if what == "pixels" else f"{what} are no pictures that a run could show"


def _sampling(config: Config) -> Iterator[Problem]:
    sample, objective = config.sample, config.objective
    for index, prompt in enumerate(sample.prompts):
        if not prompt.strip():
            yield Problem(f"sample.prompts.{index}", "is empty; write a prompt or take it out")
    if sample.prompts and (why := _shows_nothing(config)) is not None:
        yield Problem("sample.prompts", f"{why}; set it to [], and ask the trained model with `fusiontrain sample`")
    if not uses_images(config):
        return
    if sample.ddim_eta and sample.sampler != "ddim":
        yield Problem("sample.ddim_eta", f"is {sample.ddim_eta:g}, but sample.sampler={sample.sampler} has no use for it; set it to 0, or the sampler to ddim")
    if objective.image == "ddpm" and sample.steps > objective.num_timesteps:
        yield Problem("sample.steps", f"{sample.steps} is more than objective.num_timesteps={objective.num_timesteps}; lower it")
    if sample.prompts and sample.guidance != 1 and config.data.condition_dropout == 0:
        yield Problem(
            "sample.guidance",
            f"{sample.guidance:g} needs a model that has seen pictures without text, but data.condition_dropout is 0; raise that or set it to 1",
        )


def _missing_files(config: Config) -> Iterator[Problem]:
    base, tokenizer, vae = config.model.base, config.data.tokenizer.path, config.model.image.vae
    if base is not None and not (Path(base) / "config.json").is_file():
        yield Problem("model.base", f"{base} is not a Hugging Face Llama folder: there is no config.json in it")
    if tokenizer not in (None, BUILT_IN_TOKENIZER) and not Path(str(tokenizer)).exists():
        yield Problem("data.tokenizer.path", f"{tokenizer} does not exist; give a folder, a tokenizer.json or '{BUILT_IN_TOKENIZER}'")
    if vae is not None and not (Path(vae) / "config.json").is_file():
        yield Problem("model.image.vae", f"{vae} is not a diffusers AutoencoderKL folder: there is no config.json in it")
    lists = (("data.sources", config.data.sources), ("data.validation_sources", config.data.validation_sources))
    for name, sources in lists:
        for index, source in enumerate(sources):
            if not _found(source):
                yield Problem(f"{name}.{index}.path", f"{source.path} matches no tar file or .jsonl")


def _found(source: SourceConfig) -> bool:
    path = source.path
    if "://" in path or path.startswith("pipe:"):  # not on this disk
        return True
    if Path(path).is_dir():
        return any(any(Path(path).glob(pattern)) for pattern in ("*.tar", "*.jsonl", "*.tar.gz", "*.tgz", "*.jsonl.gz"))
    return bool(glob.glob(re.sub(r"\{[^{}]*\}", "*", path)))  # a brace range as a wildcard: some of it is there
