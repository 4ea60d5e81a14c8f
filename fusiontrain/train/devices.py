"""How fast devices are: the one table that metrics, estimates and profiles read. What is not in it is not known, and never guessed."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

TERA = 1e12


@dataclass(frozen=True)
class Peaks:
    """Dense matrix products (no sparsity) of one device, FLOP/s.

    pattern: a regular expression that its name in CUDA or ROCm matches. float32: without TF32. source: where the numbers are published.
    """

    pattern: str
    bfloat16: float
    tf32: float
    float32: float
    source: str

    def of(self, precision: str, tf32: bool = False) -> float:
        """precision: "bfloat16" or "float32"; tf32: whether products of float32 numbers may use it."""
        return self.bfloat16 if precision == "bfloat16" else self.tf32 if tf32 else self.float32


def _peaks(pattern: str, bfloat16: float, tf32: float, float32: float, source: str) -> Peaks:
    return Peaks(pattern, bfloat16 * TERA, tf32 * TERA, float32 * TERA, source)


PEAKS = {
    "a100": _peaks(r"\bA100\b", 312, 156, 19.5, "NVIDIA A100 Tensor Core GPU data sheet"),
    "h100-pcie": _peaks(r"\bH100 PCIe\b", 756, 378, 51, "NVIDIA H100 Tensor Core GPU data sheet, PCIe; half of the figures with sparsity"),
    "h100-nvl": _peaks(r"\bH100 NVL\b", 835, 417, 60, "NVIDIA H100 Tensor Core GPU data sheet, NVL; half of the figures with sparsity"),
    "h100": _peaks(r"\bH100\b", 989, 494, 67, "NVIDIA H100 Tensor Core GPU data sheet, SXM; half of the figures with sparsity"),
    "h200-nvl": _peaks(r"\bH200 NVL\b", 835, 417, 60, "NVIDIA H200 Tensor Core GPU data sheet, NVL; half of the figures with sparsity"),
    "h200": _peaks(r"\bG?H200\b", 989, 494, 67, "NVIDIA H200 Tensor Core GPU data sheet, SXM; half of the figures with sparsity"),
    "b200": _peaks(r"\bB200\b", 2250, 1100, 75, "NVIDIA Blackwell data sheet, HGX B200; half of the figures with sparsity"),
    "gb200": _peaks(r"\bGB200\b", 2500, 1250, 80, "NVIDIA Blackwell data sheet, GB200; half of the figures with sparsity"),
    "mi300a": _peaks(r"\bMI300A\b", 980.6, 490.3, 122.6, "AMD Instinct MI300A data sheet"),
    "mi300": _peaks(r"\bMI300X\b", 1307.4, 653.7, 163.4, "AMD Instinct MI300X data sheet"),
}
"""By key; the first whose pattern matches a device's name. Vendors' figures for the whole device at its highest clock."""


def find_peaks(name: str) -> Peaks | None:
    """The row of a device by the name that it gives itself; None where there is none."""
    return next((peaks for peaks in PEAKS.values() if re.search(peaks.pattern, name)), None)


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Dense FLOP/s of a device in `precision` under torch's present setting of TF32, or None where it is not known."""
    if device.type != "cuda":
        return None
    peaks = find_peaks(torch.cuda.get_device_name(device))
    return None if peaks is None else peaks.of(precision, torch.get_float32_matmul_precision() != "highest")
