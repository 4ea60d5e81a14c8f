"""What the rate of a part is compared with: the data sheet of the device, or on a CPU a product that is measured."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from fusiontrain.parallel.fsdp import DTYPES
from fusiontrain.train.devices import find_peaks, peak_flops

SIZE, REPEATS = 768, 60


@dataclass(frozen=True)
class Peak:
    """FLOP/s of one rank's device, None where nobody knows; source: where the number is from."""

    flops: float | None
    source: str


def peak_of(device: torch.device, precision: str) -> Peak:
    """Of a GPU what is published and null for others; of a CPU, which has no such number, the best of a few products, while other ranks measure too."""
    if device.type == "cpu":
        source = f"measured here: the best of {REPEATS} products of {SIZE} x {SIZE} in {precision} on {torch.get_num_threads()} threads"
        return Peak(measured_gemm(DTYPES[precision]), source)
    name = torch.cuda.get_device_name(device)
    peaks = find_peaks(name)
    return Peak(peak_flops(device, precision), f"{name} is not in the table of peaks" if peaks is None else f"{name}: {peaks.source}")


def measured_gemm(dtype: torch.dtype) -> float:
    """FLOP/s of the best of a few matrix products on the CPU."""
    a, b = (torch.ones(SIZE, SIZE, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - started)
    return 2 * SIZE**3 / best
