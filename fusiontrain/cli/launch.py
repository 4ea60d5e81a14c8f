"""`fusiontrain launch slurm|status`: a run as a Slurm job that can be submitted again, and how far a run has come."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from fusiontrain.cli.common import add_config_arguments, add_json_argument, note, print_json

ENDED = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT")
"""Slurm's states of a job that will not run again."""
TIME_LIMIT = r"\d+(:[0-5]?\d){0,2}|\d+-\d+(:[0-5]?\d){0,2}|UNLIMITED|INFINITE"
"""What sbatch --time takes: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S."""


def add_parser(subparsers: Any) -> None:
    """Adds `launch` to the program's subparsers."""
    actions = subparsers.add_parser("launch", help="start a run on a cluster").add_subparsers(dest="action", metavar="ACTION", required=True)
    slurm = actions.add_parser("slurm", help="write a run folder with config, code and job, and submit it; the same line again resumes")
    add_config_arguments(slurm)
    slurm.add_argument("--nodes", type=int, required=True, metavar="N", help="machines")
    slurm.add_argument("--gpus-per-node", type=int, required=True, metavar="G", help="0 trains on CPUs")
    slurm.add_argument("--procs-per-node", type=int, metavar="P", help="ranks per machine (default: one per GPU; needed with --gpus-per-node 0)")
    slurm.add_argument("--cpus-per-node", type=int, metavar="C", help="share machines and take C cores of each (default: whole machines)")
    slurm.add_argument("--partition", metavar="NAME")
    slurm.add_argument("--account", metavar="NAME")
    slurm.add_argument("--time", metavar="D-HH:MM:SS", help="time limit; the run saves before it and the job is requeued")
    slurm.add_argument("--name", metavar="NAME", help="of the job (default: the name of run.dir)")
    slurm.add_argument("--signal-seconds", type=int, default=120, metavar="S", help="how long before the time limit the run saves (default: 120)")
    slurm.add_argument("--requeue", action=argparse.BooleanOptionalAction, default=True, help="come back after preemption or the time limit (default)")
    slurm.add_argument("--sbatch-arg", action="append", default=[], metavar="=--OPTION=VALUE", help="one more line for sbatch; may be repeated")
    slurm.add_argument("--update", action="store_true", help="give a run folder that was submitted before this config and today's code")
    slurm.add_argument("--dry-run", action="store_true", help="print what would be written, and write and submit nothing")
    status = actions.add_parser("status", help="the step of the newest complete checkpoint, and the steps that the run is to have")
    add_config_arguments(status)
    status.add_argument("--plain", action="store_true", help="print the two numbers alone, for scripts")
    for parser in (slurm, status):
        add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Exit code 0; UserError for a config, a folder or a cluster that cannot do it."""
    from fusiontrain.config.load import load

    config = load(args.config, args.overrides)
    return _status(args, config) if args.action == "status" else _slurm(args, config)


def _status(args: argparse.Namespace, config: Any) -> int:
    step, steps = newest_step(Path(config.run.dir)), config.train.steps
    if args.json:
        print_json({"run": config.run.dir, "step": step, "steps": steps, "finished": step >= steps})
    else:
        print(f"{step} {steps}" if args.plain else f"{config.run.dir}: step {step} of {steps}{', finished' if step >= steps else ''}")
    return 0


def newest_step(folder: Path) -> int:
    """The step of the newest complete checkpoint of a run folder; 0 where there is none."""
    from fusiontrain.train.checkpoint import DamagedCheckpoint, read_manifest
    from fusiontrain.train.checkpoint.folders import checkpoint_step, list_checkpoints

    for checkpoint in reversed(list_checkpoints(folder / "checkpoints")):
        try:
            read_manifest(checkpoint)
        except DamagedCheckpoint as error:
            note(f"passed over: {error}")
        else:
            return checkpoint_step(checkpoint)
    return 0


def _slurm(args: argparse.Namespace, config: Any) -> int:
    from fusiontrain.cli.launch_folder import LaunchFolder

    _require_sense(args)
    processes = args.procs_per_node or args.gpus_per_node
    _require_ranks(config, args.nodes * processes)
    folder = LaunchFolder(Path(config.run.dir))
    script = folder.job_script(sbatch_lines(args, folder), processes)
    step = newest_step(folder.run)
    document: dict[str, Any] = {"run": str(folder.run), "folder": str(folder.path), "step": step, "steps": config.train.steps, "job": None}
    if not args.update:
        folder.require_same(config)
    if args.dry_run:
        return _show(args, folder, config, script, document)
    if step >= config.train.steps:
        return _say(args, document, f"{folder.run}: finished at step {step}; nothing to submit")
    if shutil.which("sbatch") is None:
        raise _no_sbatch()
    for job in folder.jobs():
        state = _state_of(job)
        if state not in ENDED:
            raise _busy(folder.run, job, state)
    folder.write(config, script, fresh_code=args.update)
    document["job"] = _submit(folder.script)
    folder.remember(document["job"])
    words = f"resumes from step {step}" if step else "starts"
    return _say(args, document, f"job {document['job']} submitted: {folder.run} {words}, output in {folder.logs}")


def sbatch_lines(args: argparse.Namespace, folder: Any) -> list[str]:
    """What sbatch is told, one option per line."""
    named = {
        "job-name": args.name or folder.run.name,
        "nodes": args.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": args.gpus_per_node or None,
        "cpus-per-task": args.cpus_per_node,
        "partition": args.partition,
        "account": args.account,
        "time": args.time,
        "signal": f"B:USR1@{args.signal_seconds}",
        "open-mode": "append",
        "chdir": Path.cwd(),
        "output": folder.logs / "job-%j.log",
    }
    options = [f"--{name}={value}" for name, value in named.items() if value is not None]
    whole = [] if args.cpus_per_node else ["--exclusive"]
    return [*options, *whole, "--requeue" if args.requeue else "--no-requeue", *args.sbatch_arg]


def _require_sense(args: argparse.Namespace) -> None:
    from fusiontrain.utils.errors import UserError

    problems = []
    if args.nodes < 1:
        problems.append(f"--nodes {args.nodes}: must be at least 1")
    if args.gpus_per_node < 0:
        problems.append(f"--gpus-per-node {args.gpus_per_node}: must be 0 or more")
    if args.procs_per_node is not None and args.procs_per_node < 1:
        problems.append(f"--procs-per-node {args.procs_per_node}: must be at least 1")
    if args.cpus_per_node is not None and args.cpus_per_node < 1:
        problems.append(f"--cpus-per-node {args.cpus_per_node}: must be at least 1")
    if args.gpus_per_node == 0 and args.procs_per_node is None:
        problems.append("--gpus-per-node 0: training on CPUs also needs --procs-per-node")
    if args.gpus_per_node and args.procs_per_node not in (None, args.gpus_per_node):
        problems.append(f"--procs-per-node {args.procs_per_node}: there is one process per GPU; leave it out, or give {args.gpus_per_node}")
    if args.time is not None and not re.fullmatch(TIME_LIMIT, args.time, re.IGNORECASE):
        problems.append(f"--time {args.time!r}: is none of Slurm's forms, such as 90 (minutes), 12:00:00 or 2-12:00:00")
    problems += [f"--sbatch-arg {line!r}: must start with a dash, such as --sbatch-arg=--mail-type=END" for line in args.sbatch_arg if line[:1] != "-"]
    values = (args.name, args.partition, args.account, args.time, *args.sbatch_arg)
    problems += [f"{value!r}: must be one line" for value in values if value and "\n" in value]
    if problems:
        raise UserError("\n".join(problems))


def _require_ranks(config: Any, world_size: int) -> None:
    """A world that the config cannot be trained on is known now, not when the job has waited for its nodes."""
    from fusiontrain.cli.first_use import READY
    from fusiontrain.train.build import check_config, rank_problems
    from fusiontrain.utils.errors import UserError

    if config.demo is None or (Path(config.demo.dir) / READY).is_file():
        check_config(config, world_size)
    elif problems := rank_problems(config, world_size):  # the files that a debug config needs are made by the job on first use
        raise UserError("\n".join(problems))


def _show(args: argparse.Namespace, folder: Any, config: Any, script: str, document: dict[str, Any]) -> int:
    from fusiontrain.config.load import to_yaml

    sources = [str(source) for source in folder.sources()]
    if args.json:
        print_json({**document, "script": script, "config": config.model_dump(mode="json"), "code": sources})
        return 0
    kept = folder.code.is_dir() and not args.update
    print(f"# {folder.script}\n{script}\n# {folder.config}\n{to_yaml(config)}\n# {folder.code}: {'stays as it is' if kept else 'a copy of'}")
    print("\n".join(f"#   {source}" for source in sources if not kept))
    return 0


def _say(args: argparse.Namespace, document: dict[str, Any], sentence: str) -> int:
    if args.json:
        print_json(document)
    else:
        print(sentence)
    return 0


def _submit(script: Path) -> int:
    from fusiontrain.utils.errors import UserError

    result = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True)
    if result.returncode:
        reason = " ".join(result.stderr.split()) or f"sbatch ended with code {result.returncode}"
        raise UserError(f"{script}: not submitted: {reason}; change the options and give the same line again")
    return int(result.stdout.split(";")[0])


def _state_of(job: int) -> str:
    """Slurm's state of a job; one that Slurm has forgotten has ended. Where it does not answer, nothing is known, and that is an error."""
    from fusiontrain.utils.errors import UserError

    result = subprocess.run(["squeue", "--noheader", "--jobs", str(job), "--states=all", "--format=%T"], capture_output=True, text=True)
    if result.returncode and "Invalid job id" not in result.stderr:
        raise UserError(f"squeue: {' '.join(result.stderr.split())}; Slurm must answer before a run is submitted again")
    return result.stdout.strip() or "COMPLETED"


def _no_sbatch() -> Exception:
    from fusiontrain.utils.errors import UserError

    return UserError("sbatch: not found; call this on a machine of the cluster, add --dry-run to see the job, or train here with launch/torchrun.sh")


def _busy(run: Path, job: int, state: str) -> Exception:
    from fusiontrain.utils.errors import UserError

    return UserError(f"{run}: its job {job} is {state}; wait for its end or call: scancel {job}")
