"""What a step tells besides its loss: losses and counts by source, gradient norms by modality, and all of it for one wait."""

from __future__ import annotations

import collections
import math
from dataclasses import replace

import pytest
import torch
from torch.overrides import TorchFunctionMode

from fusiontrain.config.schema import Config, SourceConfig
from fusiontrain.config.validate import has_frozen_prefix
from fusiontrain.data.collate import collate
from fusiontrain.models.build import build_model
from fusiontrain.parallel.apply import parallelize
from fusiontrain.parallel.mesh import build_mesh, read_ranks
from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.documents import document
from fusiontrain.testing.ranks import shared_pool
from fusiontrain.testing.training import lmfusion_config, make_sequences, split, write_base
from fusiontrain.train.by_source import SourceCounts, source_labels
from fusiontrain.train.gradients import clip, modality_groups, norms, squared_norms
from fusiontrain.train.optim import build_optimizer, embedding_names
from fusiontrain.train.step import StepCounts, StepResult, global_counts, train_step
from fusiontrain.types import PackedSequence

WEIGHTS = {"text": 1.0, "image": 5.0, "speech": 1.0}
SOURCES = ("web", "books", "never used")
KINDS = {"mixed": "web", "text": "books", "image": "books"}


def sequences_of_sources(kinds: list[str], config: Config) -> list[PackedSequence]:
    """Every second document of a mixed sequence comes from the other source too."""
    named = []
    for kind, sequence in zip(kinds, make_sequences(kinds, config), strict=True):
        first = KINDS.get(kind, "web")
        sources = [first, "books" if first == "web" else "web"]
        documents = tuple(replace(d, source=replace(d.source, source=sources[place % 2])) for place, d in enumerate(sequence.documents))
        named.append(replace(sequence, documents=documents))
    return named


