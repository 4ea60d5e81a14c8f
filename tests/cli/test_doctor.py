"""`fusiontrain doctor` says of every operator what can run here, and why the rest cannot."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest
import torch

from fusiontrain.cli import doctor
from fusiontrain.cli.main import main
from fusiontrain_kernels.choices import IMPLEMENTATIONS

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")


def kernels_of(capsys) -> dict[str, dict]:
    assert main(["doctor", "--json"]) == 0
    return {operator["key"]: operator for operator in json.loads(capsys.readouterr().out)["kernels"]}


def test_json_names_every_implementation_and_why_it_cannot_run(capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    found = kernels_of(capsys)
    assert {operator["operator"]: tuple(operator["implementations"]) for operator in found.values()} == IMPLEMENTATIONS
    for operator in found.values():
        reasons = dict(operator["implementations"])
        assert "GPU" in reasons.pop("triton")
        assert all(why is None for name, why in reasons.items() if name not in ("flex", "flash"))
        assert operator["auto"] in reasons


def test_triton_can_run_in_its_interpreter_but_auto_does_not_take_it(capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found = kernels_of(capsys)
    assert all(operator["implementations"]["triton"] is None for operator in found.values())
    assert "triton" not in {operator["auto"] for operator in found.values()}


def test_the_table_says_each_reason_once(capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [" ".join(line.split()) for line in lines if line.startswith("attention")] == ["attention masked_routing_attention chunked (auto), sdpa, reference"]
    (line,) = [line for line in lines if "Triton kernels run on a GPU" in line]
    assert line.startswith("not triton (attention, gemm, norm, qk_norm_rope, rope, swiglu, cross_entropy): ")


def test_deepspeed_is_usable_or_there_is_a_reason(capsys, monkeypatch):
    assert main(["doctor", "--json"]) == 0
    (check,) = [check for check in json.loads(capsys.readouterr().out)["checks"] if check["name"] == "deepspeed"]
    installed = importlib.util.find_spec("deepspeed") is not None
    assert check["status"] == ("ok" if installed else "warn")
    assert ("parallel.engine=deepspeed" if installed else "pip install 'fusiontrain[deepspeed]'") in check["detail"]
    monkeypatch.setattr(doctor, "_installed", lambda name: "0.0")
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # as if its import failed
    (broken,) = doctor._deepspeed()
    assert broken.status == "warn" and "cannot be imported" in broken.detail and "fsdp2" in broken.detail
