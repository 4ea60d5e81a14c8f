"""Triton's interpreter rounds bfloat16 as a GPU does."""

from __future__ import annotations

import importlib.util

if importlib.util.find_spec("triton") is not None:
    from fusiontrain.testing.kernels import round_bfloat16_in_the_interpreter

    round_bfloat16_in_the_interpreter()
