"""Names for the parts of a running step, put around them while a profile is taken and taken off again: training itself knows nothing of them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.profiler import record_function

from fusiontrain.modality import IMAGE, MODALITIES, TEXT, table_of
from fusiontrain.models import fusion
from fusiontrain.models.flops import ATTENTION, FEED_FORWARD, HEAD, PATCHER, PROJECTIONS
from fusiontrain.models.fusion import FusionModel
from fusiontrain.models.layers import prefix
from fusiontrain.models.layers.size import num_products
from fusiontrain.models.layers.untied import UntiedLinear, UntiedRMSNorm
from fusiontrain.train import step
from fusiontrain.train import trainer as trainer_module
from fusiontrain.train.profile.host import SCOPE
from fusiontrain.train.profile.parts import (
    AUTOENCODER,
    CHECKPOINT,
    COMPILED,
    EMBEDDING,
    IMAGE_LOSS,
    METRICS,
    MODEL,
    NORMS,
    OPTIMIZER,
    TO_DEVICE,
    Call,
    whole,
)
from fusiontrain.train.trainer import Trainer
from fusiontrain.types import Batch

Shares = Callable[[], Call]


class Scopes:
    """`calls`: every call of a part so far, in order; its number is in the name of its scope."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.calls = trainer, list[Call]()
        self._batch: Batch | None = None

    @contextlib.contextmanager
    def open(self, call: Call) -> Iterator[None]:
        """Whatever runs meanwhile belongs to `call`, unless a scope inside says otherwise."""
        self.calls.append(call)
        with record_function(f"{SCOPE}{call.group} #{len(self.calls) - 1}"):
            yield

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Put names around the parts of the trainer and its model while the context is open."""
        with contextlib.ExitStack() as undo:
            self._name_trainer(undo)
            model = self.trainer.model
            assert isinstance(model, FusionModel)
            self._name_model(undo, model)
            for block in model.blocks:
                if block._compiled_call_impl is not None:  # names inside would be compiled away
                    self._name(undo, block, "_compiled_call_impl", whole(COMPILED))
                else:
                    self._name_block(undo, block)
            yield

    def _name_trainer(self, undo: contextlib.ExitStack) -> None:
        trainer = self.trainer
        self._name(undo, Batch, "to", whole(TO_DEVICE))
        self._name(undo, step, "squared_norms", whole(OPTIMIZER))
        self._name(undo, step, "clip", whole(OPTIMIZER))
        if trainer.zero is None:
            self._name(undo, trainer.optimizer, "step", whole(OPTIMIZER))
            self._name(undo, trainer.optimizer, "zero_grad", whole(OPTIMIZER))
        else:
            self._name(undo, trainer.zero.engine, "step", whole(OPTIMIZER))
        self._name(undo, trainer_module, "count_flops", whole(METRICS))
        for method in ("_gather_totals", "_values", "_publish"):
            self._name(undo, trainer, method, whole(METRICS))
        self._name(undo, trainer, "_save", whole(CHECKPOINT))

    def _name_model(self, undo: contextlib.ExitStack, model: FusionModel) -> None:
        forward = model.forward

        @functools.wraps(forward)
        def remember(batch: Batch) -> Any:
            self._batch = batch
            with self.open(whole(MODEL)):
                return forward(batch)

        undo.enter_context(mock.patch.object(model, "forward", remember))
        self._name(undo, model.text, "encode", whole(EMBEDDING, TEXT.name))
        self._name(undo, model.rotary, "forward", whole(EMBEDDING))
        for module in (fusion, prefix):
            self._name(undo, module, "masked_routing_attention", whole(ATTENTION))
        self._name(undo, model.final_norm, "forward", self._by_rows(NORMS))
        self._name(undo, model.text_objective, "forward", whole(HEAD, TEXT.name))
        if model.image is not None:
            for method in ("encode", "decode"):
                self._name(undo, model.image, method, whole(PATCHER, IMAGE.name))
            for method in ("levels", "corrupt", "loss"):
                self._name(undo, model.image_objective, method, whole(IMAGE_LOSS, IMAGE.name))
            self._name(undo, fusion, "keyed_normal", whole(IMAGE_LOSS, IMAGE.name))
        if model.codec is not None:
            self._name(undo, model.codec, "encode", whole(AUTOENCODER, IMAGE.name))

    def _name_block(self, undo: contextlib.ExitStack, block: Any) -> None:
        self._name(undo, block, "forward", self._by_rows(NORMS))
        for group, module in ((PROJECTIONS, block.attention), (FEED_FORWARD, block.feed_forward)):
            linears = [child for child in module.children() if isinstance(child, UntiedLinear)]
            self._name(undo, module, "forward", self._by_products(group, linears))
        for norm in (child for child in block.children() if isinstance(child, UntiedRMSNorm)):
            for method in ("forward", "add"):
                self._name(undo, norm, method, self._by_rows(NORMS))

    def _name(self, undo: contextlib.ExitStack, owner: Any, name: str, call: Call | Shares) -> None:
        """Let a function or method open a scope as it is called. call: what it is, or a function that tells."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def named(*args: Any, **kwargs: Any) -> Any:
            with self.open(call if isinstance(call, Call) else call()):
                return function(*args, **kwargs)

        undo.enter_context(mock.patch.object(owner, name, named))

    def _rows(self) -> dict[str, int]:
        """Rows of each modality in the layer that is being called: without gradients it is the frozen prefix, else what lies behind it."""
        batch, model = self._batch, self.trainer.model
        assert batch is not None and isinstance(model, FusionModel)
        fixed = model.num_forward_only(batch)
        if not torch.is_grad_enabled():
            return {TEXT.name: fixed}
        bounds = batch.modality_bounds
        return {m.name: bounds[m.id + 1] - max(bounds[m.id], fixed * (m.id == TEXT.id)) for m in table_of(batch.token_counts)}

    def _by_rows(self, group: str) -> Shares:
        def shares() -> Call:
            rows = {name: float(count) for name, count in self._rows().items()}
            return Call(group, rows, rows)

        return shares

    def _by_products(self, group: str, layers: Sequence[UntiedLinear]) -> Shares:
        """One launch may serve all modalities: its time is divided as its products are, those of the backward by what trains."""

        def shares() -> Call:
            rows = self._rows()
            present = [modality for modality in MODALITIES if modality.name in rows]
            sizes = {m.name: [(num_products(w), w.weight.requires_grad) for w in _members(layers, m.id)] for m in present}
            forward = {name: float(count * sum(size for size, _ in sizes[name])) for name, count in rows.items()}
            backward = {name: float(count * sum(size * (1 + trained) for size, trained in sizes[name])) for name, count in rows.items()}
            return Call(group, forward, backward)

        return shares


def _members(layers: Sequence[UntiedLinear], modality: int) -> list[nn.Linear]:
    return [layer[layer.groups[modality]] for layer in layers]
