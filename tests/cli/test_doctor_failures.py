"""Each of doctor's failures, provoked."""

from __future__ import annotations

import contextlib
import io
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
from fusiontrain.cli.doctor_ranks import judge_clocks, merge, shared_storage
from fusiontrain.cli.main import main
from fusiontrain.testing.ranks import shared_pool

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


def look(folders: list[str]) -> tuple[str, str]:
    rank = int(os.environ["RANK"])
    check = shared_storage(Path(folders[rank]), rank)
    return check.status, check.detail


def test_a_rank_with_another_view_of_the_folder(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    assert [status for status, _ in shared_pool().run(look, 2, [str(here), str(here)])] == ["ok", "ok"]
    found = shared_pool().run(look, 2, [str(here), str(there)])
    assert found[0][0] == "fail" and "rank 0 does not see the files of rank 1; rank 1 does not see the files of rank 0" in found[0][1]
    missing = shared_pool().run(look, 2, [str(here), str(tmp_path / "missing")])
    assert "rank 1 cannot write there (No such file or directory)" in missing[1][1]
    assert list(here.iterdir()) == list(there.iterdir()) == []


def whole(folder: str, few_files_on: int) -> tuple[int, str]:
    if int(os.environ["RANK"]) == few_files_on:
        resource.setrlimit(resource.RLIMIT_NOFILE, (300, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            return main(["doctor", "--dir", folder, "--json"]), output.getvalue()
    finally:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def test_all_ranks_are_checked_and_the_main_one_prints(tmp_path):
    (code, printed), (other_code, other_printed) = shared_pool().run(whole, 2, str(tmp_path), 1)
    assert (code, other_code, other_printed) == (1, 1, "")
    checks = json.loads(printed)["checks"]
    assert [check["detail"] for check in checks if check["status"] == "fail"] == ["rank 1: 300; shards, sockets and workers need more: ulimit -n 65536"]
    assert {"same versions", "shared storage", "clocks", "collective"} <= {check["name"] for check in checks if check["status"] != "fail"}


def test_clocks_that_lie_apart():
    assert judge_clocks([100.0, 100.2, 100.1]).status == "ok"
    check = judge_clocks([100.0, 100.1, 107.0])
    assert check.status == "warn" and "7.0 s apart, rank 2 farthest" in check.detail


def test_findings_of_ranks_are_said_once_where_they_agree():
    good, bad = Check("memory", "ok", "1 GiB"), Check("memory", "fail", "none")
    assert merge([[good], [good]]) == [good]
    assert merge([[bad], [bad]]) == [bad]
    assert merge([[good], [bad], [bad]]) == [Check("memory", "ok", "rank 0: 1 GiB"), Check("memory", "fail", "ranks 1, 2: none")]
