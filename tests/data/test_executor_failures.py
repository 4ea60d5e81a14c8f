"""Workers that die, hang or fail, trainers that are killed, and what is left behind: nothing."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from fusiontrain.data.execute.ring import Ring
from fusiontrain.data.index.exclude import exclude
from fusiontrain.data.loader import Loader
from fusiontrain.data.tokenizer import load_tokenizer
from fusiontrain.testing.configs import tiny_config
from fusiontrain.testing.shards import index_of, write_shards
from fusiontrain.utils.errors import UserError

TRAINER = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts tests in the background has it ignored
from fusiontrain.data.loader import Loader
from fusiontrain.data.tokenizer import load_tokenizer
from fusiontrain.testing.configs import tiny_config

config = tiny_config({"data.sources": [{"path": sys.argv[1]}], "data.executor": "processes", "data.num_workers": 2})
loader = Loader(config, load_tokenizer(config), "train", 0, 1)
for batches, state in loader.iterate(0):
    if state.step == 3:
        print(*loader.workers.pids, flush=True)
    time.sleep(0.01)
"""


def make_loader(shards, executor="processes", count=2, **overrides) -> Loader:
    config = tiny_config({"data.sources": [{"path": shards}], "data.executor": executor, "data.num_workers": count, **overrides})
    return Loader(config, load_tokenizer(config), "train", 0, 1)


@pytest.fixture
def shards(tmp_path) -> str:
    return write_shards(tmp_path / "shards")


