"""Which model a checkpoint belongs to, and the sentence that says why another one does not fit."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from fusiontrain.config.load import load
from fusiontrain.config.schema import Config
from fusiontrain.config.validate import uses_images
from fusiontrain.models.base import is_exported
from fusiontrain.train.checkpoint.manifest import CONFIG
from fusiontrain.utils.errors import UserError

PREDICTION_KEYS = ("image", "prediction", "num_timesteps")
"""Keys of the objective section that say what the numbers mean which the model puts out for an image."""
PATH_KEYS = ("base", "vae")
"""Keys of the model section that name folders: they may move, so folders are compared by their content."""
TRAINING_KEYS = ("dropout",)
"""Keys of the model section that say how it is trained, and nothing of what it is."""


def model_identity(config: Config, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Recipe, model section, what is predicted of images, stored tensors (name -> shape) and the content of the folders the model was loaded from."""
    folders = {"base": config.model.base, "vae": config.model.image.vae}
    return {
        "recipe": config.model.recipe,
        "config": config.model.model_dump(mode="json"),
        "objective": {key: getattr(config.objective, key) for key in PREDICTION_KEYS},
        "tensors": {name: list(tensor.shape) for name, tensor in sorted(tensors.items())},
        "folders": {name: folder_identity(Path(path)) for name, path in folders.items() if path is not None},
    }


def folder_identity(folder: Path) -> dict[str, str]:
    """Absolute path of a folder of weights and the sha256 over its safetensors files (names and contents)."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder}: no .safetensors file found: give the folder that the model was loaded from")
    digest = hashlib.sha256()
    with ThreadPoolExecutor() as pool:
        for file, content in zip(files, pool.map(sha256_of, files), strict=True):
            digest.update(f"{file.name}\0{content}\0".encode())
    return {"path": str(folder.resolve()), "sha256": digest.hexdigest()}


def sha256_of(path: Path) -> str:
    """sha256 of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_same_model(saved: Mapping[str, Any], current: Mapping[str, Any], checkpoint: Path) -> None:
    """Raise a UserError that names the first difference between a checkpoint's model and this run's."""
    difference = first_difference(saved, current)
    if difference:
        raise UserError(
            f"{checkpoint}: is a checkpoint of another model: {difference}: give the config it was trained with, "
            "or start anew with another run.dir"
        )


def other_objective_of_base(config: Config) -> str | None:
    """A sentence where `model.base` is an exported model that learnt to predict something else of images than this run asks for; it may go on from there."""
    base = config.model.base
    if base is None or not uses_images(config) or not is_exported(base) or not (Path(base) / CONFIG).is_file():
        return None
    there, here = load(Path(base) / CONFIG), config
    found = [key for key in PREDICTION_KEYS if getattr(there.objective, key) != getattr(here.objective, key)]
    if not found or not uses_images(there):
        return None
    was, now = (", ".join(f"objective.{key}={getattr(each.objective, key)}" for key in found) for each in (there, here))
    return f"model.base={base} learnt with {was}; with {now} its image side has to learn anew what it predicts"


def first_difference(saved: Mapping[str, Any], current: Mapping[str, Any]) -> str | None:
    """The first thing in which two model identities differ, in words; None where they agree."""
    there, here = _flatten(saved["config"]), _flatten(current["config"])
    for key in sorted({*there, *here}, key=lambda key: (key != "recipe", key)):
        if key.rpartition(".")[2] not in (*PATH_KEYS, *TRAINING_KEYS) and there.get(key) != here.get(key):
            return f"model.{key} is {there.get(key)!r} there and {here.get(key)!r} here"
    for key in PREDICTION_KEYS:
        if saved["objective"][key] != current["objective"][key]:
            return f"objective.{key} is {saved['objective'][key]!r} there and {current['objective'][key]!r} here"
    for name in sorted({*saved["folders"], *current["folders"]}):
        before, now = saved["folders"].get(name, {}), current["folders"].get(name, {})
        if before.get("sha256") != now.get("sha256"):
            return f"its {name} was {before.get('path', 'not set')}, and {now.get('path', 'no folder')} has other weights"
    before_shapes, now_shapes = saved["tensors"], current["tensors"]
    for name in sorted({*before_shapes, *now_shapes}):
        if before_shapes.get(name) != now_shapes.get(name):
            return f"{name} is {before_shapes.get(name, 'absent')} there and {now_shapes.get(name, 'absent')} here"
    return None


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat
