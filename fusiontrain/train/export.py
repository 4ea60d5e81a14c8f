"""Models out: a folder that needs nothing else, as a Hugging Face Llama or under FusionTrain's own names.

Values pass through one tensor at a time, so a model that no machine holds is exported by any machine. What is exported from an exported folder
is a copy of it, in other shards or of another dtype.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from fusiontrain.data.tokenizer import Tokenizer, load_tokenizer
from fusiontrain.models.base import exported_config, is_exported
from fusiontrain.models.llama_weights import CONFIG_FILE, is_plain_llama, llama_config, llama_names, read_config_json
from fusiontrain.models.tensor_files import MAX_SHARD_BYTES, Planned, write_tensors
from fusiontrain.train.checkpoint import CONFIG
from fusiontrain.train.sources import VAE, Source
from fusiontrain.train.tokenizer_files import write_tokenizer_files
from fusiontrain.utils.errors import UserError
from fusiontrain.utils.folders import whole_folder

Format = Literal["huggingface", "fusiontrain"]
Progress = Callable[[int, int], None]
"""(bytes written, bytes in all)"""


@dataclass(frozen=True)
class Exported:
    """What was written. files: of tensors, with size in bytes and sha256."""

    folder: Path
    format: Format
    recipe: str
    step: int | None
    tensors: int
    parameters: int
    files: Mapping[str, Mapping[str, Any]]


def natural_format(source: Source) -> Format:
    """What is exported if nobody says: a dense model as a Llama, where that is all that it is; others under their own names."""
    return "huggingface" if source.config.model.recipe == "dense" and is_plain_llama(source.model.shape) else "fusiontrain"


def export_model(
    source: Source,
    out: Path,
    kind: Format,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    progress: Progress = lambda done, total: None,
) -> Exported:
    """Write a model into the folder `out`, which is whole or not there.

    huggingface: of a model with images, its text side alone. dtype: None keeps what is stored. Raises UserError for a text side that is no Llama, a
    folder that is in use, and a disk without room.
    """
    _require_replaceable(out, source.folder, overwrite)
    model = source.model
    names = llama_names(model) if kind == "huggingface" else {name: name for name, _ in model.named_parameters()}
    tensors = [Planned(name, tuple(model.get_parameter(own).shape), dtype or source.dtypes[own]) for name, own in names.items()]
    total, done = sum(tensor.num_bytes for tensor in tensors), 0

    def count(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        progress(done, total)

    with whole_folder(out, overwrite) as folder:
        _require_room(out, folder, total)
        files = write_tensors(folder, tensors, lambda name: source.read(names[name]), max_shard_bytes, count)
        tokenizer = load_tokenizer(source.config) if source.has_config else None
        if kind == "huggingface":
            described = _hugging_face_config(source, dtype or tensors[0].dtype, tokenizer)
        else:
            described = exported_config(source.config.model.recipe, model.shape, files)
        (folder / CONFIG_FILE).write_text(json.dumps(described, indent=2) + "\n")
        write_tokenizer_files(folder, source, tokenizer, kind)
        if source.config_text is not None and (kind == "fusiontrain" or source.config.model.recipe == "dense"):
            _write_config(folder, source, source.config_text)
    parameters = sum(model.get_parameter(own).numel() for own in names.values())
    return Exported(out, kind, source.config.model.recipe, source.step, len(tensors), parameters, files)


def _write_config(folder: Path, source: Source, text: str) -> None:
    """The config as it was trained, and the autoencoder that it names: whoever loads the folder finds both there."""
    (folder / CONFIG).write_text(text, encoding="utf-8")
    vae = source.config.model.image.vae
    if vae is not None:
        shutil.copytree(vae, folder / VAE)


def _hugging_face_config(source: Source, dtype: torch.dtype, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """What the Llama that the model came from said of itself, with the shape and the dtype of this one."""
    base = source.config.model.base
    said: dict[str, Any] = {"max_position_embeddings": source.config.data.sequence_length}
    if tokenizer is not None:
        said |= {"bos_token_id": tokenizer.begin_text_id, "eos_token_id": tokenizer.end_text_id}
    if base is not None and not is_exported(base):
        said |= {key: value for key, value in read_config_json(base).items() if key not in ("dtype", "_name_or_path")}
    return said | llama_config(source.model.shape, dtype)


def _require_replaceable(out: Path, source: Path, overwrite: bool) -> None:
    """Raise UserError where `--overwrite` would delete what is no export, or what is being exported."""
    if not overwrite or not out.is_dir() or not any(out.iterdir()):
        return
    if source.resolve().is_relative_to(out.resolve()):
        raise UserError(f"{out}: holds {source}, which is to be exported: give another folder")
    if not (out / CONFIG_FILE).is_file():
        raise UserError(f"{out}: is no exported model ({CONFIG_FILE} is missing), so it is not overwritten: give another folder")


def _require_room(out: Path, folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise UserError(f"{out}: needs {num_bytes / 2**20:,.0f} MiB, and {free / 2**20:,.0f} MiB are free there: make room, or give another folder")
