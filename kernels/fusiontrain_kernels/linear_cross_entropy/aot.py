"""What `make aot` compiles of linear_cross_entropy: the softmax over bfloat16 logits."""

from __future__ import annotations

from collections.abc import Iterator

import triton.language as tl

from fusiontrain_kernels._aot import Case
from fusiontrain_kernels.linear_cross_entropy import triton_kernels as kernels


def cases(architecture: int) -> Iterator[Case]:
    """The same for every architecture: bound by memory, no products."""
    del architecture
    pointers = {"logits": "*bf16", "labels": "*i64", "loss_weights": "*fp32", "losses": "*fp32"}
    constants = {"Z_LOSS": 0.0, "DIFFERENTIATE": True, "ACC": tl.float32, "BLOCK": kernels.BLOCK}
    yield Case("softmax loss", kernels.softmax_loss, pointers, constants, kernels.WARPS, tensor_cores=False)
