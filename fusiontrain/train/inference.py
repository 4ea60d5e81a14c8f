"""A trained model for use, in one process: what sampling, evaluation and `fusiontrain.load` start from."""

from __future__ import annotations

from pathlib import Path

import torch

from fusiontrain.data.tokenizer import load_tokenizer
from fusiontrain.train.sources import open_source
from fusiontrain.train.trained import Trained
from fusiontrain.utils.errors import UserError


def load_for_inference(
    path: str | Path, averaged: bool = False, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> Trained:
    """The model of a checkpoint, run or exported folder, if `averaged` with the moving average of its weights; no process group is needed.

    dtype: of the weights and of what is computed, float32 or bfloat16; None: as stored. Tensors are read, cast and moved one by one. Raises
    UserError for what `open_source` refuses, for a device that is not there, and for a Llama folder that says nothing of its training.
    """
    device = usable_device(device)
    source = open_source(path, averaged, device)
    if not source.has_config:
        raise UserError(f"{source.folder}: is a Llama without a FusionTrain config: start a training from it with model.base={source.folder}")
    tokenizer = load_tokenizer(source.config)
    tensors = {name: source.read(name).to(device, dtype or source.dtypes[name]) for name, _ in source.model.named_parameters()}
    # Whatever else is in the state, such as persistent buffers, would have to be stored and read too: strict refuses to go without.
    source.model.load_state_dict(tensors, strict=True, assign=True)
    return Trained(source.model.to(device).eval(), source.config, tokenizer, source.folder)


def usable_device(device: str | torch.device) -> torch.device:
    """The device of that name. Raises UserError where torch knows none of that name, or has none here."""
    try:
        named = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"device {str(device)!r}: torch knows none of that name: give cpu, cuda, or cuda:N") from error
    if named.type == "cuda":
        count = torch.cuda.device_count()
        if count == 0:
            raise UserError(f"device {str(device)!r}: torch sees no CUDA device here: give device='cpu', or see `fusiontrain doctor`")
        if (named.index or 0) >= count:
            raise UserError(f"device {str(device)!r}: there are {count} CUDA devices here: give cuda:0{f' to cuda:{count - 1}' if count > 1 else ''}")
    try:
        torch.empty(0, device=named)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device {str(device)!r}: cannot be used here ({str(error).splitlines()[0]}): give device='cpu'") from error
    return named
