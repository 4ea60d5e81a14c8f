"""Without a GPU, Triton kernels run in its interpreter. It has to be said before the first kernel is defined."""

from __future__ import annotations

import importlib.util
import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

if importlib.util.find_spec("triton") is not None:
    from fusiontrain.testing.kernels import round_bfloat16_in_the_interpreter

    round_bfloat16_in_the_interpreter()