def wait_until(condition, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children() -> set[str]:
    return {pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


def descriptors() -> list[str]:
    """What this process has open, but for the folder that it reads to find out and for the maps of indexes, which a loader keeps."""
    links = []
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            links.append(os.readlink(path))
    return sorted(link for link in links if not link.startswith(f"/proc/{os.getpid()}") and ".fusiontrain-index" not in link)


def mappings(pid: int | str = "self") -> int:
    """How many rings a process has mapped. None has a name in /dev/shm, where a killed process would leave it."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    named = [line for line in lines if "/dev/shm" in line and "/dev/shm/sem." not in line]  # semaphores are those of other tests' pools
    assert named == []
    return sum("/memfd:fusiontrain-ring (deleted)" in line for line in lines)


def resources() -> tuple:
    gc.collect()
    threads = {thread.name for thread in threading.enumerate()}
    return children(), threads, descriptors(), mappings()


@pytest.mark.parametrize("executor", ["threads", "processes"])
@pytest.mark.parametrize("how", ["close", "drop the iterator", "error"])
def test_nothing_is_left_behind(shards, executor, how):
    before = resources()
    loader = make_loader(shards, executor)
    iterator = loader.iterate(0)
    batches, _ = next(iterator)
    assert resources() != before
    if how == "error":
        loader.plan.step = lambda step: 1 / 0
        with pytest.raises(ZeroDivisionError):
            list(itertools.islice(iterator, 100))
    if how == "drop the iterator":
        del iterator
        assert mappings() == 1, "only the batch that is kept holds the memory"
        assert not any(mappings(pid) for pid in loader.workers.pids)
    del batches
    loader.close()
    iterator = None
    assert resources() == before


@pytest.mark.parametrize("executor", ["threads", "processes"])
def test_a_batch_outlives_its_loader(shards, executor):
    loader = make_loader(shards, executor)
    batches, _ = next(loader.iterate(0))
    copy = batches[0].payloads["image"].values.clone()
    loader.close()
    assert copy.equal(batches[0].payloads["image"].values) and mappings() == 1
    del batches
    assert mappings() == 0


@pytest.mark.parametrize("executor", ["threads", "processes"])
def test_batches_that_are_kept_hold_no_descriptors(shards, executor):
    """One for each tensor or image would soon be all that a process may have."""
    with contextlib.closing(make_loader(shards, executor)) as loader:
        iterator = loader.iterate(0)
        kept = list(itertools.islice(iterator, 5))
        few = len(descriptors())
        kept += itertools.islice(iterator, 60)
        assert sum(len(batches) for batches, _ in kept) >= 65
        assert len(descriptors()) <= few + 2, "but for a shard that was opened in the meantime"


def test_a_worker_that_is_killed_is_named_and_the_loader_can_begin_again(shards):
    with contextlib.closing(make_loader(shards, count=1)) as loader:
        iterator = loader.iterate(0)
        first = next(iterator)[0][0].token_ids.clone()
        (pid,) = loader.workers.pids
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(UserError, match=rf"^data worker 0 \(process {pid}\) was killed by SIGKILL, .*lower data\.num_workers"):
            list(itertools.islice(iterator, 1000))
        assert not is_running(pid)
        assert next(loader.iterate(0))[0][0].token_ids.equal(first)
        assert loader.workers.pids != [pid]


def test_a_worker_that_hangs_does_not_keep_the_loader_from_closing(shards):
    loader = make_loader(shards)
    iterator = loader.iterate(0)
    next(iterator)
    pids = loader.workers.pids
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    loader.close()
    assert list(iterator) == []
    assert not any(map(is_running, pids))


def test_signals_that_stop_a_trainer_leave_workers_at_their_work(shards):
    with contextlib.closing(make_loader(shards, count=1)) as loader:
        iterator = loader.iterate(0)
        next(iterator)
        (pid,) = loader.workers.pids
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(pid, number)
        assert len(list(itertools.islice(iterator, 200))) == 200
        assert loader.workers.pids == [pid]


def test_shards_that_workers_find_changed_are_refused(shards):
    loader = make_loader(shards)
    shard = Path(shards) / "shard-000.tar"
    exclude([shard], [index_of(shard)], {str(shard.resolve()): {"s0-0003"}}, index_dir=None)
    with contextlib.closing(loader), pytest.raises(UserError, match=r"^data\.sources: the shards, or what is excluded of them, have changed"):
        next(loader.iterate(0))


def test_a_shard_that_is_gone_is_named_by_a_worker(shards):
    loader = make_loader(shards)
    (Path(shards) / "shard-001.tar").unlink()
    with contextlib.closing(loader), pytest.raises(UserError, match=r"^(data\.sources: the shards|.*shard-001\.tar)"):
        next(loader.iterate(0))


def test_a_fault_in_a_worker_comes_with_its_traceback(shards):
    loader = make_loader(shards)
    micro_batches = loader._micro_batches
    loader._micro_batches = lambda step: [[None]] if step == 2 else micro_batches(step)
    with contextlib.closing(loader):
        iterator = loader.iterate(0)
        assert len([next(iterator), next(iterator)]) == 2
        with pytest.raises(RuntimeError, match=r"data worker \d \(process \d+\):\nTraceback[^$]*AttributeError: 'NoneType'"):
            next(iterator)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
def test_a_trainer_that_is_killed_leaves_no_worker_and_no_name_of_shared_memory(shards, number):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    command = [sys.executable, "-c", TRAINER, shards]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True, env=environment) as trainer:
        pids = [int(pid) for pid in trainer.stdout.readline().split()]
        assert [mappings(pid) for pid in (trainer.pid, *pids)] == [1, 1, 1]
        os.killpg(trainer.pid, number)
        try:
            trainer.wait(20)
        finally:
            trainer.kill()
    assert wait_until(lambda: not any(map(is_running, pids)))


def test_a_slot_comes_free_with_the_last_view_of_it():
    import torch

    ring = Ring(2, 1000)
    taken = [ring.lease() for _ in range(2)]
    assert {slot for slot, _ in taken} == {0, 1} and ring.slot_bytes == 1024
    slot, memory = taken.pop()
    memory[:] = 7
    tensor = torch.from_numpy(memory[64:128].view(np.int64).reshape(2, 4))[1]
    del memory
    assert ring._free.empty(), "a tensor still looks at it"
    assert tensor.tolist() == [0x0707070707070707] * 4
    del tensor
    again, memory = ring.lease()
    assert again == slot and ring._free.empty()
    ring.close()
    memory[:] = 1
    assert np.frombuffer(memory, np.uint8).sum() == 1024, "what is leased outlives the ring"


def test_a_fence_is_waited_for_before_a_slot_is_used_again():
    events = []
    ring = Ring(1, 64, fence=lambda: events.append("free") or (lambda: events.append("waited")))
    ring.lease()
    assert events == ["free"]
    ring.lease()
    assert events == ["free", "waited", "free"]
    ring.close()


def test_bad_documents_hold_no_slot_of_the_ring(shards):
    """A kept exception keeps the frames that it came through, and with them the memory of the batch, until a collection of garbage."""
    loader = make_loader(shards, "threads", **{"data.prefetch_bytes": 1, "data.max_bad_fraction": 1.0})
    for shard in loader.sources[0].shards:
        shard.write_bytes(b"")  # whatever is read next is too short
    seen: list[int] = []

    def read() -> None:
        with contextlib.closing(loader.iterate(0)) as steps:
            seen.extend(state.step for _, state in itertools.islice(steps, 12))

    gc.collect()
    gc.disable()
    try:
        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        thread.join(30)
    finally:
        gc.enable()
    assert seen == list(range(1, 13))
    assert loader.skipped > 8
    loader.close()
