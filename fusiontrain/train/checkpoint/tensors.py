"""What of a run's tensors is handed to torch.distributed.checkpoint, and how it is called."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping

import torch

Tensors = Mapping[str, Mapping[str, torch.Tensor]]
"""{"model": {name: tensor}, "optimizer": {name.key: tensor}}"""

TENSOR_FILES = ".distcp"
METADATA = ".metadata"
"""torch's names: of the files that hold tensors, one per rank, and of the one that says what is where."""


def alone() -> bool:
    """Whether there is no process group."""
    return not torch.distributed.is_initialized()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """torch warns at every save that a world of one does not communicate."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="torch.distributed.checkpoint")
        yield