def build(config: Config):
    ranks = read_ranks({}) if not torch.distributed.is_initialized() else read_ranks()
    model = build_model(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    embeddings = embedding_names(model)
    parameters = parallelize(model, model.plan(), config.parallel, build_mesh(config.parallel, ranks), ranks.device)
    return ranks, model, parameters, build_optimizer(parameters, embeddings, config.optimizer)


def one_step(config: Config, kinds: list[str], micro_batches: int) -> tuple[StepCounts, StepResult]:
    ranks, model, parameters, optimizer = build(config)
    share = len(kinds) // ranks.world_size
    mine = sequences_of_sources(kinds, config)[ranks.rank * share : (ranks.rank + 1) * share]
    size = share // micro_batches
    batches = [collate(mine[first : first + size], config.data, has_frozen_prefix(config)) for first in range(0, share, size)]
    counts = global_counts(batches, sources=SOURCES)
    groups = modality_groups(parameters)
    return counts, train_step(model, optimizer, batches, counts, WEIGHTS, 1.0, ranks.world_size, ranks.device, groups=groups)


def by_hand(config: Config, kinds: list[str]) -> dict[str, dict[str, float]]:
    """{source: {modality: mean loss}}: each document's labels and images in turn, all others of its sequence silenced."""
    _, model, _, _ = build(config)
    sums: dict[tuple[str, str], float] = collections.defaultdict(float)
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    for sequence in sequences_of_sources(kinds, config):
        batch = collate([sequence], config.data, has_frozen_prefix(config))
        for number, mine in enumerate(sequence.documents):
            labels = batch.loss_weights * (batch.doc_ids == number)
            payload = batch.payloads["image"]
            image_rows = batch.doc_ids[batch.modality_bounds[1] : batch.modality_bounds[2]]
            of_image = [int(image_rows[payload.image_ids == image][0]) for image in range(len(payload.grids))]
            is_target = payload.is_target & torch.tensor([doc == number for doc in of_image], dtype=torch.bool)
            alone = replace(batch, loss_weights=labels, payloads={"image": replace(payload, is_target=is_target)})
            with torch.no_grad():
                terms = model(alone)
            for name, count in (("text", int(((batch.labels >= 0) & (batch.doc_ids == number)).sum())), ("image", int(is_target.sum()))):
                sums[mine.source.source, name] += float(terms[name].sum)
                counts[mine.source.source, name] += count
    return {source: {name: sums[source, name] / counts[source, name] for name in ("text", "image") if counts[source, name]} for source in SOURCES}


TOKENS = {
    "model.recipe": "mot", "model.vocab_size": 300, "data.modalities": ["text", "image", "speech"], "data.speech.num_units": 30,
    "data.image": {"representation": "codes", "codebook_size": 8, "size": 8, "patch_size": 4}, "objective.z_loss": 0.1,
}  # fmt: skip


def test_losses_of_sources_where_all_is_tokens_and_their_sum_is_the_loss_shown() -> None:
    config = tiny_config(TOKENS)
    documents = [
        document([256, 9, 8, 258], ("codes", 262, 263, 264, 265), [259, 33, 257], seed=0),
        document([256, 7], ("speech", 270, 271, 272), [5, 6, 257], seed=1),
        document([256, 40, 41, 42, 257], seed=2),
    ]
    named = [replace(d, source=replace(d.source, source=source)) for d, source in zip(documents, ("web", "books", "web"), strict=True)]
    sequences = [PackedSequence(tuple(named), config.data.sequence_length, 0), PackedSequence(tuple(named[1:]), config.data.sequence_length, 1)]
    ranks, model, parameters, optimizer = build(config)
    batches = [collate([sequence], config.data) for sequence in sequences]
    wanted: dict[tuple[str, str], float] = collections.defaultdict(float)
    targets: collections.Counter[tuple[str, str]] = collections.Counter()
    whole = 0.0
    for batch in batches:
        with torch.no_grad():
            logits = model.text_logits(batch).double()  # of all rows, in training mode as the losses are
        for row in (batch.labels >= 0).nonzero().squeeze(1).tolist():
            log_sum = logits[row].logsumexp(0)
            loss = float(log_sum - logits[row, batch.labels[row]] + 0.1 * log_sum**2)
            key = batch.sources[int(batch.doc_ids[row])].source, ("text", "image", "speech")[int(batch.label_modality_ids[row])]
            wanted[key] += loss
            targets[key] += 1
            whole += WEIGHTS[key[1]] * loss
    counts = global_counts(batches, sources=SOURCES)
    result = train_step(model, optimizer, batches, counts, WEIGHTS, 1.0, 1, ranks.device, groups=modality_groups(parameters))
    assert set(targets) == {("web", "text"), ("web", "image"), ("books", "text"), ("books", "speech")}
    for source in SOURCES:
        for name in ("text", "image", "speech"):
            assert counts.sources[source].targets[name] == targets[source, name]
            if targets[source, name]:
                assert result.source_losses[source][name] == pytest.approx(wanted[source, name] / targets[source, name], rel=1e-5)
            else:
                assert math.isnan(result.source_losses[source][name])
    assert result.loss == pytest.approx(whole / sum(targets.values()), rel=1e-5)
    found = {name: norm for name, norm in result.grad_norms.items() if math.isfinite(norm)}
    assert set(found) == {"text", "image", "speech"} and min(found.values()) > 0  # nothing is shared
    assert math.hypot(*found.values()) == pytest.approx(result.grad_norm)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("recipe", ["lmfusion", "transfusion"])
def test_losses_of_sources_are_those_of_their_documents_alone_however_they_are_spread(recipe: str, base: str) -> None:
    config, kinds = lmfusion_config(base) if recipe == "lmfusion" else tiny_config(), ["mixed", "text", "mixed", "image"]
    wanted = by_hand(config, kinds)
    assert wanted["web"].keys() == {"text", "image"} and not wanted["never used"]
    results = [one_step(config, kinds, 1), one_step(config, kinds, 4), *shared_pool().run(one_step, 2, config, kinds, 1)]
    for counts, result in results:
        found = {source: {name: loss for name, loss in losses.items() if math.isfinite(loss)} for source, losses in result.source_losses.items()}
        for source in SOURCES:
            assert found[source] == pytest.approx(wanted[source], rel=1e-5), source
        assert counts.sources == results[0][0].sources
        for name in ("text", "image"):
            whole = sum(counts.sources[source].targets[name] * result.source_losses[source][name] for source in SOURCES if name in wanted[source])
            assert whole == pytest.approx(counts.targets[name] * result.losses[name], rel=1e-6)


def test_counts_of_sources() -> None:
    config = tiny_config()
    sequences = sequences_of_sources(["mixed", "text", "image", "empty"], config)
    wanted = {source: [0, 0, 0] for source in SOURCES}
    for sequence in sequences:
        for mine in sequence.documents:
            images = sum(segment.modality == "image" and segment.is_target for segment in mine.segments)
            for place, number in enumerate((1, mine.num_tokens, images)):
                wanted[mine.source.source][place] += number
    counts = global_counts([collate(sequences[:2], config.data), collate(sequences[2:], config.data)], sources=SOURCES)
    assert {source: [found.documents, found.tokens, found.targets["image"]] for source, found in counts.sources.items()} == wanted
    assert sum(found.tokens for found in counts.sources.values()) == sum(counts.tokens.values())
    assert {name: sum(found.targets[name] for found in counts.sources.values()) for name in counts.targets} == counts.targets
    assert counts.sources["never used"] == SourceCounts(0, 0, dict.fromkeys(counts.targets, 0))


def test_a_loss_that_is_not_finite_is_that_of_its_source() -> None:
    config = tiny_config()
    ranks, model, _, optimizer = build(config)
    (batch,) = [collate(sequences_of_sources(["mixed", "text"], config), config.data)]
    batch.loss_weights[(batch.doc_ids == 0) & (batch.labels >= 0)] = math.nan
    counts = global_counts([batch], sources=SOURCES)
    result = train_step(model, optimizer, [batch], counts, WEIGHTS, 1.0, 1, ranks.device)
    assert not math.isfinite(result.losses["text"]) and not math.isfinite(result.source_losses["web"]["text"])
    assert math.isfinite(result.source_losses["books"]["text"])


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [(2, {}), (2, {"parallel.dp_replicate": -1, "parallel.dp_shard": 1}), (4, {"parallel.dp_replicate": 2})],
    ids=["FSDP", "DDP", "HSDP"],
)
def test_gradient_norms_by_modality(world_size: int, overrides: dict) -> None:
    config, kinds = tiny_config(), ["mixed", "text", "mixed", "image"]
    _, model, parameters, _ = build(config)
    (batch,) = split(sequences_of_sources(kinds, config), config, 0, 1, 1)
    targets, loss = global_counts([batch]).targets, torch.zeros(())
    for name, term in model(batch).items():
        loss = loss + WEIGHTS[name] * term.sum / targets[name]
    loss.backward()
    squares = dict.fromkeys(("text", "image", "shared"), 0.0)
    for name, parameter in parameters.items():
        group = "text" if name.startswith("text.") else "image" if name.startswith("image.") else "shared"
        squares[group] += parameter.grad.double().square().sum().item()
    wanted = {name: math.sqrt(square) for name, square in squares.items()}
    assert min(wanted.values()) > 0
    for _, result in [one_step(config, kinds, 1), *shared_pool().run(one_step, world_size, tiny_config(overrides), kinds, 1)]:
        assert {name: norm for name, norm in result.grad_norms.items() if math.isfinite(norm)} == pytest.approx(wanted, rel=1e-5)
        assert result.grad_norm == pytest.approx(math.sqrt(sum(squares.values())), rel=1e-5)


