"""Runs a test's function on several ranks: real processes, a gloo group, and never a hung pytest.

The ranks are forked from a server that has torch imported already, so a run costs well under a
second. They meet through a file in a fresh directory: no port can be taken, and runs cannot mix.
"""

from __future__ import annotations

import faulthandler
import importlib
import multiprocessing
import os
import pickle
import shutil
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

_PRELOADED = [
    "torch",
    "torch.distributed",
    "torch.distributed.tensor",
    "torch.distributed.fsdp",
    "torch._dynamo",
]
# Once a rank has failed, the others either fail as well, soon, or wait in vain for it.
_GRACE = 5.0


class RankFailure(RuntimeError):
    """A rank died or hung, or raised what cannot be carried over to the test's process."""


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 60.0,
    margin: float = 15.0,
    start_method: Literal["forkserver", "fork"] = "forkserver",
) -> list[Any]:
    """Calls ``fn(rank, world_size, *args)`` on every rank of a gloo group.

    Args:
        fn: A function at the top level of an importable module of tests.
        world_size: The number of ranks; with 1 there is a process and a group too.
        *args: The same for all ranks; pickled.
        timeout: Seconds after which the group's collectives give up.
        margin: Seconds after that until the ranks are killed.
        start_method: "fork" for ranks that have what this process has imported; it must not have
            used torch yet.

    Returns:
        What the ranks returned, in rank order: tensors, numbers, strings, None, and lists, tuples
        and dicts of those.

    Raises:
        Exception: What the first rank to fail raised, with its traceback as a note.
        RankFailure: A rank died, hung, or raised something that cannot be pickled.
    """
    context: multiprocessing.context.BaseContext = multiprocessing.get_context(start_method)
    if start_method == "forkserver":
        context.set_forkserver_preload(_PRELOADED)
    work = pickle.dumps((fn, args))
    directory = Path(tempfile.mkdtemp(prefix="jddist-ranks-"))
    processes: list[BaseProcess] = []
    try:
        for rank in range(world_size):
            process: BaseProcess = context.Process(
                target=_rank_main,
                args=(rank, world_size, work, str(directory), timeout, margin),
                daemon=True,
            )
            process.start()
            processes.append(process)
        hung = _wait(processes, directory, deadline=time.monotonic() + timeout + margin)
        _raise_first_failure(processes, directory, hung)
        return [
            torch.load(directory / f"result{rank}.pt", weights_only=True)
            for rank in range(world_size)
        ]
    finally:
        for process in processes:
            process.kill()
            process.join()
        shutil.rmtree(directory, ignore_errors=True)


def split_sizes(
    total: int,
    world_size: int,
    kind: Literal["even", "uneven", "empty"],
    *,
    empty_rank: int = 0,
) -> list[int]:
    """How many of ``total`` samples each rank gets.

    Args:
        total: The number of samples.
        world_size: The number of ranks.
        kind: "even": as equal as can be; "uneven": at least one each, and not all the same;
            "empty": none for ``empty_rank``, the others evenly.
        empty_rank: The rank without samples; 0 is the one on which weightings run.

    Raises:
        ValueError: There is no such split.
    """
    if kind == "even":
        return [(total + world_size - 1 - rank) // world_size for rank in range(world_size)]
    if kind == "empty" and world_size > 1:
        sizes = split_sizes(total, world_size - 1, "even")
        return [*sizes[:empty_rank], 0, *sizes[empty_rank:]]
    if kind == "uneven" and 1 < world_size < total:
        shares = world_size * (world_size + 1) // 2
        sizes = [1 + (total - world_size) * (rank + 1) // shares for rank in range(world_size)]
        sizes[-1] += total - sum(sizes)
        return sizes
    raise ValueError(
        f"Found no split of kind {kind!r} of {total} samples over {world_size} ranks; expected "
        "'even', or 'empty' with two ranks or more, or 'uneven' with more samples than ranks."
    )


def _rank_main(
    rank: int, world_size: int, work: bytes, directory: str, timeout: float, margin: float
) -> None:
    home = Path(directory)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    stacks = (home / f"stack{rank}.txt").open("w")
    faulthandler.dump_traceback_later(timeout + margin / 2, file=stacks)
    try:
        # The server's sys.path is older than the test's; functions are found by their names.
        importlib.invalidate_caches()
        torch.set_num_threads(1)
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fn, args = pickle.loads(work)
            dist.init_process_group(
                "gloo",
                init_method=f"file://{directory}/rendezvous",
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=timeout),
            )
            result = fn(rank, world_size, *args)
        partial = home / f"result{rank}.partial"
        torch.save(result, partial)
        # Read back here, so that a result of a wrong type is an error of the rank that made it.
        torch.load(partial, weights_only=True)
        partial.rename(home / f"result{rank}.pt")
    except BaseException as error:
        _report(home, rank, error)
        raise SystemExit(1) from None
    finally:
        faulthandler.cancel_dump_traceback_later()
        if dist.is_initialized():
            dist.destroy_process_group()


def _end_with_parent() -> None:
    """Ends this rank if pytest dies without cleaning up."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _report(home: Path, rank: int, error: BaseException) -> None:
    text = traceback.format_exc()
    try:
        content = pickle.dumps(error)
        pickle.loads(content)
    except Exception:  # whatever an exception's own constructor does
        content = pickle.dumps(RankFailure(f"{type(error).__name__}: {error}"))
    (home / f"error{rank}.txt").write_text(text)
    partial = home / f"error{rank}.partial"
    partial.write_bytes(content)
    partial.rename(home / f"error{rank}.pickle")


def _wait(processes: list[BaseProcess], directory: Path, deadline: float) -> list[int]:
    """Waits for all ranks and kills what is late; the ranks that were killed."""
    while True:
        running = [rank for rank, process in enumerate(processes) if process.is_alive()]
        if not running:
            return []
        if any(p.exitcode not in (None, 0) for p in processes):
            deadline = min(deadline, time.monotonic() + _GRACE)
        if time.monotonic() > deadline:
            for rank in running:
                processes[rank].kill()
                processes[rank].join()
            return running
        processes[running[0]].join(0.02)


def _raise_first_failure(processes: list[BaseProcess], directory: Path, hung: list[int]) -> None:
    size = len(processes)
    for rank, process in enumerate(processes):
        reported = (directory / f"error{rank}.pickle").exists()
        if process.exitcode != 0 and not reported and rank not in hung:
            raise RankFailure(
                f"Rank {rank} of {size} died with exit code {process.exitcode} and without a "
                "Python exception; see its output above."
            )
    reports = sorted(directory.glob("error*.pickle"), key=lambda path: path.stat().st_mtime_ns)
    if reports:
        error: BaseException = pickle.loads(reports[0].read_bytes())
        rank = int(reports[0].stem.removeprefix("error"))
        error.add_note(f"On rank {rank} of {size}:\n{reports[0].with_suffix('.txt').read_text()}")
        raise error
    if hung:
        stacks = "\n".join(
            f"rank {rank}:\n{(directory / f'stack{rank}.txt').read_text()}" for rank in hung
        )
        raise RankFailure(
            f"The ranks {hung} of {size} did not end in time and were killed.\n{stacks}"
        )
