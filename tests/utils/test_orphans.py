"""A process does not outlive the one that it asked to die with."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest

from fusiontrain.utils.orphans import die_with_parent

LIMIT_SECONDS = 60.0


@pytest.mark.skipif(sys.platform != "linux", reason="the system call is Linux's")
def test_a_process_dies_with_its_parent_however_that_ends() -> None:
    """A grandchild holds one end of a pipe, which is closed when it is gone, and by nobody else before."""
    heard, held = os.pipe()
    child = os.fork()
    if child == 0:
        if os.fork() == 0:
            die_with_parent()
            os.write(held, b"bound")
            time.sleep(LIMIT_SECONDS)
            os.write(held, b" and alive")
        else:
            os.close(held)
            time.sleep(LIMIT_SECONDS)
        os._exit(0)
    os.close(held)
    with os.fdopen(heard, "rb", buffering=0) as pipe:
        assert pipe.read(5) == b"bound"
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert pipe.read() == b""
