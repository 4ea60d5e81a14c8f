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
from gate import report
from segment_ops import CONFIGS, gemm_rows
tall = {name: config._replace(columns=256) for name, config in CONFIGS[90].items()}
(row,) = [row for row in gemm_rows(tall, "bf16") if row.name == "wgrad add"]
print(report(row, 90)["problems"])
deep = {name: config._replace(stages=4) for name, config in CONFIGS[90].items()}
(row,) = [row for row in gemm_rows(deep, "bf16") if row.name == "forward"]
print(report(row, 86)["problems"])
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Without the interpreter, whose kernels cannot be compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(ROOT / "kernels" / "aot")])
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize("capability", ["80", "90", "100"])
def test_core_configs_fit(capability: str) -> None:
    core = "^(forward|wgrad add|gemm swiglu|rms_norm backward 4096)$"
    done = run("kernels/aot/segment_ops.py", "--arch", capability, "--only", core)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok\n") == 4


def test_the_gate_says_no() -> None:
    """To a tile that spills, and to one of an H100 on a smaller GPU."""
    done = run("-c", SPILLING)
    assert done.returncode == 0, done.stderr
    spills, too_large = done.stdout.splitlines()
    assert "spills" in spills and "shared memory" in too_large and "tensor-core" not in spills