def test_weights_are_grouped_by_whose_rows_they_see(base: str) -> None:
    model = build_model(lmfusion_config(base, {"model.freeze_text": False}))
    groups = modality_groups(dict(model.named_parameters()))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {name.split(".")[0] for name in (names[id(p)] for p in groups["text"])} >= {"text", "blocks"}
    assert {name for name in (names[id(p)] for p in groups["image"]) if name.startswith("blocks.")} == {
        name.replace(".text.", ".image.") for name in (names[id(p)] for p in groups["text"]) if name.startswith("blocks.")
    }
    assert sum(len(group) for group in groups.values()) == len(names)
    frozen = build_model(lmfusion_config(base))
    for name in frozen.plan().frozen:
        frozen.get_parameter(name).requires_grad_(False)
    assert not modality_groups(dict(frozen.named_parameters()))["text"]


@pytest.mark.parametrize("clip_norm", [0.5, 1e6])
def test_clipping_is_that_of_torch(clip_norm: float) -> None:
    ours, theirs = ([torch.nn.Parameter(torch.zeros(n)) for n in (3, 4, 5)] for _ in range(2))
    for number, parameters in enumerate(zip(ours, theirs, strict=True)):
        for parameter in parameters[: 2 if number < 2 else 0]:  # the last has no gradient
            parameter.grad = torch.arange(len(parameter), dtype=torch.float32) + number
    groups = {"text": ours[:1], "shared": ours[1:], "none": []}
    norm, by_group = norms(squared_norms(groups, torch.device("cpu")).tolist(), groups)
    wanted = torch.nn.utils.clip_grad_norm_(theirs, clip_norm)
    clip(groups, norm, clip_norm)
    assert norm == pytest.approx(wanted.item()) and math.isnan(by_group["none"])
    for a, b in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(a.grad, b.grad)


