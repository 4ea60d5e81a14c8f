"""An estimate as one document: what `fusiontrain estimate --json` prints and its tables are made of."""

from __future__ import annotations

from typing import Any

from fusiontrain.parallel.mesh import mesh_shape
from fusiontrain.train.estimate.advice import Alternative, advise
from fusiontrain.train.estimate.estimator import Estimator, Prediction, total
from fusiontrain.train.estimate.hardware import HOST_BANDWIDTH, spans_nodes
from fusiontrain.train.estimate.traffic import wire_bytes


def report(estimator: Estimator, with_advice: bool = True) -> dict[str, Any]:
    """Everything about the estimator's config. Bytes and seconds are of one rank and one optimizer step, FLOPs and tokens of a step over all ranks."""
    prediction = estimator.predict(estimator.config)
    target, parallel = estimator.target, estimator.config.parallel
    replicate, shard = mesh_shape(parallel, target.world_size)
    return {
        "world_size": target.world_size,
        "mesh": {"dp_replicate": replicate, "dp_shard": shard, "gpus_per_node": target.gpus_per_node},
        "device": target.device.name,
        "parameters": {**estimator.parameters, "all": {kind: total(estimator.parameters, kind) for kind in ("trainable", "frozen")}},
        "step": {
            "sequences": estimator.config.train.global_batch_sequences,
            "micro_batch_sequences": prediction.micro_batch,
            "micro_batches": prediction.micro_batches,
            "per_sequence": estimator.step,
        },
        "flops": {**estimator.flops, "all": sum(estimator.flops.values()), "recomputed": prediction.recomputed * target.world_size},
        "memory": _memory(estimator, prediction),
        "traffic": _traffic(estimator, prediction),
        "time": _time(estimator, prediction),
        "advice": [_alternative(estimator, prediction, one) for one in advise(estimator, prediction)] if with_advice else [],
        "assumptions": assumptions(estimator),
    }


def _memory(estimator: Estimator, prediction: Prediction) -> dict[str, Any]:
    categories = prediction.simulated.memory[prediction.phase]
    room = estimator.target.room
    return {
        "peak_bytes": round(prediction.memory),
        "peak_phase": prediction.phase,
        "categories": {name: round(size) for name, size in sorted(categories.items(), key=lambda item: -item[1]) if size >= 1},
        "on_host": [name for name in categories if prediction.is_on_host(name)],
        "peak_bytes_by_phase": {phase: round(prediction.memory_of(phase)) for phase in prediction.simulated.memory},
        "available_bytes": None if room is None else round(room),
        "fits": None if room is None else prediction.memory <= room,
    }


def _traffic(estimator: Estimator, prediction: Prediction) -> list[dict[str, Any]]:
    found = prediction.simulated
    return [
        {
            "collective": channel.collective,
            "ranks": len(channel.ranks),
            "between_nodes": spans_nodes(channel, estimator.target.gpus_per_node),
            "calls": round(found.calls[channel]),
            "message_bytes": round(size),
            "sent_bytes": round(wire_bytes(channel, size)),
        }
        for channel, size in found.bytes.items()
        if len(channel.ranks) > 1
    ]


def _time(estimator: Estimator, prediction: Prediction) -> dict[str, Any] | None:
    time, target = prediction.time, estimator.target
    if time is None:
        return None
    peak = target.device.peak_flops[estimator.config.parallel.precision]
    assert peak is not None
    tokens = estimator.step["text tokens"] + estimator.step["image tokens"]
    per_rank = tokens * estimator.config.train.global_batch_sequences / target.world_size
    return {
        "step_seconds": time.total,
        "compute_seconds": time.compute,
        "communication_seconds": time.communication,
        "exposed_communication_seconds": time.exposed,
        "optimizer_seconds": time.optimizer,
        "mfu": prediction.flops / time.total / peak,
        "tokens_per_second_per_gpu": per_rank / time.total,
    }


def _alternative(estimator: Estimator, now: Prediction, one: Alternative) -> dict[str, Any]:
    return {
        "settings": one.settings,
        "peak_bytes": round(one.prediction.memory),
        "saves_bytes": round(now.memory - one.prediction.memory),
        "step_seconds": one.prediction.time.total if one.prediction.time else None,
        "fits": one.fits,
    }


def assumptions(estimator: Estimator) -> list[str]:
    """Sentences: whatever a number of the report depends on besides the config."""
    target, found = estimator.target, list(estimator.assumptions)
    device, efficiency = target.device, target.efficiency
    peak = device.peak_flops[estimator.config.parallel.precision]
    if peak is None or device.memory_bytes is None:
        return [*found, f"the speed and the memory of a {device.name} are not known: no time is predicted"]
    found.append(f"{device.name}: {peak / 1e12:,.0f} TFLOP/s dense {estimator.config.parallel.precision}, of which {efficiency.compute:.0%} are reached")
    found.append(
        f"links one way: {device.intra_node / 1e9:.0f} GB/s in a machine of {target.gpus_per_node}, {device.inter_node / 1e9:.0f} GB/s per GPU between "
        f"machines, of which {efficiency.links:.0%} are reached; {efficiency.overlap:.0%} of the communication runs beside computation"
    )
    found.append(f"{efficiency.reserve:.0%} of the memory is left to the CUDA context, NCCL and fragments; the micro-batch has the most image tokens seen")
    if estimator.config.parallel.cpu_offload:
        found.append(f"offloaded shards and updates move {HOST_BANDWIDTH / 1e9:.0f} GB/s per GPU")
    return found
