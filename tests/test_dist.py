"""The process harness: answers in rank order, failures of every rank shown, nobody left behind."""

import os
import time

import pytest
import torch

from dist import RanksFailedError, run_ranks


def sum_of_ranks(rank, world_size, start):
    total = torch.tensor(float(start + rank))
    torch.distributed.all_reduce(total)
    return rank, world_size, total.item(), torch.get_num_threads(), start


def fail_on_one(rank, world_size, pid_file):
    with open(f"{pid_file}{rank}", "w") as file:
        file.write(str(os.getpid()))
    torch.distributed.barrier()  # both are written
    if rank == 1:
        raise ValueError("rank one is unwell")
    torch.distributed.barrier()


def hang_here(rank, world_size):
    if rank == 0:
        while True:
            time.sleep(3600)


def die(rank, world_size):
    os._exit(7)


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_returns_answers_in_rank_order():
    assert run_ranks(2, sum_of_ranks, 10) == [(0, 2, 21.0, 1, 10), (1, 2, 21.0, 1, 10)]


def test_a_raising_rank_shows_its_traceback_and_ends_the_others(tmp_path):
    with pytest.raises(RanksFailedError, match="rank one is unwell"):
        run_ranks(2, fail_on_one, str(tmp_path / "pid"))
    for rank in range(2):
        assert not is_alive(int((tmp_path / f"pid{rank}").read_text()))


def test_a_hanging_rank_says_where():
    with pytest.raises(RanksFailedError, match="in hang_here"):
        run_ranks(2, hang_here, timeout=10.0)


def test_a_dead_rank_is_reported_by_its_exit_code():
    with pytest.raises(RanksFailedError, match="rank 0 gave no answer, exit code 7"):
        run_ranks(1, die)
