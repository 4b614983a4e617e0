"""The harness of several ranks: results in order, failures surface, nothing hangs or remains."""

from __future__ import annotations

import os
import time
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests._ranks import RankFailure, run_ranks, split_sizes


def _sum_of_ranks(rank: int, world_size: int, offset: Tensor) -> dict[str, object]:
    total = offset + rank
    dist.all_reduce(total)
    return {"rank": rank, "size": dist.get_world_size(), "total": total, "pid": os.getpid()}


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_results_come_in_rank_order(world_size: int) -> None:
    results = run_ranks(_sum_of_ranks, world_size, torch.tensor([10.0]))
    assert [r["rank"] for r in results] == list(range(world_size))
    assert all(r["size"] == world_size for r in results)
    expected = torch.tensor([10.0 * world_size + sum(range(world_size))])
    assert all(torch.equal(r["total"], expected) for r in results)
    assert len({r["pid"] for r in results} | {os.getpid()}) == world_size + 1


def _fail_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ZeroDivisionError("the culprit")
    dist.barrier()  # waits for the rank that failed


def test_the_first_failure_surfaces_with_its_type_and_traceback() -> None:
    start = time.monotonic()
    with pytest.raises(ZeroDivisionError, match="the culprit") as caught:
        run_ranks(_fail_on_one, 3)
    assert "On rank 1 of 3" in caught.value.__notes__[0]
    assert "_fail_on_one" in caught.value.__notes__[0]
    assert time.monotonic() - start < 30  # not the group's timeout of 60 s


def _fail_while_others_work(rank: int, world_size: int) -> None:
    if rank == 0:
        raise ZeroDivisionError("the culprit")
    time.sleep(600)


def test_nobody_waits_for_ranks_that_outlive_a_failure() -> None:
    start = time.monotonic()
    with pytest.raises(ZeroDivisionError, match="the culprit"):
        run_ranks(_fail_while_others_work, 2)
    assert time.monotonic() - start < 30  # the grace is 5 s, the timeout 75 s


class _Unpicklable(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def _fail_unpicklably(rank: int, world_size: int) -> None:
    raise _Unpicklable(1, 2)


def test_an_exception_that_cannot_be_pickled_surfaces() -> None:
    with pytest.raises(RankFailure, match="_Unpicklable: 1 and 2"):
        run_ranks(_fail_unpicklably, 1)


def _hang(rank: int, world_size: int, path: str) -> None:
    if rank == 0:
        with open(path, "w") as file:
            file.write(str(os.getpid()))
        time.sleep(600)


def test_a_hang_is_killed_and_shows_where(tmp_path: os.PathLike[str]) -> None:
    path = os.path.join(tmp_path, "pid")
    with pytest.raises(RankFailure, match=r"ranks \[0\] of 2 did not end in time") as caught:
        run_ranks(_hang, 2, path, timeout=3, margin=2)
    assert "in _hang" in str(caught.value)
    with open(path) as file, pytest.raises(ProcessLookupError):
        os.kill(int(file.read()), 0)


def _die(rank: int, world_size: int) -> None:
    if rank == 1:
        os._exit(7)
    dist.barrier()


def test_a_death_without_an_exception_is_reported() -> None:
    # The survivor notices the closed connection; the cause is what has to be told.
    with pytest.raises(RankFailure, match="Rank 1 of 2 died with exit code 7"):
        run_ranks(_die, 2, timeout=20)


def _warn(rank: int, world_size: int) -> None:
    warnings.warn("nobody listens", stacklevel=1)


def test_warnings_are_errors_on_ranks_too() -> None:
    with pytest.raises(UserWarning, match="nobody listens"):
        run_ranks(_warn, 1)


def _return_an_object(rank: int, world_size: int) -> object:
    return object()


def test_a_result_that_is_no_plain_data_is_an_error() -> None:
    with pytest.raises(Exception, match="object"):
        run_ranks(_return_an_object, 1)


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("total", [5, 8, 13])
def test_split_sizes(total: int, world_size: int) -> None:
    even = split_sizes(total, world_size, "even")
    uneven = split_sizes(total, world_size, "uneven")
    for rank in range(world_size):
        empty = split_sizes(total, world_size, "empty", empty_rank=rank)
        assert sum(empty) == total and len(empty) == world_size
        assert [r for r, size in enumerate(empty) if size == 0] == [rank]
    assert sum(even) == sum(uneven) == total and len(even) == len(uneven) == world_size
    assert max(even) - min(even) <= 1
    assert min(uneven) >= 1 and len(set(uneven)) > 1


def test_impossible_splits_are_refused() -> None:
    with pytest.raises(ValueError, match="'empty'"):
        split_sizes(4, 1, "empty")
    with pytest.raises(ValueError, match="'uneven'"):
        split_sizes(2, 2, "uneven")
