"""What `fusiontrain launch slurm` leaves in a run folder, so that the job depends on nothing that may change while it waits.

    RUN/slurm/config.yaml   resolved: every default and override written out
    RUN/slurm/code/         fusiontrain, fusiontrain_kernels and launch, as they were
    RUN/slurm/job.sbatch    what sbatch gets
    RUN/slurm/jobs          the ids of the jobs, one a line
    RUN/slurm/logs/         job-ID.log, and job-ID-RESTART/node-N/ with the output of every rank
"""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fusiontrain
from fusiontrain.utils.errors import UserError

if TYPE_CHECKING:
    from fusiontrain.config.schema import Config

LAUNCHERS = ("env.sh", "slurm.sbatch", "torchrun.sh")
MAY_CHANGE = ("parallel", "checkpoint", "train.steps", "train.micro_batch_sequences", "evaluate", "sample")
"""Sections and keys that a run may take up anew when it resumes."""


class LaunchFolder:
    """The folder `slurm` of a run. Nothing is written before `write`."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.path = Path.cwd() / run / "slurm"  # absolute: the job's own working directory is the cluster's business
        self.config = self.path / "config.yaml"
        self.code = self.path / "code"
        self.script = self.path / "job.sbatch"
        self.logs = self.path / "logs"
        self._jobs = self.path / "jobs"

    def job_script(self, options: list[str], processes: int) -> str:
        """The file for sbatch: its options, the environment, and launch/slurm.sbatch of the snapshot."""
        lines = [
            "#!/usr/bin/env bash",
            *(f"#SBATCH {_quoted(option)}" for option in options),
            "# The Python that submitted, with the code of the snapshot and not what lies in the working directory.",
            f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH PYTHONPATH={shlex.quote(str(self.code))} PYTHONSAFEPATH=1",
            f"export NPROC_PER_NODE={processes} FUSIONTRAIN_LAUNCH={shlex.quote(str(self.code / 'launch'))} FUSIONTRAIN_LOGS={shlex.quote(str(self.logs))}",
            f'exec bash "$FUSIONTRAIN_LAUNCH/slurm.sbatch" {shlex.quote(str(self.config))}',
        ]
        return "\n".join(lines) + "\n"

    def require_same(self, config: Config) -> None:
        """Raise UserError where the folder belongs to another config, with one line per key that differs."""
        from fusiontrain.config.load import load

        for path in (self.config, self.run / "config.yaml"):
            if path.is_file():
                found = dict(_differences(load(path).model_dump(mode="json"), config.model_dump(mode="json")))
                if found:
                    keys = "\n".join(f"{path}: {key} is {old!r} there and {new!r} now" for key, (old, new) in found.items())
                    raise UserError(f"{keys}\n{self.run}: belongs to another config; set another run.dir, give the same values, or add --update")

    def write(self, config: Config, script: str, fresh_code: bool) -> None:
        """Config, code and job. Code that is already there stays, so that a run goes on with what it began with, unless `fresh_code`."""
        from fusiontrain.config.load import to_yaml

        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            if fresh_code or not self.code.is_dir():
                self._snapshot()
            self.config.write_text(to_yaml(config), encoding="utf-8")
            self.script.write_text(script, encoding="utf-8")
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); set run.dir to a folder that can") from error

    def sources(self) -> Iterator[Path]:
        """What the snapshot copies."""
        import fusiontrain_kernels

        yield from (Path(str(package.__file__)).parent for package in (fusiontrain, fusiontrain_kernels))
        yield launchers()

    def jobs(self) -> list[int]:
        """Ids of the jobs that were submitted for this run."""
        return [int(line) for line in self._jobs.read_text().split()] if self._jobs.is_file() else []

    def remember(self, job: int) -> None:
        """Add a job's id to the folder."""
        with self._jobs.open("a") as file:
            file.write(f"{job}\n")

    def _snapshot(self) -> None:
        """Written aside and renamed: a copy that broke off is never taken for a whole one."""
        partial = self.code.with_name("code.tmp")
        shutil.rmtree(partial, ignore_errors=True)
        for source in self.sources():
            if source.name == "launch":
                (partial / "launch").mkdir()
                for name in LAUNCHERS:
                    shutil.copy(source / name, partial / "launch" / name)
            else:
                shutil.copytree(source, partial / source.name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.rmtree(self.code, ignore_errors=True)
        partial.rename(self.code)


def launchers() -> Path:
    """The folder of the launch scripts: of the checkout, or of the installation. Raises UserError where it is missing."""
    places = (Path(str(fusiontrain.__file__)).parents[1] / "launch", Path(sys.prefix) / "share" / "fusiontrain" / "launch")
    for place in places:
        if all((place / name).is_file() for name in LAUNCHERS):
            return place
    raise UserError(f"{places[-1]}: the launch scripts are not there; install fusiontrain again")


def _differences(old: Any, new: Any, key: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    if key in MAY_CHANGE:
        return
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)
    elif old != new:
        yield key, (old, new)


def _quoted(option: str) -> str:
    """An option as sbatch reads it from a file: its value in double quotes where it holds spaces."""
    name, equals, value = option.partition("=")
    return f'{name}{equals}"{value}"' if " " in value else option
