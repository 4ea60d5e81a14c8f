"""The table of peaks: which row a device's own name finds, in which precision, and that nothing is invented for others."""

from __future__ import annotations

import pytest
import torch

from fusiontrain.train.devices import PEAKS, find_peaks, peak_flops
from fusiontrain.train.estimate.hardware import DEVICES

NAMES = {
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA A100-PCIE-40GB": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H100 PCIe": "h100-pcie",
    "NVIDIA H100 NVL": "h100-nvl",
    "NVIDIA H200": "h200",
    "NVIDIA H200 NVL": "h200-nvl",
    "NVIDIA GH200 480GB": "h200",
    "NVIDIA B200": "b200",
    "NVIDIA GB200": "gb200",
    "AMD Instinct MI300X": "mi300",
    "AMD Instinct MI300A": "mi300a",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_device_finds_its_row(name: str) -> None:
    assert find_peaks(name) is PEAKS[NAMES[name]]


@pytest.mark.parametrize("name", ["NVIDIA H800", "NVIDIA A100X", "NVIDIA GeForce RTX 4090", "NVIDIA B300", "AMD Instinct MI325X", ""])
def test_what_is_not_in_the_table_is_not_known(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert peak_flops(torch.device("cuda", 0), "bfloat16") is None
    assert peak_flops(torch.device("cpu"), "bfloat16") is None


def test_the_precision_that_products_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    device = torch.device("cuda", 0)
    found = {}
    for setting in ("highest", "high"):
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda setting=setting: setting)
        found[setting] = [peak_flops(device, precision) for precision in ("bfloat16", "float32")]
    assert found == {"highest": [989e12, 67e12], "high": [989e12, 494e12]}


def test_every_row_is_plausible_and_says_where_it_is_from() -> None:
    for peaks in PEAKS.values():
        assert peaks.bfloat16 >= 1.9 * peaks.tf32 > 1.9 * peaks.float32 and peaks.source
    estimated = {key: device.peak_flops["bfloat16"] for key, device in DEVICES.items() if key != "cpu"}
    assert estimated == {key: PEAKS[key].bfloat16 for key in estimated}
