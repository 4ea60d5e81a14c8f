"""One sentence: where the most time is lost, and what to change."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from fusiontrain.config.schema import Config
from fusiontrain.models.flops import ATTENTION, FEED_FORWARD, HEAD, PATCHER, PROJECTIONS
from fusiontrain.train.profile.parts import (
    AUTOENCODER,
    CHECKPOINT,
    COLLECTIVES,
    DATA_WAIT,
    EMBEDDING,
    IDLE,
    IMAGE_LOSS,
    METRICS,
    NORMS,
    OPTIMIZER,
    SHARDING,
    TO_DEVICE,
)
from fusiontrain.train.profile.report import Row

UNBALANCED = 1.1
"""From here on waiting for other ranks is a matter of who has how much to do."""



class Remedy(NamedTuple):
    """A change to a config, and whether one has it still to make."""

    words: str
    left: Callable[[Config], bool] = lambda config: True


def _micro(config: Config) -> bool:
    return config.train.micro_batch_sequences is not None


def _pixels(config: Config) -> bool:
    return config.data.image.representation == "pixels"


def _replicable(config: Config) -> bool:
    return config.model.recipe == "lmfusion" and config.model.freeze_text and config.parallel.frozen != "replicate"


LATENTS = Remedy("store latents instead of pixels, which are larger and must be decoded", _pixels)
LONGER = Remedy("larger products reach more of the peak: raise data.sequence_length")
FEWER = Remedy("have fewer, larger micro-batches: raise train.micro_batch_sequences", _micro)
COMPILE = Remedy("set parallel.compile=true, which joins passes over memory", lambda config: not config.parallel.compile)
REPLICATE = Remedy("keep frozen weights whole on every rank: parallel.frozen=replicate", _replicable)

WHAT_TO_CHANGE: Mapping[str, tuple[Remedy, ...]] = {
    DATA_WAIT: (Remedy("raise data.num_workers or data.prefetch_bytes"), LATENTS),
    TO_DEVICE: (LATENTS,),
    SHARDING: (
        Remedy("keep weights gathered: parallel.reshard_after_forward=never", lambda config: config.parallel.reshard_after_forward != "never"),
        REPLICATE,
    ),
    COLLECTIVES: (
        REPLICATE,
        Remedy("gather earlier: parallel.forward_prefetch=1", lambda config: config.parallel.forward_prefetch == 0),
        Remedy("between machines hold copies (dp_replicate) and shard within them (dp_shard)", lambda config: config.parallel.dp_replicate == 1),
    ),
    OPTIMIZER: (Remedy("have more tokens per update: raise train.global_batch_sequences"),),
    METRICS: (Remedy("it should be next to nothing: see the trace for what takes it"),),
    CHECKPOINT: (
        Remedy("save beside the training: checkpoint.asynchronous=true", lambda c: not c.checkpoint.asynchronous),
        Remedy("save less often: raise checkpoint.every_steps"),
    ),
    IDLE: (FEWER, COMPILE),
    ATTENTION: (Remedy("shorter documents have less of it; kernels.attention chooses another implementation"),),
    PROJECTIONS: (LONGER, FEWER),
    FEED_FORWARD: (LONGER, FEWER),
    HEAD: (Remedy("it grows with vocabulary and labels; kernels.cross_entropy chooses another implementation"),),
    PATCHER: (
        Remedy("take a smaller one: fewer model.image.unet_channels, or model.image.patcher=linear", lambda config: config.model.image.patcher == "unet"),
        Remedy("larger patches are fewer: raise data.image.patch_size", lambda config: config.model.image.patcher == "linear"),
    ),
    AUTOENCODER: (Remedy("store latents once instead of encoding pictures in every step"),),
    NORMS: (COMPILE, Remedy("kernels.norm chooses another implementation")),
    EMBEDDING: (COMPILE,),
    IMAGE_LOSS: (COMPILE,),
}


def largest_loss(rows: Sequence[Row], imbalance: Mapping[str, float], config: Config) -> str:
    """Of products lost is what they take beyond the peak, where that is known; of everything else, all."""
    groups: dict[str, float] = {}
    for row in rows:
        lost = row.lost_seconds if row.lost_seconds is not None and row.flops else row.total
        groups[row.group] = groups.get(row.group, 0.0) + lost
    group, seconds = max(groups.items(), key=lambda item: item[1])
    step = sum(row.total for row in rows)
    remedies = [remedy.words for remedy in WHAT_TO_CHANGE.get(group, ()) if remedy.left(config)]
    advice = ", or ".join(remedies) or "see the trace for what takes it"
    if group == COLLECTIVES and imbalance["model_seconds"] >= UNBALANCED:
        advice = f"ranks wait for the one that computes {imbalance['model_seconds']:.2f} times the mean: fewer, larger micro-batches even that out"
    beyond = " beyond what its products take at the peak" if any(row.group == group and row.flops and row.lost_seconds is not None for row in rows) else ""
    return f"The largest loss is {group}: {seconds * 1e3:.1f} ms of a step ({seconds / step:.0%}){beyond}; {advice}."
