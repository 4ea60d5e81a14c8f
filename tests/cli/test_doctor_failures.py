"""Each of doctor's failures on one machine, provoked."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fusiontrain.cli import doctor, doctor_machine
from fusiontrain.cli.doctor_machine import Check
from fusiontrain.cli.main import main

ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def limited(which: int, value: int):
    """The soft limit of this process, for a while."""
    before = resource.getrlimit(which)
    resource.setrlimit(which, (value, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(which, before)


@pytest.mark.parametrize(("files", "status"), [(256, "fail"), (1024, "warn"), (4096, "ok")])
def test_open_files(files, status):
    with limited(resource.RLIMIT_NOFILE, files):
        check = next(iter(doctor_machine.limits(has_cuda=False)))
    assert (check.status, str(files) in check.detail, "ulimit -n" in check.detail) == (status, True, status != "ok")


def test_locked_memory_matters_with_a_gpu():
    with limited(resource.RLIMIT_MEMLOCK, 65536):
        found = {cuda: list(doctor_machine.limits(cuda))[1] for cuda in (False, True)}
    assert found[False].status == "ok"
    assert found[True].status == "warn" and "ulimit -l unlimited" in found[True].detail


def test_core_dumps():
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    with limited(resource.RLIMIT_CORE, 0):
        assert list(doctor_machine.limits(False))[2] == Check("core dumps", "ok", "0")
    if hard == resource.RLIM_INFINITY:
        with limited(resource.RLIMIT_CORE, hard):
            assert list(doctor_machine.limits(False))[2].status == "warn"


@pytest.mark.parametrize(("mib", "status"), [(16, "fail"), (256, "warn"), (2048, "ok")])
def test_a_small_dev_shm(mib, status):
    code = "from fusiontrain.cli.doctor_machine import shared_memory\nfor check in shared_memory(): print(check.status, check.detail)"
    shell = f'mount -t tmpfs -o size={mib}m tmpfs /dev/shm && exec "$0" -c "$1"'
    command = ["unshare", "--mount", "sh", "-c", shell, sys.executable, code]
    if shutil.which("unshare") is None or subprocess.run([*command[:2], "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"], capture_output=True).returncode:
        pytest.skip("a mount namespace cannot be made here")
    result = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert result.stdout.split()[0] == status
    assert ("--shm-size" in result.stdout) == (status != "ok")


def test_a_folder_that_cannot_be_written(capsys):
    assert main(["doctor", "--quick", "--dir", "/proc", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert not report["ok"]
    assert [check["name"] for check in report["checks"] if check["status"] == "fail"] == ["folder"]


def test_a_disk_is_measured_unless_it_is_to_be_quick(tmp_path):
    assert [check.name for check in doctor_machine.folder(tmp_path, quick=False)] == ["folder", "disk"]
    assert [check.name for check in doctor_machine.folder(tmp_path, quick=True)] == ["folder"]
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_is_missing(monkeypatch):
    monkeypatch.setattr(doctor, "NEEDED", (*doctor.NEEDED, "no-such-package"))
    check = next(iter(doctor._packages()))
    assert (check.status, check.detail) == ("fail", "missing: no-such-package; run make setup")


@pytest.mark.parametrize(("code", "status"), [(0, "warn"), (9, "fail")])
def test_a_driver_that_torch_cannot_use(tmp_path, monkeypatch, code, status):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho 580.65.06\nexit {code}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("torch.version.cuda", None)
    (check,) = doctor_machine.driver()
    assert check.status == status and "580.65.06" in check.detail


def test_a_check_that_breaks_is_a_finding_and_the_others_still_run(monkeypatch, tmp_path):
    def broken():
        raise OSError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(doctor, "_torch", broken)
    found = {check.name: check for check in doctor.examine(tmp_path, quick=True)}
    assert found["torch"].status == "fail" and "libcudart" in found["torch"].detail
    assert "folder" in found


def test_a_python_or_a_torch_that_is_too_old(monkeypatch):
    (check,) = doctor._python()
    assert check.status == "ok"
    monkeypatch.setattr(doctor.sys, "version_info", (3, 10, 14))
    (check,) = doctor._python()
    assert check.status == "fail" and "use 3.11 or newer" in check.detail
    monkeypatch.setattr("torch.__version__", "2.9.1+cpu")
    check = next(iter(doctor._torch()))
    assert (check.status, check.detail) == ("fail", "2.9.1+cpu; use 2.11 or newer")


def test_a_torch_without_collectives(monkeypatch):
    monkeypatch.setattr("torch.distributed.is_gloo_available", lambda: False)
    (check,) = (check for check in doctor._communication() if check.name == "gloo")
    assert check.status == "fail" and "install a build with distributed" in check.detail


def test_an_optional_package_that_is_missing_says_what_it_is_for(monkeypatch):
    monkeypatch.setattr(doctor, "OPTIONAL", {"no-such-package": "for nothing; pip install it"})
    assert list(doctor._packages())[1] == Check("no-such-package", "warn", "not installed (for nothing; pip install it)")


def test_a_folder_that_hides_a_package(tmp_path, monkeypatch):
    (tmp_path / "kernels").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    assert "kernels" not in [check.name for check in doctor._packages()]
    (tmp_path / "kernels" / "__init__.py").touch()
    importlib.invalidate_caches()
    (check,) = (check for check in doctor._packages() if check.name == "kernels")
    assert check.status == "fail" and "rename or leave it" in check.detail


@pytest.mark.parametrize(("limit", "status"), [(1, "warn"), (64, "ok")])
def test_a_container_with_little_memory(tmp_path, monkeypatch, limit, status):
    (tmp_path / "memory.max").write_text(f"{limit << 30}\n")
    monkeypatch.setattr(doctor, "MEMORY_LIMITS", (str(tmp_path / "memory.max"), str(tmp_path / "missing")))
    monkeypatch.setattr(doctor.os, "sysconf", lambda name: {"SC_PHYS_PAGES": 1 << 25, "SC_PAGE_SIZE": 4096}[name])
    check = list(doctor._machine())[1]
    assert (check.status, check.detail.startswith(f"{limit}.0 GiB")) == (status, True)


def test_a_disk_that_is_slow_or_nearly_full(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor_machine, "SLOW_DISK_MB", 1e9)
    monkeypatch.setattr(doctor_machine, "ENOUGH_DISK_GIB", 1e9)
    found = {check.name: check for check in doctor_machine.folder(tmp_path, quick=False)}
    assert {name: check.status for name, check in found.items()} == {"folder": "warn", "disk": "warn"}
    assert "checkpoints need more" in found["folder"].detail and "use a faster folder" in found["disk"].detail


def test_a_torch_for_cuda_without_a_driver_and_with_one_that_is_too_old(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("torch.version.cuda", "13.0")
    (check,) = doctor_machine.driver()
    assert check.status == "warn" and "start the container with --gpus all" in check.detail
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 470.42.01\n")
    program.chmod(0o755)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (check,) = doctor_machine.driver()
    assert check.status == "fail" and check.detail.startswith("470.42.01") and "install a newer driver" in check.detail
