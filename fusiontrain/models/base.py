"""What `model.base` may be: a Hugging Face Llama folder, from which every recipe starts, or a model of the same recipe that was exported.

An exported folder holds every parameter under its own name. Its `config.json` says recipe, shape, and size and sha256 of every file of tensors;
`config.yaml` beside it says how it was trained.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fusiontrain.config.schema import ModelConfig
from fusiontrain.models.llama_weights import CONFIG_FILE, llama_slices, read_config_json, read_llama_shape
from fusiontrain.models.plan import ReadRows
from fusiontrain.models.shape import ModelShape, RopeScaling
from fusiontrain.models.tensor_files import Stored, open_tensors
from fusiontrain.utils.errors import UserError

if TYPE_CHECKING:
    from fusiontrain.models.fusion import FusionModel

MODEL_TYPE = "fusiontrain"
FORMAT_VERSION = 1


def is_exported(folder: str | Path) -> bool:
    """Whether a folder is an exported model under FusionTrain's own names."""
    return (Path(folder) / CONFIG_FILE).is_file() and read_config_json(str(folder)).get("model_type") == MODEL_TYPE


def exported_config(recipe: str, shape: ModelShape, files: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What `config.json` of an exported folder says; files: as `write_tensors` returns them."""
    return {"model_type": MODEL_TYPE, "format_version": FORMAT_VERSION, "recipe": recipe, "shape": dataclasses.asdict(shape), "files": dict(files)}


def base_shape(folder: str) -> ModelShape:
    """The shape of the model in a folder. Raises UserError for what is no model, or not one of this version."""
    if not is_exported(folder):
        return read_llama_shape(folder)
    shape = dict(_read_exported(folder)["shape"])
    scaling = shape.pop("rope_scaling")
    return ModelShape(**shape, rope_scaling=None if scaling is None else RopeScaling(**scaling))


def base_slices(model: FusionModel, config: ModelConfig) -> dict[str, Stored]:
    """The tensor of `config.base` that each parameter of `model` starts from. Raises UserError where the folder does not fit the model."""
    folder = config.base
    assert folder is not None
    if not is_exported(folder):
        return llama_slices(model, folder)
    recipe = _read_exported(folder)["recipe"]
    if recipe != config.recipe:
        raise UserError(
            f"model.base={folder}: is a {recipe} model, and model.recipe is {config.recipe}: a recipe starts from its own kind or from a Llama, "
            "which `checkpoint export --format huggingface` makes of the text side"
        )
    slices = open_tensors(Path(folder))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name in sorted(shapes.keys() | slices.keys()):
        there, here = slices[name].shape if name in slices else "absent", shapes.get(name, "absent")
        if there != here:
            raise UserError(f"{folder}: {name} is {_words(there)} there and {_words(here)} in the configured model: give the config it was exported with")
    return slices


def base_weights(model: FusionModel, config: ModelConfig, others: ReadRows) -> ReadRows:
    """Where `model` starts on top of `config.base`, read slice by slice; what the folder has nothing for is taken from `others`."""
    slices = base_slices(model, config)

    def read_rows(name: str, shape: torch.Size, first: int, last: int) -> torch.Tensor:
        return slices[name].rows(first, last) if name in slices else others(name, shape, first, last)

    return read_rows


def verify_exported(folder: Path) -> None:
    """Compare every file of tensors of an exported folder with its checksum. Raises UserError naming the first that differs."""
    for name, entry in _read_exported(str(folder))["files"].items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path}: is missing: export the model again, or fetch the file again")
        if path.stat().st_size != entry["size"] or _sha256(path) != entry["sha256"]:
            raise UserError(f"{path}: is not what was exported ({CONFIG_FILE} knows its size and sha256): it is damaged, fetch it again")


def _read_exported(folder: str) -> dict[str, Any]:
    config, path = read_config_json(folder), Path(folder) / CONFIG_FILE
    if config.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{path}: has format {config.get('format_version')}, this version reads {FORMAT_VERSION}: export it again with this version")
    fields = {field.name for field in dataclasses.fields(ModelShape)}
    if not isinstance(config.get("files"), dict) or not isinstance(config.get("shape"), dict) or set(config["shape"]) != fields:
        raise UserError(f"{path}: lacks what an exported model's says: it is damaged, fetch it again")
    return config


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _words(shape: Any) -> str:
    return shape if isinstance(shape, str) else json.dumps(list(shape))
