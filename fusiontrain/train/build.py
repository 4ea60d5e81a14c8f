"""The composition root: from a configuration to a run whose parts know each other, and from a checkpoint to a model."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fusiontrain.config.load import to_yaml
from fusiontrain.config.schema import Config
from fusiontrain.config.validate import file_problems
from fusiontrain.data.index.cache import prepare_sources
from fusiontrain.data.loader import Loader
from fusiontrain.data.stream import StreamLoader
from fusiontrain.data.tokenizer import load_tokenizer, require_room
from fusiontrain.models.build import declare_model, first_weights
from fusiontrain.parallel.apply import parallelize
from fusiontrain.parallel.deepspeed import start_zero
from fusiontrain.parallel.mesh import Ranks, build_mesh, mesh_shape, set_threads
from fusiontrain.parallel.reduce import at_length, barrier, gather_objects, on_main
from fusiontrain.train import ema
from fusiontrain.train.checkpoint import (
    CONFIG,
    DamagedCheckpoint,
    Tensors,
    load_checkpoint,
    read_manifest,
    resume_candidates,
)
from fusiontrain.train.identity import model_identity, other_objective_of_base, require_same_model
from fusiontrain.train.metrics import MetricsWriter
from fusiontrain.train.optim import build_optimizer, embedding_names
from fusiontrain.train.progress import Progress
from fusiontrain.train.reporter import Reporter
from fusiontrain.train.set_aside import set_aside_future
from fusiontrain.train.signals import BreakOff, StopRequest
from fusiontrain.train.sinks.all import missing_packages
from fusiontrain.train.state import TrainState, model_tensors, optimizer_tensors
from fusiontrain.train.trainer import Trainer
from fusiontrain.utils.errors import UserError

logger = logging.getLogger(__name__)


def check_config(config: Config, world_size: int) -> None:
    """Raise UserError for what can only be known with the ranks and the disk at hand, all problems at once."""
    files = [str(problem) for problem in file_problems(config)]
    problems = [*files, *missing_packages(config.metrics.sinks), *rank_problems(config, world_size)]
    if problems:
        raise UserError("\n".join(problems))


def rank_problems(config: Config, world_size: int) -> list[str]:
    """Why a config cannot be trained on so many ranks. Raises UserError where they make no mesh."""
    mesh_shape(config.parallel, world_size)
    sequences, micro = config.train.global_batch_sequences, config.train.micro_batch_sequences or 1
    if sequences % (world_size * micro) == 0:
        return []
    below = sequences // (world_size * micro) * world_size * micro
    nearest = f"{below} or {below + world_size * micro}" if below else f"{world_size * micro}"
    return [
        f"train.global_batch_sequences={sequences}: must be a multiple of ranks x micro_batch_sequences = {world_size} x {micro}; the nearest is {nearest}"
    ]


def build_trainer(config: Config, ranks: Ranks, reporter: Reporter, stop: StopRequest, progress: Progress | None = None) -> Trainer:
    """Everything that a run needs, resumed as `checkpoint.resume` says. All ranks call this together, inside their process group.

    Raises UserError for what the user can mend: files, shapes, a checkpoint of another model or of other data. Raises BreakOff where a rank was
    asked to stop; nothing was trained then, so there is nothing to save.
    """
    set_threads(config.train.threads, ranks)
    tokenizer = load_tokenizer(config)
    index_first(config, ranks, reporter, stop)
    loader: Loader | StreamLoader
    if config.data.mode == "stream":
        loader = StreamLoader(config, tokenizer, ranks.rank, ranks.world_size)
    else:
        loader = Loader(config, tokenizer, "train", ranks.rank, ranks.world_size)
    require_same_data_on_ranks(gather_objects(loader.fields))
    validation_loader = None
    if config.data.validation_sources:
        validation_loader = Loader(config, tokenizer, "validation", ranks.rank, ranks.world_size, loader.workers if isinstance(loader, Loader) else None)
    model = declare_model(config, ranks.device)
    require_room(config, tokenizer, model.shape.vocab_size)
    if ranks.is_main:
        logger.info("%s", model.kernels.origin)
    stop.check()
    embeddings = embedding_names(model)
    mesh = build_mesh(config.parallel, ranks)
    parameters = parallelize(model, model.plan(), config.parallel, mesh, ranks.device, first_weights(config, model))
    stop.check()
    optimizer = build_optimizer(parameters, embeddings, config.optimizer)
    # Frozen weights that came from a folder are named by their hash instead of being stored again and again.
    weights = model_tensors(model, parameters, include_frozen=config.model.base is None)
    zero = None
    if config.parallel.engine == "deepspeed":
        zero = start_zero(model, model.plan(), parameters, optimizer, config.parallel, config.optimizer.clip_norm, ranks.device)
    tensors = {"model": weights, "optimizer": optimizer_tensors(optimizer, parameters)} if zero is None else zero.tensors(weights)
    if config.train.ema_decay is not None:
        tensors[ema.GROUP] = ema.average_weights(optimizer, parameters, config.train.ema_decay)
    identity = on_main(lambda: model_identity(config, tensors["model"]) | ema.note(config.train))
    state, news = resume(config, ranks, tensors, identity, loader.fields)
    if state.step == 0 and (sentence := other_objective_of_base(config)) is not None:
        news.append(sentence)
    if zero is not None:
        zero.loaded()
    for sentence in news:
        reporter.event(sentence)
    writer = open_run_folder(config, state.step) if ranks.is_main else None
    barrier()  # no rank writes into a run folder that is not there yet
    parts = (config, ranks, model, optimizer, tokenizer, loader, validation_loader, tensors, identity, state, stop, reporter, writer, zero)
    return Trainer(*parts, progress or Progress())


def index_first(config: Config, ranks: Ranks, reporter: Reporter, stop: StopRequest) -> None:
    """Index what is not indexed yet on the main rank and then, for disks that machines do not share, on one rank of each machine.

    So a corpus is never indexed by all ranks at once. Raises UserError on all ranks for a damaged shard, BreakOff where one was asked to stop.
    """

    def after_shard(done: int, total: int) -> None:
        reporter.indexing(done, total)
        if stop.agreed or (stop and ranks.world_size == 1):
            raise BreakOff

    for chosen in (ranks.is_main, ranks.local_rank == 0 and not ranks.is_main):
        at_length(lambda: prepare_sources(config, after_shard), chosen, meanwhile=stop.agree)
        stop.check()


def resume(
    config: Config, ranks: Ranks, tensors: Tensors, identity: dict, data_fields: dict[str, str]
) -> tuple[TrainState, list[str]]:
    """Load the checkpoint that `checkpoint.resume` means into `tensors`; returns its state (a new one if there is none) and sentences on what a person
    should hear of: newer checkpoints that were passed over, what was set aside, that nothing is left to train.

    Only `auto` passes over damage, and not over the last one: a run whose checkpoints are all damaged must not start anew unasked.
    """
    folder = Path(config.run.dir) / "checkpoints"
    # The main rank decides, so that ranks which see a shared disk at different moments still take the same ones.
    candidates = on_main(lambda: resume_candidates(config.checkpoint.resume, folder))
    state = TrainState()
    used: Path | None = None
    passed_over: list[tuple[Path, str]] = []
    for checkpoint in candidates:
        try:
            manifest = read_manifest(checkpoint)
            require_steps_left(manifest["step"], config.train.steps, checkpoint)
            require_same_model(manifest["model"], identity, checkpoint)
            if not config.checkpoint.accept_data_change:
                require_same_data(manifest["state"]["data"], data_fields, checkpoint)
            stored = {group: part for group, part in tensors.items() if group != ema.GROUP or ema.GROUP in manifest["model"]}
            state, used = on_these_data(load_checkpoint(checkpoint, stored, ranks), data_fields), checkpoint
        except DamagedCheckpoint as error:
            logger.warning("%s is damaged: %s", checkpoint, error)
            passed_over.append((checkpoint, error.fact))
            continue
        logger.info("resumed from %s", checkpoint)
        if ema.GROUP not in stored and ema.GROUP in tensors:
            logger.warning("%s holds no averages of the weights: train.ema_decay starts from its weights", checkpoint)
            ema.restart(tensors[ema.GROUP], tensors["model"])
        elif ema.GROUP in manifest["model"] and ema.GROUP not in tensors:
            logger.warning("%s holds averages of the weights, which are dropped: train.ema_decay is null", checkpoint)
        break
    if passed_over and used is None:
        others = " (no older checkpoint is sound either)" if len(candidates) > 1 else ""
        raise UserError(
            f"{passed_over[0][1]}, so the checkpoint is damaged{others}: resume from another one with --resume PATH, or start anew with --resume none"
        )
    news = [f"passed over {path}, which is damaged ({text.removeprefix(f'{path}/')}): resumed from {used} instead" for path, text in passed_over]
    # Checkpoints and metrics of this folder belong to the run up to the step that it goes on from, or not at all where that lies elsewhere.
    own_steps = state.step if used is not None and used.resolve().parent == folder.resolve() else 0
    why = "starting anew (--resume none)" if used is None else f"resumed from {used}"
    done = used is not None and state.step == config.train.steps
    if ranks.is_main and not done and (passed_over or config.checkpoint.resume != "auto"):
        news += set_aside_future(folder.parent, own_steps, why)
    if done:
        news.append(f"step {state.step} of train.steps={config.train.steps} is done already, in {used}: raise train.steps to train on")
    for sentence in news:
        logger.info("%s", sentence)
    return state, news


def require_steps_left(step: int, steps: int, checkpoint: Path) -> None:
    """Raise UserError where a checkpoint lies beyond the last step that is to be trained: then neither is what was meant."""
    if step > steps:
        raise UserError(f"{checkpoint}: is at step {step}, beyond train.steps={steps}: raise train.steps, or give an earlier checkpoint with --resume PATH")


def require_same_data(saved: Mapping[str, Any], fields: Mapping[str, str], checkpoint: Path) -> None:
    """Raise UserError, naming the first difference, where a checkpoint's place in the data means nothing in those of now."""
    before = saved.get("fields", {})
    for name in sorted({*before, *fields}):
        if before.get(name) != fields.get(name):
            raise UserError(
                f"{checkpoint}: was trained on other data, or on the same in another order: {name} differs; restore it as in the "
                f"checkpoint's {CONFIG}, or accept the other data with checkpoint.accept_data_change=true, or start anew with another run.dir"
            )


