"""The pool of ranks itself: results, exceptions, deaths and hangs come back within bounded time."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fusiontrain.parallel import reduce
from fusiontrain.parallel.reduce import at_length, gather_bytes
from fusiontrain.testing.ranks import RankFailure, RankPool, shared_pool
from fusiontrain.utils.errors import UserError


def add_ranks(offset: int) -> tuple[int, int, str]:
    total = torch.tensor(dist.get_rank() + offset)
    dist.all_reduce(total)
    return dist.get_rank(), int(total), os.environ["WORLD_SIZE"]


def gather_bytes_of_all() -> list[list[bytes]]:
    rank = dist.get_rank()
    return [gather_bytes(b"\x00\xff" * rank), gather_bytes(b""), gather_bytes(bytes(5 - rank))]


def work_at_length(folder: str, chosen_rank: int) -> list[str]:
    """What every rank finds after the chosen one has worked for longer than a meeting takes."""
    done = Path(folder) / "done"

    def work() -> None:
        time.sleep(1.0)
        done.write_text(str(dist.get_rank()))

    reduce.SECONDS_BETWEEN_MEETINGS = 0.2
    at_length(work, dist.get_rank() == chosen_rank)
    return [done.read_text()]


def refuse_at_length() -> str:
    def refuse() -> None:
        raise UserError("this shard is damaged")

    try:
        at_length(refuse, dist.get_rank() == 1)
    except UserError as error:
        return str(error)
    return "nothing was said"


def raise_on_rank_one() -> None:
    if dist.get_rank() == 1:
        raise UserError("rank one says no")
    dist.barrier()


def die() -> None:
    os._exit(7)


def hang() -> None:
    time.sleep(60)


def test_results_in_order_of_rank() -> None:
    assert shared_pool().run(add_ranks, 2, 10) == [(0, 21, "2"), (1, 21, "2")]


def test_bytes_of_different_lengths_are_gathered_whole() -> None:
    expected = [[b"", b"\x00\xff"], [b"", b""], [bytes(5), bytes(4)]]
    assert shared_pool().run(gather_bytes_of_all, 2) == [expected, expected]


@pytest.mark.parametrize("chosen", [0, 1])
def test_ranks_wait_for_the_one_that_works_at_length(tmp_path, chosen) -> None:
    assert shared_pool().run(work_at_length, 2, str(tmp_path), chosen) == [[str(chosen)]] * 2


def test_what_is_wrong_on_the_rank_that_works_is_said_on_all() -> None:
    assert shared_pool().run(refuse_at_length, 2) == ["this shard is damaged"] * 2


def test_failure_names_the_rank_that_caused_it_and_the_pool_lives_on() -> None:
    with pytest.raises(RankFailure, match=r"(?s)rank 1 of 2.*rank one says no") as failure:
        shared_pool().run(raise_on_rank_one, 2)
    assert isinstance(failure.value.__cause__, UserError)
    assert shared_pool().run(add_ranks, 2, 0)[0][1] == 1


def test_dead_and_hanging_ranks_end_in_bounded_time() -> None:
    pool = RankPool()
    try:
        with pytest.raises(RankFailure, match="died with exit code 7"):
            pool.run(die, 1, group=False)
        started = time.monotonic()
        with pytest.raises(RankFailure, match="did not answer"):
            pool.run(hang, 1, timeout_seconds=0.2, group=False)
        assert time.monotonic() - started < 30
    finally:
        pool.close()
