"""`fusiontrain doctor` over several ranks: what they find together, and what it takes to say that it failed."""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import fusiontrain
from fusiontrain.cli import doctor_ranks
from fusiontrain.cli.doctor_machine import Check
from fusiontrain.cli.doctor_ranks import judge_clocks, merge, shared_storage
from fusiontrain.cli.main import main
from fusiontrain.testing.ranks import shared_pool

ROOT = Path(__file__).parents[2]


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
    (code, printed), (other_code, other_printed) = shared_pool().run(whole, 2, str(tmp_path), 1, timeout_seconds=240)
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


def look_at_the_rest(slow_gb: float, version: str) -> list[tuple[str, str]]:
    """Versions and bandwidth where rank 1 has another fusiontrain, and any collective is slower than it should be."""
    import torch

    before = fusiontrain.__version__, dict(doctor_ranks.SLOW_GB)
    try:
        if os.environ["RANK"] == "1":
            fusiontrain.__version__ = version
        doctor_ranks.SLOW_GB["cpu"] = slow_gb
        return [(check.status, check.detail) for check in (doctor_ranks.versions(), doctor_ranks.bandwidth(torch.device("cpu")))]
    finally:
        fusiontrain.__version__, doctor_ranks.SLOW_GB["cpu"] = before[0], before[1]["cpu"]


def test_other_versions_and_a_slow_collective():
    (versions, bandwidth), others = shared_pool().run(look_at_the_rest, 2, 1e9, "0.0.1", timeout_seconds=240)
    assert [versions, bandwidth] == others, "all ranks say the same"
    assert versions == ("fail", f"fusiontrain is {fusiontrain.__version__}, 0.0.1 on ranks 0 to 1: install the same on all machines")
    assert bandwidth[0] == "warn" and "over 2 ranks; check NCCL_DEBUG=INFO, GLOO_SOCKET_IFNAME and the links" in bandwidth[1]


ALONE = """
import sys
from fusiontrain.cli import doctor
from fusiontrain.cli.main import main
doctor.MEETING_SECONDS = 2
sys.exit(main(["doctor", "--quick", "--json", "--dir", sys.argv[1]]))
"""


def test_ranks_that_cannot_meet_say_what_each_of_them_knows(tmp_path):
    """In a process of its own: one whose process group has failed cannot have another."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1]), "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
        rank = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
        command = [sys.executable, "-c", ALONE, str(tmp_path)]
        done = subprocess.run(command, env={**os.environ, **where, **rank}, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1, done.stderr
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert checks["ranks"]["status"] == "fail"
    assert checks["ranks"]["detail"].startswith("rank 1: ") and "check GLOO_SOCKET_IFNAME, the firewall and the rendezvous" in checks["ranks"]["detail"]
    assert checks["folder"]["status"] == "ok", "what it found alone is still said"


def torchrun(*program: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python", "--", *program]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)


def test_under_torchrun_one_document_tells_of_all_ranks(tmp_path):
    done = torchrun(sys.executable, "-m", "fusiontrain", "doctor", "--quick", "--json", "--dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    found = {check["name"]: (check["status"], check["detail"]) for check in report["checks"]}
    assert report["ok"] and len(found) == len(report["checks"]), "each finding once"
    assert found["same versions"] == ("ok", "on all 2 ranks") and found["shared storage"] == ("ok", f"{tmp_path}: 2 ranks see each other's files")
    assert found["clocks"][0] == "ok" and {operator["key"] for operator in report["kernels"]} > {"attention", "gemm"}


def test_under_torchrun_a_machine_with_a_disk_of_its_own_and_few_files_is_named(tmp_path):
    """Rank 1 has another file system mounted where rank 0 has the run folder, as a node without the shared storage would."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("a mount namespace cannot be made here")
    command = 'exec "$0" -m fusiontrain doctor --json --dir "$1"'
    script = f'[ "$RANK" = 0 ] && {command}; ulimit -n 300; mount -t tmpfs -o size=8g tmpfs "$1"; {command}'
    done = torchrun("unshare", "--mount", "sh", "-c", script, sys.executable, str(tmp_path))
    assert done.returncode == 1
    report = json.loads(done.stdout)
    failed = {check["name"]: check["detail"] for check in report["checks"] if check["status"] == "fail"}
    assert not report["ok"] and set(failed) == {"open files", "shared storage"}
    assert failed["open files"].startswith("rank 1: 300; ")
    assert "rank 0 does not see the files of rank 1; rank 1 does not see the files of rank 0" in failed["shared storage"]
    assert next(check["detail"] for check in report["checks"] if check["name"] == "collective").endswith("over 2 ranks")
    assert list(tmp_path.iterdir()) == []
