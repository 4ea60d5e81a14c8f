"""`fusiontrain estimate`: its numbers against the model that would be built, its advice, and its sentences."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fusiontrain.cli.main import main
from fusiontrain.config.load import load
from fusiontrain.data.batch_arrays import patch_dim
from fusiontrain.data.index.cache import prepare_sources
from fusiontrain.data.loader import Loader
from fusiontrain.data.tokenizer import load_tokenizer
from fusiontrain.data.world.make import make_world
from fusiontrain.models.build import build_model
from fusiontrain.models.flops import count_flops, recomputed_flops
from fusiontrain.parallel.apply import parallelize
from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.documents import batch_of, document
from fusiontrain.testing.recipes import make_recipe_world, recipe_config
from fusiontrain.train.estimate.advice import advise
from fusiontrain.train.estimate.estimator import Estimator, Target
from fusiontrain.train.estimate.hardware import DEVICES, Device, Efficiency, step_time
from fusiontrain.train.estimate.report import report
from fusiontrain.train.estimate.traffic import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER, Channel
from fusiontrain.train.estimate.workload import workload
from fusiontrain.utils.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs"
GIB = 2**30


def lmfusion(**overrides):
    return tiny_config({"model.recipe": "lmfusion", "parallel.precision": "bfloat16", **overrides})


def small_gpu(memory_bytes: float) -> Device:
    return Device("toy", {"bfloat16": 1e12, "float32": 1e11}, memory_bytes, 1e12, 1e11, 1e10)


def test_json_of_lmfusion_8b():
    """Shapes and sizes of a model that no test machine could hold, in a process without Triton's interpreter, as a user's is."""
    command = [sys.executable, "-m", "fusiontrain", "estimate", str(CONFIGS / "lmfusion_8b.yaml"), "--nodes", "2", "--no-advice", "--json"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    llama = 128256 * 4096 * 2 + 4096 + 32 * (2 * 4096 + 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    assert found["parameters"]["text"] == {"trainable": 0, "frozen": llama}
    assert found["parameters"]["image"]["frozen"] == 0
    trainable = found["parameters"]["all"]["trainable"]
    categories = found["memory"]["categories"]
    assert categories["optimizer state"] == pytest.approx(8 * trainable / 16, rel=1e-3)
    assert categories["weights"] == pytest.approx((4 * trainable + 2 * llama) / 16, rel=1e-3)
    reduced = sum(t["message_bytes"] for t in found["traffic"] if t["collective"] == REDUCE_SCATTER)
    assert reduced == pytest.approx(4 * trainable, rel=1e-3)
    assert 0 < found["time"]["mfu"] < 0.5
    assert found["memory"]["fits"] is (found["memory"]["peak_bytes"] <= 80e9 * 0.92)


def test_the_table_fits_a_terminal(capsys):
    assert main(["estimate", str(CONFIGS / "debug/transfusion.yaml"), "--gpus-per-node", "2", "--gpu", "a100"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    for section in ("parameters", "step:", "memory of a rank", "traffic", "time of a step", "assumptions"):
        assert any(line.startswith(section) for line in lines), section


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--nodes", "0"], "--nodes 0: must be at least 1"),
        (["--gpus-per-node", "7"], "7 ranks cannot share it evenly"),
        (["--overlap", "2"], "--overlap 2.0: must be above 0 and at most 1"),
        (["--text-tokens", "4096", "--image-tokens", "256"], "must fit data.sequence_length=4096"),
        (["model.base=nowhere"], "model.base=nowhere: not a Hugging Face Llama folder"),
        (["parallel.dp_shard=3"], "parallel.dp_shard=3"),
    ],
    ids=str,
)
def test_one_sentence_for_what_cannot_be(arguments, sentence, capsys):
    assert main(["estimate", str(CONFIGS / "lmfusion_8b.yaml"), *arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("recipe", ["dense", "transfusion", "lmfusion"])
def test_parameters_are_those_of_the_model(recipe):
    modalities = ["text"] if recipe == "dense" else ["text", "image"]
    config = tiny_config({"model.recipe": recipe, "data.modalities": modalities})
    found = Estimator(config, Target(2, DEVICES["cpu"])).parameters
    weights = list(build_model(config).parameters())
    for kind, trains in (("trainable", True), ("frozen", False)):
        assert sum(counts[kind] for counts in found.values()) == sum(w.numel() for w in weights if w.requires_grad is trains)


def test_flops_of_a_step_are_the_counters():
    """Everything that torch's counter counts, for a step of two sequences of text and pictures without padding."""
    config = tiny_config({"data.sequence_length": 48, "data.image.size": 16, "train.global_batch_sequences": 2})
    found = Estimator(config, Target(1, DEVICES["cpu"]), text_tokens=16, image_tokens=32).flops
    model, image = build_model(config), ("image", 4, 4)
    batch = batch_of([document([1] * 7, image, [2], seed=n) for n in range(4)], config, 2)
    counter = FlopCounterMode(display=False)
    with counter:
        sum(term.sum for term in model(batch).values()).backward()
    by_name = {str(op).split(".")[-1]: flops for op, flops in counter.get_flop_counts()["Global"].items()}
    products = ("mm", "addmm", "convolution", "convolution_backward", "linear_cross_entropy")
    assert found["text"] + found["image"] == sum(by_name.get(name, 0) for name in products)
    # Of 24 tokens, 7 text tokens see those before them, 16 patches see the text and each other, and one text token sees all.
    pairs = 4 * (7 * 8 // 2 + 16 * (7 + 16) + 24)
    assert found["attention"] == 2 * 6 * pairs * 4 * 8 * 2


@pytest.mark.parametrize(("mode", "every", "blocks"), [("full", 1, 2), ("full", 2, 1), ("selective", 1, 0)])
def test_recomputation_is_what_the_counter_sees_more(mode, every, blocks):
    """One more forward of the blocks that forget everything; products are kept by those that forget selectively."""
    config = tiny_config({"model.image": {"patcher": "linear"}, "data.sequence_length": 48, "train.global_batch_sequences": 1})
    batch = batch_of([document([1] * 30, ("image", 3, 6), seed=0)], config)
    counts = []
    for settings in ({}, {"activation_checkpointing": mode, "activation_checkpointing_every": every}):
        model = build_model(config)
        parallel = config.parallel.model_copy(update=settings)
        parallelize(model, model.plan(), parallel, None, torch.device("cpu"))
        counter = FlopCounterMode(display=False)
        with counter:
            sum(term.sum for term in model(batch).values()).backward()
        counts.append(sum(flops for op, flops in counter.get_flop_counts()["Global"].items() if str(op).split(".")[-1] in ("mm", "addmm")))
    estimator = Estimator(config.model_copy(update={"parallel": parallel}), Target(1, DEVICES["cpu"]))
    estimator._recomputed = recomputed_flops(model, batch, every)
    billed = estimator.predict(estimator.config).recomputed
    attention = blocks * count_flops(model, batch)["attention"] // 3 // 2  # a forward is two of the six products, and there are two blocks
    # The last product of a block is not needed by anybody's backward, so checkpointing stops before it.
    last = 2 * 48 * blocks * 32 * 48
    assert billed - attention - (counts[1] - counts[0]) in (0, last)
    assert (counts[1] > counts[0]) is (blocks > 0)


def test_what_is_recomputed_is_not_kept():
    """Memory of the settings of checkpointing, from the dearest to the cheapest; FLOPs the other way round."""
    order = [("none", 1), ("selective", 1), ("full", 2), ("full", 1)]
    found = []
    for mode, every in order:
        overrides = {"parallel.activation_checkpointing": mode, "parallel.activation_checkpointing_every": every}
        estimator = Estimator(lmfusion(**{"data.sequence_length": 512, "model.num_layers": 4, **overrides}), Target(2, DEVICES["cpu"]))
        found.append(estimator.predict(estimator.config))
    none, selective, half, full = found
    assert none.memory > selective.memory > full.memory and none.memory > half.memory > full.memory
    assert none.recomputed == selective.recomputed == 0 and full.recomputed == 2 * half.recomputed > 0


def test_weights_may_be_sharded_anew_over_a_few_ranks():
    """Then the second gathering of a block, for its backward, is among those."""
    target = Target(8, DEVICES["h100"], 2)
    traffic = {}
    for policy in ("default", 2):
        estimator = Estimator(lmfusion(**{"train.global_batch_sequences": 8, "parallel.reshard_after_forward": policy}), target)
        traffic[policy] = {(c.collective, len(c.ranks)): n for c, n in estimator.predict(estimator.config).simulated.calls.items()}
    assert set(traffic["default"]) == {(ALL_GATHER, 8), (REDUCE_SCATTER, 8), (ALL_REDUCE, 8)}
    blocks = tiny_config().model.num_layers
    assert traffic[2][ALL_GATHER, 2] == blocks and traffic["default"][ALL_GATHER, 8] == traffic[2][ALL_GATHER, 8] + blocks


def test_a_frozen_prefix_saves_its_backward():
    settings = {"data.sequence_length": 48, "data.image.size": 16, "train.global_batch_sequences": 2}
    found = {}
    for prefix in (True, False):
        estimator = Estimator(lmfusion(**{**settings, "parallel.frozen_prefix": prefix}), Target(1, small_gpu(1e12)))
        found[prefix] = estimator, estimator.predict(estimator.config)
    (with_prefix, less), (without, more) = found[True], found[False]
    assert without.flops["text"] > with_prefix.flops["text"] and without.flops["image"] == with_prefix.flops["image"]
    assert more.simulated.memory["loss"]["activations"] > less.simulated.memory["loss"]["activations"] and more.time.compute > less.time.compute


def test_deepspeed_is_estimated_where_it_is_alike():
    config = lmfusion(**{"parallel.engine": "deepspeed", "parallel.zero_stage": 3})
    alike = Estimator(config, Target(2, DEVICES["cpu"]))
    assert any("parallel.engine=deepspeed" in sentence for sentence in alike.assumptions)
    plain = Estimator(lmfusion(), Target(2, DEVICES["cpu"]))
    assert alike.predict(alike.config).simulated == plain.predict(plain.config).simulated
    with pytest.raises(UserError, match=r"parallel.zero_stage=2: FSDP2 is estimated"):
        Estimator(lmfusion(**{"parallel.engine": "deepspeed", "parallel.zero_stage": 2}), Target(2, DEVICES["cpu"]))


def test_what_does_not_fit_is_told_how_it_would():
    config = lmfusion(**{"train.global_batch_sequences": 16, "train.micro_batch_sequences": 8, "model.dim": 64, "model.ffn_dim": 256})
    roomy = Estimator(config, Target(2, small_gpu(1e12)))
    needed = roomy.predict(roomy.config).memory
    tight = Estimator(config, Target(2, small_gpu(needed * 0.7), efficiency=Efficiency(reserve=0.0)))
    prediction = tight.predict(tight.config)
    assert prediction.memory == needed and prediction.memory > tight.target.room
    found = advise(tight, prediction)
    assert any(one.fits for one in found)
    keys = {key for one in found for key in one.settings}
    assert {"parallel.activation_checkpointing", "train.micro_batch_sequences", "parallel.cpu_offload"} <= keys
    fitting = [one.prediction.time.total for one in found if one.fits]
    assert fitting == sorted(fitting) and all(one.fits for one in found[: len(fitting)])
    assert all(one.fits == (one.prediction.memory <= tight.target.room) for one in found)


def test_frozen_weights_are_better_whole_where_the_network_is_slow():
    config = lmfusion(**{"train.global_batch_sequences": 16})
    target = Target(16, Device("toy", {"bfloat16": 1e15, "float32": 1e15}, 1e12, 1e15, 1e9, 1e6), gpus_per_node=1)
    estimator = Estimator(config, target)
    prediction = estimator.predict(estimator.config)
    whole = next(one for one in advise(estimator, prediction) if one.settings == {"parallel.frozen": "replicate"})
    assert whole.prediction.time.total < prediction.time.total
    assert whole.prediction.memory > prediction.memory


def test_step_time_by_hand():
    device = small_gpu(1e10)
    parallel = tiny_config({"parallel.precision": "bfloat16"}).parallel
    channel = Channel(ALL_REDUCE, (0, 1, 2, 3))
    efficiency = Efficiency(compute=0.5, links=0.5, overlap=0.5)
    near = step_time(device, efficiency, parallel, 1e12, {channel: 1e11}, 5e11, gpus_per_node=4)
    assert near.compute == pytest.approx(2.0)
    assert near.communication == pytest.approx(2 * 1e11 * 3 / 4 / 0.5e11)  # 3 s, half of it beside the computation
    assert near.exposed == pytest.approx(1.5) and near.optimizer == pytest.approx(1.0)
    far = step_time(device, efficiency, parallel, 1e12, {channel: 1e11}, 5e11, gpus_per_node=2)
    assert far.communication == pytest.approx(30.0) and far.exposed == pytest.approx(28.0)
    gathered, offloaded = Channel(ALL_GATHER, (0, 1, 2, 3)), parallel.model_copy(update={"cpu_offload": True})
    copied = step_time(device, efficiency, offloaded, 1e12, {gathered: 4.8e10, channel: 1e11}, 0, gpus_per_node=4)
    assert copied.communication == pytest.approx(near.communication + 4.8e10 * 3 / 4 / 0.5e11 + 4.8e10 / 4 / 12e9), "shards come from the host"
    assert step_time(DEVICES["cpu"], efficiency, parallel, 1e12, {}, 0, 8) is None


def test_data_that_are_indexed_are_taken_as_they_are(tmp_path):
    make_world(tmp_path / "world", 40, seed=1)
    config = tiny_config({"data.sources": [{"path": str(tmp_path / "world" / "train")}], "data.sequence_length": 256})
    target = Target(2, DEVICES["cpu"])
    assert "is not indexed" in Estimator(config, target).assumptions[0]
    prepare_sources(config, lambda done, total: None)
    estimator = Estimator(config, target)
    assert estimator.assumptions[0].startswith("2 of the 2 sequences of step 1")
    loader = Loader(config, load_tokenizer(config), "train", 0, 1)
    batches, _ = next(loader.iterate(0))
    loader.close()
    assert estimator.step["text tokens"] == sum(batch.token_counts["text"] for batch in batches) / 2
    assert estimator.step["image tokens"] == sum(batch.token_counts["image"] for batch in batches) / 2
    model = build_model(config)
    read = sum((sum(count_flops(model, batch).values()) for batch in batches), 0)
    assert sum(estimator.flops.values()) == pytest.approx(read, rel=0.02)


def test_a_base_that_is_not_here_is_known_by_name():
    config = load(CONFIGS / "lmfusion_8b.yaml", ["model.base=somewhere/Llama-3.2-1B"])
    found = report(Estimator(config, Target(8, DEVICES["h200"])), with_advice=False)
    assert found["parameters"]["text"] == {"trainable": 0, "frozen": 1_235_814_400}
    assert any("published shape" in sentence for sentence in found["assumptions"])
    assert found["memory"]["peak_bytes"] < 40 * GIB


PUBLISHED = sorted(path for path in CONFIGS.glob("*.yaml") if any(f"representation: {kind}\n" in path.read_text() for kind in ("latents", "codes")))


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_published_latents_and_codes_have_the_papers_images(path):
    """32 x 32 latents in 2 x 2 patches, and 1,024 codes: half of a sequence by default."""
    config = load(path)
    size = {"latents": 256, "codes": 1024}[config.data.image.representation]
    work = workload(config, patch_dim(config.data), None, None, None)
    images = [segment.num_tokens for document in work.sequences[0].documents for segment in document.segments if segment.modality == "image"]
    assert images == [size] * (2048 // size) and f"images of {size:,} tokens (" in work.origin


@pytest.mark.parametrize("name", ["mot_transfusion_163m", "mot_chameleon_37m"])
def test_image_tokens_are_honoured_where_the_files_decide(name):
    """As asked, and with the FLOPs of those rows: their modality's projections see each of them, forward and twice backward."""
    config = load(CONFIGS / f"{name}.yaml")
    less, more = (Estimator(config, Target(8, DEVICES["h100"]), image_tokens=asked) for asked in (1024, 2048))
    for found, asked in ((less, 1024), (more, 2048)):
        assert (found.step["image tokens"], found.step["text tokens"]) == (asked, 4096 - asked)
    model, sequences = config.model, config.train.global_batch_sequences
    products = model.num_layers * (4 * model.dim * model.dim + 3 * model.dim * model.ffn_dim)
    added = more.flops["image"] - less.flops["image"]
    if name == "mot_transfusion_163m":
        assert added > 6 * 1024 * products * sequences, "the patcher besides"
    else:
        assert added == 6 * 1024 * (products + model.vocab_size * model.dim) * sequences, "the head says every code"
        assert less.step["labelled tokens"] == 4096 - 1


def test_codes_are_rows_of_the_modality_image():
    """FLOPs of codes are those of batches that the loader would make of such documents."""
    codes = {"data.image": {"representation": "codes", "codebook_size": 20, "size": 8, "patch_size": 2}, "model.vocab_size": 280}
    config = tiny_config({"model.recipe": "mot", "data.sequence_length": 36, "train.global_batch_sequences": 1, **codes})
    found = Estimator(config, Target(1, DEVICES["cpu"]), image_tokens=16)
    batch = batch_of([document([1] * 19, ("codes", *range(260, 276)), [2], seed=0)], config)
    assert found.flops == count_flops(build_model(config), batch) and found.flops["image"] > 0


def test_codes_in_the_index_are_images_too(tmp_path):
    make_recipe_world(tmp_path)
    config = recipe_config(tmp_path, "Chameleon", "run", 2)
    prepare_sources(config, lambda done, total: None)
    estimator = Estimator(config, Target(2, DEVICES["cpu"]))
    loader = Loader(config, load_tokenizer(config), "train", 0, 1)
    batches, _ = next(loader.iterate(0))
    loader.close()
    assert estimator.step["image tokens"] == sum(batch.token_counts["image"] for batch in batches) / 4 > 0


@pytest.mark.parametrize(
    ("name", "arguments", "assumption"),
    [
        ("mot_transfusion_163m", ["--image-tokens", "1000"], "the 1,000 image tokens that were asked for are 1,024, whole images"),
        ("mot_transfusion_163m", ["--image-tokens", "300"], "and 1 image of 256 tokens (latents of 32 cells a side"),
        ("mot_transfusion_163m", ["--tokens-per-image", "64"], "and 32 images of 64 tokens, each"),
        ("mot_chameleon_37m", ["--tokens-per-image", "576"], "and 3 images of 576 tokens, each"),
        ("chameleon_7b", ["--text-tokens", "3000"], "every sequence has 3,000 text tokens and 1 image of 1,024 tokens (codes"),
    ],
    ids=str,
)
def test_assumptions_say_what_became_of_the_numbers(name, arguments, assumption):
    config = load(CONFIGS / f"{name}.yaml")
    given = {option[2:].replace("-", "_"): int(value) for option, value in zip(arguments[::2], arguments[1::2], strict=True)}
    numbers = [given.get(key) for key in ("text_tokens", "image_tokens", "tokens_per_image")]
    assert assumption in workload(config, patch_dim(config.data), *numbers).origin


@pytest.mark.parametrize(
    ("name", "arguments", "sentence"),
    [
        ("mot_transfusion_163m", ["--image-tokens", "4096"], "0 text tokens and 16 images of 256 tokens: must fit data.sequence_length=4096"),
        ("mot_transfusion_163m", ["--image-tokens", "100"], "--image-tokens 100: is less than one image of 256 tokens"),
        ("mot_transfusion_163m", ["--image-tokens", "-256"], "--image-tokens -256: must be at least 0"),
        ("mot_chameleon_37m", ["--image-tokens", "1000"], "--image-tokens 1000: is less than one image of 1024 tokens"),
        ("lmfusion_8b", ["--tokens-per-image", "64"], "make it 256; change those"),
        ("debug/dense", ["--gpus-per-node", "1", "--image-tokens", "1024"], "the model has no images (data.modalities=text)"),
    ],
    ids=str,
)
def test_image_tokens_are_never_dropped_in_silence(name, arguments, sentence, capsys):
    assert main(["estimate", str(CONFIGS / f"{name}.yaml"), "--no-advice", *arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error and len(error.splitlines()) == 1