def require_same_data_on_ranks(fields: Sequence[Mapping[str, str]]) -> None:
    """Raise UserError, on every rank alike, where one would see other data than rank 0. fields: of all ranks, in order."""
    for rank, others in enumerate(fields):
        for name in sorted({*fields[0], *others}):
            if fields[0].get(name) != others.get(name):
                raise UserError(
                    f"rank {rank} has {name}: {others.get(name)}, rank 0 has {fields[0].get(name)}; "
                    "give all machines the same shards and the same versions of the packages"
                )


def on_these_data(state: TrainState, fields: dict[str, str]) -> TrainState:
    """The state with its place in other data than it was saved with, whose windows are elsewhere; as it is where the data are the same."""
    before = state.data.get("fields", {})
    changed = [name for name in sorted({*before, *fields}) if before.get(name) != fields.get(name)]
    if not changed:
        return state
    logger.warning("from step %d on the data are others: %s", state.step, ", ".join(changed))
    return replace(state, data={**state.data, "fields": fields, "window": 0, "sequence": 0, "lanes": ()})


def open_run_folder(config: Config, step: int) -> MetricsWriter:
    """Write config.yaml and open the metrics of a run that goes on after `step`."""
    folder = Path(config.run.dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(to_yaml(config), encoding="utf-8")
    return MetricsWriter(folder, step, config)
