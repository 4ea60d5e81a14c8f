"""Trained models where they lie: a checkpoint, an exported folder or a Llama, declared and ready to be read tensor by tensor.

What is loaded, exported and imported all comes from here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from fusiontrain.config.load import load, to_yaml
from fusiontrain.config.schema import Config, KernelsConfig
from fusiontrain.config.validate import SHAPE_FIELDS
from fusiontrain.data.tokenizer import BYTES
from fusiontrain.models.base import base_slices, is_exported, verify_exported
from fusiontrain.models.build import CPU, declare_model, first_weights
from fusiontrain.models.fusion import FusionModel
from fusiontrain.models.llama_weights import CONFIG_FILE as LLAMA_CONFIG
from fusiontrain.train import ema
from fusiontrain.train.checkpoint import CONFIG, MANIFEST, DamagedCheckpoint, list_checkpoints, read_manifest, verify_checkpoint
from fusiontrain.train.checkpoint.base import find_copy, replace_base
from fusiontrain.train.identity import model_identity, require_same_model
from fusiontrain.train.stored_tensors import StoredTensors
from fusiontrain.utils.errors import UserError

VAE = "vae"
"""Folder of an exported model's autoencoder."""


@dataclass(frozen=True)
class Source:
    """A model that is declared (its parameters have no memory) and where each of them is.

    config: as it was trained with, folders where they are now. dtypes: as stored, by parameter. read: name -> the whole parameter on the CPU.
    step: None where that is not known. config_text: the config.yaml that an export gets; None for a Llama of others, whose config says no more than
    that it is one.
    """

    folder: Path
    config: Config
    model: FusionModel
    dtypes: Mapping[str, torch.dtype]
    read: Callable[[str], torch.Tensor]
    step: int | None = None
    config_text: str | None = None

    @property
    def has_config(self) -> bool:
        return self.config_text is not None


def open_source(path: str | Path, averaged: bool = False, device: torch.device = CPU) -> Source:
    """The newest checkpoint of a run folder, a checkpoint, or an exported folder, verified; the former with the averages of its weights if `averaged`.

    device: where the model is going to run. Raises UserError where there is none of them, for damage, and for averages that were not kept.
    """
    folder = Path(path)
    if not (folder / LLAMA_CONFIG).is_file():
        return open_checkpoint(find_checkpoint(folder), averaged, device)
    if averaged:
        raise UserError(f"{folder}: is an exported model, which has one kind of weights: leave --ema out, or export its run with --ema")
    return open_folder(folder, device)


def find_checkpoint(folder: Path) -> Path:
    """The checkpoint folder that a path means: itself, or the newest of a run folder. Raises UserError where there is none."""
    if (folder / MANIFEST).is_file():
        return folder
    checkpoints = list_checkpoints(folder / "checkpoints") or list_checkpoints(folder)
    if not checkpoints:
        raise UserError(
            f"{folder}: neither a complete checkpoint nor a run with one, nor an exported model: give a folder such as RUN/checkpoints/step-00000100"
        )
    return checkpoints[-1]


def open_checkpoint(checkpoint: Path, averaged: bool = False, device: torch.device = CPU) -> Source:
    """A checkpoint, every file of it verified.

    Folders named in the config (model.base and so on) are looked for as in training, relative to the working directory, and where they
    were when the checkpoint was written. Raises UserError where they are gone or hold other weights.
    """
    manifest = read_manifest(checkpoint)
    problems = verify_checkpoint(checkpoint)
    if problems:
        raise DamagedCheckpoint(problems[0])
    config = find_folders(load(checkpoint / CONFIG), manifest["model"]["folders"], checkpoint)
    model = declare_model(without_kernels(config), device)
    parameters = dict(model.named_parameters())
    stored = {name: tensor for name, tensor in parameters.items() if tensor.requires_grad or name in manifest["model"]["tensors"]}
    require_same_model(manifest["model"], model_identity(config, stored), checkpoint)
    if averaged and ema.GROUP not in manifest["model"]:
        raise UserError(f"{checkpoint}: holds no averages of the weights (train.ema_decay was null): leave --ema out")
    tensors = StoredTensors(checkpoint)
    others = first_weights(config, model) if len(stored) < len(parameters) else None

    def read(name: str) -> torch.Tensor:
        if name in stored:
            return tensors.read(f"{ema.GROUP if averaged and parameters[name].requires_grad else 'model'}.{name}")
        assert others is not None
        return others(name, parameters[name].shape, 0, len(parameters[name])).float()

    return Source(checkpoint, config, model, dict.fromkeys(parameters, torch.float32), read, manifest["step"], to_yaml(config))


def open_folder(folder: Path, device: torch.device = CPU) -> Source:
    """An exported folder, or a Llama folder of others. Raises UserError for damage and for what does not belong to the model."""
    has_config = (folder / CONFIG).is_file()
    if is_exported(folder):
        if not has_config:
            raise UserError(f"{folder / CONFIG}: is missing: fetch the whole folder")
        verify_exported(folder)
    config = _at(folder, load(folder / CONFIG)) if has_config else _dense_config(folder)
    model = declare_model(without_kernels(config), device)
    slices = base_slices(model, config.model)
    dtypes = {name: slices[name].dtype for name, _ in model.named_parameters()}
    # As it is, with the folders that the training named: a copy of an exported folder says the same of its origin.
    text = (folder / CONFIG).read_text(encoding="utf-8") if has_config else None
    return Source(folder, config, model, dtypes, lambda name: slices[name].rows(0, slices[name].shape[0]), config_text=text)


def without_kernels(config: Config) -> Config:
    """The config with kernels that can run here: those of the training may need its GPU."""
    return config.model_copy(update={"kernels": KernelsConfig()})


def find_folders(config: Config, folders: dict[str, dict[str, str]], checkpoint: Path) -> Config:
    """`config` with its base where it is now: in the checkpoint, where the config says, or else where the checkpoint saw it."""
    base, copy = config.model.base, find_copy(checkpoint)
    if base is None or (copy is None and Path(base).is_dir()):
        return config
    remembered = copy or Path(folders["base"]["path"])
    if not remembered.is_dir():
        raise UserError(f"{checkpoint}: model.base={base} is not there (nor {remembered}): put the base model back, its weights are needed")
    return replace_base(config, remembered)


def _at(folder: Path, config: Config) -> Config:
    """The config of an exported folder, which has all that its config names."""
    image = config.model.image.model_copy(update={"vae": str(folder / VAE) if config.model.image.vae else None})
    model = config.model.model_copy(update={"base": str(folder), "image": image, **dict.fromkeys(SHAPE_FIELDS)})
    tokenizer = config.data.tokenizer.model_copy(update={"path": BYTES if config.data.tokenizer.path == BYTES else str(folder)})
    return config.model_copy(update={"model": model, "data": config.data.model_copy(update={"tokenizer": tokenizer})})


def _dense_config(folder: Path) -> Config:
    return Config.model_validate(
        {
            "model": {"recipe": "dense", "base": str(folder)},
            "data": {"sources": [{"path": "unused"}], "modalities": ["text"]},
            "train": {"steps": 1, "global_batch_sequences": 1},
        }
    )
