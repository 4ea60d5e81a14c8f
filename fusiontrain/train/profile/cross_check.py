"""Our count of a forward beside DeepSpeed's, which looks at the functions of torch that a model calls."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
from typing import Any
from unittest import mock

import torch

from fusiontrain.modality import table_of
from fusiontrain.models import fusion
from fusiontrain.models.flops import ATTENTION, flops_by_part
from fusiontrain.models.fusion import FusionModel
from fusiontrain.models.layers import prefix
from fusiontrain.parallel.deepspeed import import_deepspeed
from fusiontrain.parallel.fsdp import free_gathered
from fusiontrain.train.trainer import Trainer
from fusiontrain.types import Batch


def cross_check(trainer: Trainer, batch: Batch) -> dict[str, Any] | None:
    """FLOPs of a forward over `batch` without its attention, by both counts; None without DeepSpeed, and where weights or calls are not there to be
    counted: ZeRO 3, compiled blocks.

    DeepSpeed does not see inside operators, so products run as the reference, and it knows no masks, so attention does not run at all; padding counts, for it
    is computed. All ranks call this together.
    """
    parallel = trainer.config.parallel
    if importlib.util.find_spec("deepspeed") is None or (parallel.engine == "deepspeed" and parallel.zero_stage == 3) or parallel.compile:
        return None
    model, device = trainer.model, trainer.ranks.device
    assert isinstance(model, FusionModel)
    import_deepspeed(device)
    from deepspeed.profiling.flops_profiler import FlopsProfiler

    profiler = FlopsProfiler(model)
    with contextlib.ExitStack() as undo:
        undo.enter_context(torch.no_grad())
        undo.enter_context(mock.patch.object(model, "kernels", dataclasses.replace(model.kernels, gemm="reference")))
        for module in (fusion, prefix):
            undo.enter_context(mock.patch.object(module, "masked_routing_attention", lambda q, *_, **__: q))
        with contextlib.redirect_stdout(io.StringIO()):
            profiler.start_profile()
        undo.callback(profiler.end_profile)
        model(batch.to(device))
        theirs = 2 * profiler.get_total_macs()
    free_gathered(model)
    bounds = batch.modality_bounds
    with_padding = dataclasses.replace(batch, token_counts={m.name: bounds[m.id + 1] - bounds[m.id] for m in table_of(batch.token_counts)})
    ours = sum(flops.forward for part, flops in flops_by_part(model, with_padding).items() if part.group != ATTENTION)
    return {"forward_flops": ours, "deepspeed_forward_flops": theirs, "ratio": ours / theirs if theirs else None}
