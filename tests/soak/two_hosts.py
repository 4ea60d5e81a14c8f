"""Two hosts on one machine: network namespaces that a pair of virtual cables joins. Needs Linux, `ip`, and root.

    python tests/soak/two_hosts.py --out runs/two_hosts

Trains on both hosts with launch/torchrun.sh, whose agents meet over the cable, and compares with the same training on one host. Then it trains
again, cuts the cable in the middle, and sees to it that both hosts come to an end in bounded time, and that the run goes on after that.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from fusiontrain.config.load import to_yaml
from fusiontrain.testing.training import world_config
from fusiontrain.train.checkpoint import checkpoint_step, list_checkpoints
from fusiontrain.train.metrics import read_metrics

ROOT = Path(__file__).parents[2]
TIMEOUT_SECONDS = 10
"""Of a collective. The ranks end soon after it; an agent whose rendezvous is on the other side of the cut has a minute of its own."""

LIMIT_SECONDS = 300.0
ADDRESSES = ("10.254.77.1", "10.254.77.2")
PORT = 29577


def ip(*words: str) -> None:
    """Run the command of that name; raises CalledProcessError with what it said."""
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@contextlib.contextmanager
def two_hosts(name: str = "ft") -> Iterator[tuple[str, str]]:
    """Names of two network namespaces with a cable between them. Raises CalledProcessError or FileNotFoundError where that is not permitted."""
    hosts = (f"{name}0-{os.getpid()}", f"{name}1-{os.getpid()}")
    made = []
    try:
        for host in hosts:
            ip("netns", "add", host)
            made.append(host)
        ip("link", "add", "cable", "netns", hosts[0], "type", "veth", "peer", "name", "cable", "netns", hosts[1])
        for host, address in zip(hosts, ADDRESSES, strict=True):
            ip("-n", host, "addr", "add", f"{address}/24", "dev", "cable")
            ip("-n", host, "link", "set", "cable", "up")
            ip("-n", host, "link", "set", "lo", "up")
        yield hosts
    finally:
        for host in made:
            ip("netns", "del", host)


def start(hosts: tuple[str, str], config: Path, folder: Path, *overrides: str) -> list[subprocess.Popen]:
    """One agent with one rank on each host."""
    agents = []
    for number, host in enumerate(hosts):
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "NPROC_PER_NODE": "1",
            "NNODES": "2",
            "RDZV_ENDPOINT": f"{ADDRESSES[0]}:{PORT}",
            "RDZV_IS_HOST": str(1 - number),
            "LOCAL_ADDR": ADDRESSES[number],
            "GLOO_SOCKET_IFNAME": "cable",
        }
        command = ["ip", "netns", "exec", host, "bash", str(ROOT / "launch/torchrun.sh"), str(config), f"run.dir={folder}", *overrides]
        with (folder.parent / f"{folder.name}-host{number}.log").open("ab") as output:
            agents.append(subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True))
    return agents


def wait(agents: list[subprocess.Popen]) -> list[int]:
    """The exit codes of all agents; raises TimeoutExpired, and ends what hangs, after LIMIT_SECONDS."""
    deadline = time.monotonic() + LIMIT_SECONDS
    try:
        return [agent.wait(max(1.0, deadline - time.monotonic())) for agent in agents]
    finally:
        for agent in agents:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(agent.pid, signal.SIGKILL)


def losses(folder: Path) -> list[tuple[int, float, float]]:
    return [(line["step"], line["loss"], line["grad_norm"]) for line in read_metrics(folder / "metrics.jsonl")]


def make_config(folder: Path, steps: int) -> Path:
    """A tiny LMFusion of so many steps."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {"train.steps": steps, "checkpoint.every_steps": 2, "evaluate.every_steps": None, "sample.prompts": (), "train.log_every_steps": 1}
    (folder / "config.yaml").write_text(to_yaml(world_config(folder, {**values, "parallel.timeout_seconds": TIMEOUT_SECONDS})))
    return folder / "config.yaml"


def train_on_two_hosts(folder: Path, steps: int) -> list[tuple[int, float, float]]:
    """Steps, losses and gradient norms of a run over both hosts."""
    with two_hosts() as hosts:
        codes = wait(start(hosts, make_config(folder, steps), folder / "two"))
    if codes != [0, 0]:
        raise AssertionError(f"the agents ended with {codes}; see {folder}/two-host*.log")
    return losses(folder / "two")


def cut_the_cable(folder: Path) -> tuple[list[int], float, int]:
    """Train, cut, wait: the exit codes of both agents, the seconds until the later one ended, and the newest complete checkpoint."""
    run = folder / "cut"
    with two_hosts() as hosts:
        agents = start(hosts, make_config(folder, 100_000), run)
        try:
            deadline = time.monotonic() + LIMIT_SECONDS
            while not list_checkpoints(run / "checkpoints"):
                if time.monotonic() > deadline or any(agent.poll() is not None for agent in agents):
                    raise AssertionError(f"no checkpoint in {LIMIT_SECONDS:.0f} s; see {folder}/cut-host*.log")
                time.sleep(0.05)
            ip("-n", hosts[1], "link", "set", "cable", "down")
            cut = time.monotonic()
        except BaseException:
            for agent in agents:
                os.killpg(agent.pid, signal.SIGKILL)
            raise
        codes = wait(agents)
    return codes, time.monotonic() - cut, checkpoint_step(list_checkpoints(run / "checkpoints")[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/two_hosts"))
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    folder = args.out.absolute()
    two = train_on_two_hosts(folder, args.steps)
    paths = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    command = ["bash", str(ROOT / "launch/torchrun.sh"), str(folder / "config.yaml"), f"run.dir={folder / 'one'}"]
    subprocess.run(command, check=True, env={**os.environ, **paths, "NPROC_PER_NODE": "2"})
    print(f"{len(two)} steps on two hosts, {'equal to' if two == losses(folder / 'one') else 'OTHER THAN'} those on one")
    codes, seconds, step = cut_the_cable(folder)
    print(f"cable cut: the agents ended with {codes} after {seconds:.0f} s; step {step} is saved")
    with two_hosts() as hosts:
        codes = wait(start(hosts, folder / "config.yaml", folder / "cut", f"train.steps={step + 4}"))
    steps = [line[0] for line in losses(folder / "cut")]
    print(f"started again: ended with {codes}, steps {'complete' if steps == list(range(1, step + 5)) else steps}")


if __name__ == "__main__":
    main()
