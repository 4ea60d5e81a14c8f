"""The gated activation of a Llama feed-forward (Shazeer, arXiv 2002.05202)."""

from __future__ import annotations

import torch

from fusiontrain_kernels._dispatch import choose
from fusiontrain_kernels._launch import auto_triton, require_triton
from fusiontrain_kernels._segments import check_like
from fusiontrain_kernels.swiglu import reference


def _triton(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    require_triton("swiglu", gate)
    from fusiontrain_kernels.swiglu import triton_ops

    return triton_ops.swiglu(gate, up)


_IMPLEMENTATIONS = {"reference": reference.swiglu, "triton": _triton}


def swiglu(gate: torch.Tensor, up: torch.Tensor, *, impl: str = "auto") -> torch.Tensor:
    """`silu(gate) * up`, elementwise; both [T, F] of one dtype -> [T, F].

    impl: auto (triton on a GPU, else reference), reference, triton. Raises ValueError for another impl, where triton cannot
    run, for a gate that is not [T, F], and for an up that is not like it.
    """
    implementation = choose("swiglu", _IMPLEMENTATIONS, impl, auto=auto_triton(gate, "reference"))
    if gate.dim() != 2:
        raise ValueError(f"swiglu: gate: must be [T, F], not {list(gate.shape)}")
    check_like("swiglu", "up", up, tuple(gate.shape), gate, "gate")
    return implementation(gate, up)
