"""One sentence: where the most time is lost, and what to change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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

SMALL = "larger products reach more of the peak: raise data.sequence_length, or train.micro_batch_sequences where that is less than a rank's share of the batch"

WHAT_TO_CHANGE: Mapping[str, str] = {
    DATA_WAIT: "raise data.num_workers or data.prefetch_bytes, or store latents instead of pictures",
    TO_DEVICE: "store latents instead of pixels, which are larger",
    SHARDING: "keep more weights gathered: parallel.reshard_after_forward=never, or parallel.frozen=replicate",
    COLLECTIVES: "gather less, or earlier: parallel.frozen=replicate, parallel.forward_prefetch=1, or dp_shard within a machine and dp_replicate between them",
    OPTIMIZER: "more tokens per update: raise train.global_batch_sequences",
    METRICS: "it should be next to nothing: see the trace for what takes it",
    CHECKPOINT: "save less often: raise checkpoint.every_steps",
    IDLE: "the host is behind: raise train.micro_batch_sequences, or set parallel.compile=true",
    ATTENTION: "shorter documents have less of it; kernels.attention chooses another implementation",
    PROJECTIONS: SMALL,
    FEED_FORWARD: SMALL,
    HEAD: "it grows with vocabulary and labels; kernels.cross_entropy chooses another implementation",
    PATCHER: "a smaller one is model.image.patcher=linear, or fewer model.image.unet_channels",
    AUTOENCODER: "store latents once instead of encoding pictures in every step",
    NORMS: "no products, only passes over memory: parallel.compile=true joins them, or kernels.norm chooses another implementation",
    EMBEDDING: "only passes over memory: parallel.compile=true",
    IMAGE_LOSS: "only passes over memory: parallel.compile=true",
}


def largest_loss(rows: Sequence[Row], imbalance: Mapping[str, float]) -> str:
    """Of products lost is what they take beyond the peak, where that is known; of everything else, all."""
    groups: dict[str, float] = {}
    for row in rows:
        lost = row.lost_seconds if row.lost_seconds is not None and row.flops else row.total
        groups[row.group] = groups.get(row.group, 0.0) + lost
    group, seconds = max(groups.items(), key=lambda item: item[1])
    step = sum(row.total for row in rows)
    advice = WHAT_TO_CHANGE.get(group, "see the trace for what takes it")
    if group == COLLECTIVES and imbalance["model_seconds"] >= UNBALANCED:
        advice = f"ranks wait for the one that computes {imbalance['model_seconds']:.2f} times the mean: fewer, larger micro-batches even that out"
    beyond = " beyond what its products take at the peak" if any(row.group == group and row.flops and row.lost_seconds is not None for row in rows) else ""
    return f"The largest loss is {group}: {seconds * 1e3:.1f} ms of a step ({seconds / step:.0%}){beyond}; {advice}."