class Readings(TorchFunctionMode):
    """Counts what makes the host wait for numbers of a device: each way to take them out of a floating tensor."""

    WAYS = ("tolist", "item", "numpy", "__float__", "__bool__", "__int__", "__index__", "nonzero", "__array__")

    def __init__(self) -> None:
        super().__init__()
        self.counted: collections.Counter[str] = collections.Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in self.WAYS and args and isinstance(args[0], torch.Tensor) and args[0].is_floating_point():
            self.counted[name] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_step_is_read_once_whatever_it_tells(micro_batches: int) -> None:
    config = tiny_config()
    ranks, model, parameters, optimizer = build(config)
    batches = split(sequences_of_sources(["mixed", "text"], config), config, 0, 1, micro_batches)
    counts = global_counts(batches, sources=SOURCES)
    update = optimizer.step

    def step_unseen() -> None:  # AdamW reads its own step numbers, which are on the CPU
        with torch._C.DisableTorchFunction():
            update()

    optimizer.step = step_unseen
    with Readings() as readings:
        train_step(model, optimizer, batches, counts, WEIGHTS, 1.0, 1, ranks.device, groups=modality_groups(parameters))
    assert readings.counted == {"tolist": 1}


def test_sources_have_short_names_of_their_own() -> None:
    def labels(*sources: str | tuple[str, str]) -> list[str]:
        configs = [SourceConfig(path=source) if isinstance(source, str) else SourceConfig(path=source[0], name=source[1]) for source in sources]
        return list(source_labels(configs).values())

    assert labels("shards") == ["shards"]
    assert labels("/world/texts-*.tar", "/world/pictures-*.tar") == ["texts", "pictures"]
    assert labels("s3://b/laion/{000..127}.tar", "/x/mmc4/{000..127}.tar.gz") == ["laion", "mmc4"]
    assert labels("a/train", "b/train") == ["a_train", "b_train"]
    assert labels("/x/{0..9}.tar", "/x/{10..19}.tar", ("/y", "mine")) == ["x", "x-2", "mine"]
    assert "token" not in labels("https://host/a.tar?token=secret")[0] and labels(".") == ["source"]
