"""The gate that compiles kernels for GPUs that are not here: it lets the core configs pass, and it can say no. `make aot` runs all of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
SPILLING = """
from fusiontrain_kernels._aot import measure
from fusiontrain_kernels.modality_gemm.aot import CONFIGS, variants
tall = {name: config._replace(columns=256) for name, config in CONFIGS[90].items()}
(case,) = [case for case in variants(tall, "bf16") if case.name == "gemm wgrad add"]
print(measure(case, "cuda:90").faults)
deep = {name: config._replace(stages=4) for name, config in CONFIGS[90].items()}
(case,) = [case for case in variants(deep, "bf16") if case.name == "gemm forward"]
print(measure(case, "cuda:86").faults)
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Without the interpreter, whose kernels cannot be compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90", "cuda:100"])
def test_core_configs_fit(target: str) -> None:
    core = "^gemm (forward|wgrad add|swiglu)$|^rms_norm backward 4096$|^qk norm rope backward 32x128$"
    done = run("-m", "fusiontrain_kernels._aot", target, "--only", core)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok\n") == 5


def test_the_gate_says_no() -> None:
    """To a tile that spills, and to one of an H100 on a smaller GPU."""
    done = run("-c", SPILLING)
    assert done.returncode == 0, done.stderr
    spills, too_large = done.stdout.splitlines()
    assert "spills" in spills and "shared memory" in too_large and "tensor-core" not in spills
