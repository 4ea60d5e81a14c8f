"""The gate that compiles kernels for GPUs that are not here: it lets the core configs pass, and it can say no. `make aot` runs all of it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from fusiontrain_kernels import _aot

ROOT = Path(__file__).parents[2]
CORE = (
    r"^(attention \w+ D=128 .*|gemm (forward|dgrad|wgrad|wgrad add|swiglu)|rms_norm( backward)? 4096|rms_norm partials|"
    r"qk norm rope 32x128( backward)?|swiglu( backward)?|softmax loss)$"
)
"""One row of every kernel, at the tiles of the architecture."""
REFUSED = """
from dataclasses import replace
from fusiontrain_kernels._aot import measure
from fusiontrain_kernels.modality_gemm.aot import cases, variants
from fusiontrain_kernels.modality_gemm.configs import CONFIGS
tall = {name: config._replace(columns=256) for name, config in CONFIGS[90].items()}
deep = {name: config._replace(stages=4) for name, config in CONFIGS[90].items()}
(spilling,) = [case for case in variants(tall, "bf16") if case.name == "gemm wgrad add"]
(large,) = [case for case in variants(deep, "bf16") if case.name == "gemm forward"]
(plain,) = [case for case in cases(80) if case.name == "gemm forward fp32"]
for case, target in ((spilling, "cuda:90"), (large, "cuda:86"), (replace(plain, tensor_cores=True), "cuda:80")):
    print(measure(case, target).faults)
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Without the interpreter, whose kernels cannot be compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT / "kernels")
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90", "cuda:100"])
def test_core_configs_fit(target: str) -> None:
    done = run("-m", "fusiontrain_kernels._aot", "--json", "--only", CORE, target)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 17
    assert not any(result["faults"] for result in found)


def test_every_kernel_is_in_the_core() -> None:
    for target in _aot.DEFAULT_TARGETS:
        shipped = list(_aot.shipped_cases(target))
        assert {id(case.kernel) for case in shipped} == {id(case.kernel) for case in shipped if re.search(CORE, case.name)}


def test_the_gate_says_no() -> None:
    """To a tile that spills, to one of an H100 on a smaller GPU, and to products without tensor cores."""
    done = run("-c", REFUSED)
    assert done.returncode == 0, done.stderr
    spills, too_large, plain = done.stdout.splitlines()
    assert "spills" in spills and "shared memory" in too_large and "tensor-core" not in spills
    assert plain == "['no tensor-core instruction']"


def test_the_exit_code_is_that_of_the_worst() -> None:
    """A fault anywhere is 1, nothing to compile is 1 too, and the interpreter's flag is refused."""
    code = """
import sys
from fusiontrain_kernels import _aot
_aot.measure = lambda case, target: _aot.Resources(case.name, target, 1, 0, 0, 1, 1, ["spills"] * (target in sys.argv[1:] and "dq" in case.name))
print([_aot.main(["--only", name, "cuda:80", "hip:gfx942"]) for name in ("attention", "softmax", "no such kernel")], file=sys.stderr)
"""
    assert run("-c", code, "cuda:80").stderr.splitlines()[-1] == "[1, 0, 1]"
    assert run("-c", code, "hip:gfx942").stderr.splitlines()[-1] == "[0, 0, 1]"
    refused = subprocess.run(
        [sys.executable, "-m", "fusiontrain_kernels._aot"],
        env={**os.environ, "PYTHONPATH": str(ROOT / "kernels"), "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert refused.returncode == 2 and "TRITON_INTERPRET is set" in refused.stderr
