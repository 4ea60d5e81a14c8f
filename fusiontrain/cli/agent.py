"""torchrun, with a limit to how long an agent waits for a rendezvous that it cannot reach: `python -m fusiontrain.cli.agent [torchrun's arguments]`.

An agent asks the rendezvous' store again and again whether another node came, and has no limit for the answer: when the network is cut, it waits
until TCP gives up, a quarter of an hour later, and no signal but SIGKILL reaches it meanwhile.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time

from torch.distributed import run

from fusiontrain.cli.common import note

LIMIT_SECONDS = 60.0
"""As long as torchrun itself waits for an answer of a store that it can reach."""

PROBE_SECONDS = 5.0
EXIT_FAILED = 1


def reachable(host: str, port: int) -> bool:
    """Whether somebody listens there."""
    try:
        socket.create_connection((host, port), PROBE_SECONDS).close()
    except OSError:
        return False
    return True


def wait_until_lost(host: str, port: int, limit_seconds: float = LIMIT_SECONDS, probe_seconds: float = PROBE_SECONDS) -> None:
    """Return when host:port could be reached and then could not for `limit_seconds`. Before that torchrun has a limit of its own."""
    while not reachable(host, port):
        time.sleep(probe_seconds)
    since: float | None = None
    while since is None or time.monotonic() - since < limit_seconds:
        time.sleep(probe_seconds)
        if reachable(host, port):
            since = None
        elif since is None:
            since = time.monotonic()


def end_when_lost(host: str, port: int) -> None:
    """End this process, and with it its ranks, when the rendezvous is lost."""
    wait_until_lost(host, port)
    note(f"fusiontrain: error: the rendezvous at {host}:{port} could not be reached for {LIMIT_SECONDS:.0f} s: this node leaves the job")
    os._exit(EXIT_FAILED)


def main() -> None:
    """torchrun; with a rendezvous that other nodes share, a thread beside it watches that."""
    args = run.parse_args(sys.argv[1:])
    host, _, port = args.rdzv_endpoint.rpartition(":")
    if host and not args.standalone:
        threading.Thread(target=end_when_lost, args=(host.strip("[]"), int(port)), daemon=True).start()
    run.main(sys.argv[1:])


if __name__ == "__main__":
    main()
