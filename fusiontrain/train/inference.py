"""A trained model for use, in one process: what sampling, evaluation and export start from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fusiontrain.config.load import load
from fusiontrain.config.schema import Config, KernelsConfig
from fusiontrain.data.tokenizer import Tokenizer, load_tokenizer
from fusiontrain.models.build import build_model
from fusiontrain.models.fusion import FusionModel
from fusiontrain.parallel.mesh import Ranks
from fusiontrain.train import ema
from fusiontrain.train.checkpoint import CONFIG, MANIFEST, list_checkpoints, load_checkpoint, read_manifest
from fusiontrain.train.identity import model_identity, require_same_model
from fusiontrain.train.state import model_tensors
from fusiontrain.utils.errors import UserError


@dataclass(frozen=True)
class Trained:
    """A model in evaluation mode on the CPU in float32, and what belongs to it."""

    model: FusionModel
    config: Config
    tokenizer: Tokenizer
    checkpoint: Path


def find_trained(path: str | Path) -> Path:
    """The checkpoint folder that `path` means: itself, or the newest of a run folder. Raises UserError where there is none."""
    folder = Path(path)
    if (folder / MANIFEST).is_file():
        return folder
    checkpoints = list_checkpoints(folder / "checkpoints") or list_checkpoints(folder)
    if not checkpoints:
        raise UserError(f"{folder}: neither a complete checkpoint nor a run with one: give a folder such as RUN/checkpoints/step-00000100")
    return checkpoints[-1]


def load_for_inference(path: str | Path, averaged: bool = False) -> Trained:
    """The model of a checkpoint or run folder, if `averaged` with the moving average of its weights; no process group is needed.

    Folders named in the config (model.base and so on) are looked for as in training, relative to the working directory, and where they
    were when the checkpoint was written. Raises UserError where they are gone or hold other weights, and for averages that were not kept.
    """
    checkpoint = find_trained(path)
    manifest = read_manifest(checkpoint)
    config = find_folders(load(checkpoint / CONFIG), manifest["model"]["folders"], checkpoint)
    model = build_model(config.model_copy(update={"kernels": KernelsConfig()}))  # those of the training may need its GPU
    tensors = model_tensors(model, dict(model.named_parameters()), include_frozen=config.model.base is None)
    require_same_model(manifest["model"], model_identity(config, tensors), checkpoint)
    if averaged and ema.GROUP not in manifest["model"]:
        raise UserError(f"{checkpoint}: holds no averages of the weights (train.ema_decay was null): leave --ema out")
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad and averaged}
    groups = {"model": tensors.keys() - trains, ema.GROUP: trains}
    load_checkpoint(checkpoint, {group: {name: tensors[name] for name in names} for group, names in groups.items() if names}, Ranks())
    return Trained(model.eval(), config, load_tokenizer(config), checkpoint)


def find_folders(config: Config, folders: dict[str, dict[str, str]], checkpoint: Path) -> Config:
    """`config` with its base where it is now: where the config says, or else where the checkpoint saw it."""
    base = config.model.base
    if base is None or Path(base).is_dir():
        return config
    remembered = folders["base"]["path"]
    if not Path(remembered).is_dir():
        raise UserError(f"{checkpoint}: model.base={base} is not there (nor {remembered}): put the base model back, its weights are needed")
    return config.model_copy(update={"model": config.model.model_copy(update={"base": remembered})})
