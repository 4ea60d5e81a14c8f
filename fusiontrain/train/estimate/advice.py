"""What else to set: neighbours of a config, each of them predicted as the config itself is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fusiontrain.config.schema import Config
from fusiontrain.parallel.mesh import mesh_shape
from fusiontrain.train.estimate.estimator import Estimator, Prediction, total


@dataclass(frozen=True)
class Alternative:
    """Other settings, by dotted key, and what the run would take with them."""

    settings: dict[str, Any]
    prediction: Prediction
    fits: bool

    def __str__(self) -> str:
        return " ".join(f"{key}={value}" for key, value in self.settings.items())


def advise(estimator: Estimator, prediction: Prediction) -> list[Alternative]:
    """If the config does not fit: the single changes that save memory, the fastest of those that fit first; where none of them is enough, before
    them several together, one after the other until it fits. If it fits: what would be faster and fit too. Empty for a device whose memory is not known."""
    room = estimator.target.room
    if room is None:
        return []

    def predict(settings: dict[str, Any]) -> Alternative:
        found = estimator.predict(changed(prediction.config, settings))
        return Alternative(settings, found, found.memory <= room)

    if prediction.memory <= room:
        faster = [predict(settings) for settings in _faster(estimator, prediction)]
        return sorted((one for one in faster if one.fits and _seconds(one.prediction) < _seconds(prediction)), key=lambda one: _seconds(one.prediction))
    smaller = [one for one in map(predict, _smaller(estimator, prediction)) if one.prediction.memory < prediction.memory]
    smaller.sort(key=lambda one: (not one.fits, _seconds(one.prediction) if one.fits else one.prediction.memory))
    if not any(one.fits for one in smaller):
        return _together(predict, smaller) + smaller
    return smaller


def changed(config: Config, settings: dict[str, Any]) -> Config:
    """The config with other values of dotted keys of two parts."""
    for key, value in settings.items():
        section, name = key.split(".")
        config = config.model_copy(update={section: getattr(config, section).model_copy(update={name: value})})
    return config


def _smaller(estimator: Estimator, prediction: Prediction) -> Iterator[dict[str, Any]]:
    """Changes that may save memory."""
    parallel = prediction.config.parallel
    replicate, _ = mesh_shape(parallel, estimator.target.world_size)
    if parallel.frozen == "replicate":
        yield {"parallel.frozen": "shard"}
    if parallel.activation_checkpointing != "full":
        yield {"parallel.activation_checkpointing": "full"}
    if replicate > 1:
        yield {"parallel.dp_replicate": 1, "parallel.dp_shard": -1}
    if not parallel.cpu_offload:
        yield {"parallel.cpu_offload": True}
    if prediction.micro_batch % 2 == 0:
        yield {"train.micro_batch_sequences": prediction.micro_batch // 2}
    if prediction.micro_batches > 1:  # accumulated gradients are whole ones
        yield {"train.micro_batch_sequences": prediction.micro_batch * prediction.micro_batches}
        yield {"train.global_batch_sequences": prediction.micro_batch * estimator.target.world_size}


def _faster(estimator: Estimator, prediction: Prediction) -> Iterator[dict[str, Any]]:
    """Changes that may save time."""
    target, parallel = estimator.target, prediction.config.parallel
    _, shard = mesh_shape(parallel, target.world_size)
    if parallel.activation_checkpointing != "none":
        yield {"parallel.activation_checkpointing": "none"}
    if parallel.frozen == "shard" and total(estimator.parameters, "frozen"):
        yield {"parallel.frozen": "replicate"}
    if shard > target.gpus_per_node and target.world_size % target.gpus_per_node == 0:
        mesh = {"parallel.dp_replicate": target.world_size // target.gpus_per_node, "parallel.dp_shard": target.gpus_per_node}
        yield mesh | ({"parallel.reshard_after_forward": "default"} if isinstance(parallel.reshard_after_forward, int) else {})


def _together(predict: Any, singles: list[Alternative]) -> list[Alternative]:
    """The single changes added to each other, the one that saves most first, until they fit or none is left."""
    settings: dict[str, Any] = {}
    for single in singles:
        if not settings.keys() & single.settings.keys():
            settings = {**settings, **single.settings}
            if len(settings) > len(single.settings):
                one = predict(settings)
                if one.fits or one.settings.keys() >= {key for other in singles for key in other.settings}:
                    return [one]
    return []


def _seconds(prediction: Prediction) -> float:
    return prediction.time.total if prediction.time else 0.0
