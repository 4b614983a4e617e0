"""Runs ranks of which some are meant to fail, and tells how each of them ended."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from tests._ranks import _PRELOADED, _end_with_parent

# On a machine that is busy with other things: by how much all limits are longer.
PATIENCE = float(os.environ.get("JDDIST_TEST_PATIENCE", "1"))
_NOT_MET = "the ranks did not meet"


class Outcome(NamedTuple):
    """How a rank ended.

    Attributes:
        kind: The type of its exception; "" if it returned, "killed" if it did not get to an end.
        message: What the exception said.
        seconds: From the start of the fault to the exception.
        log: What it wrote to its standard error.
    """

    kind: str
    message: str
    seconds: float
    log: str


def run_to_the_end(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float,
    store: str = "file",
    margin: float = 20.0,
) -> list[Outcome]:
    """Calls ``fn(rank, world_size, *args)`` on every rank, and waits until all that can have ended.

    Args:
        fn: A function at the top level of a module of tests.
        world_size: The number of ranks.
        *args: The same for all.
        timeout: The timeout of the process group, in seconds.
        store: "file", or "tcp": rank 0 then holds the store.
        margin: Seconds after the timeout by which all ranks must have ended, but stopped ones.

    Returns:
        The outcomes, in rank order.
    """
    for _ in range(3):
        outcomes = _run_once(fn, world_size, args, timeout, store, margin)
        if not any(outcome.kind == _NOT_MET for outcome in outcomes):
            break  # a busy machine may take longer than that to connect the ranks
    return outcomes


def _run_once(
    fn: Callable[..., Any],
    world_size: int,
    args: tuple[Any, ...],
    timeout: float,
    store: str,
    margin: float,
) -> list[Outcome]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    work = pickle.dumps((fn, args))
    home = Path(tempfile.mkdtemp(prefix="jddist-faults-"))
    processes: list[BaseProcess] = []
    try:
        for rank in range(world_size):
            process: BaseProcess = context.Process(
                target=_main,
                args=(rank, world_size, work, str(home), timeout, store),
                daemon=True,
            )
            process.start()
            processes.append(process)
        deadline = time.monotonic() + timeout + PATIENCE * margin
        for process in processes:
            while process.is_alive() and not _is_stopped(process):
                process.join(0.05)
                if time.monotonic() > deadline:
                    break
        return [_outcome(home, rank) for rank in range(world_size)]
    finally:
        for process in processes:
            process.kill()
            process.join()
        shutil.rmtree(home, ignore_errors=True)


def fault(kind: str) -> None:
    """What befalls a rank."""
    (Path(os.environ["JDDIST_FAULTS"]) / "begun").write_text(str(time.time()))
    if kind == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "hangs":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "raises":
        raise ValueError("boom")
    elif kind == "leaves":
        raise SystemExit(0)
    time.sleep(60 * PATIENCE)


def _is_stopped(process: BaseProcess) -> bool:
    try:
        stat = Path(f"/proc/{process.pid}/stat").read_text()
    except OSError:
        return False
    return stat[stat.rindex(")") + 2] == "T"


def _outcome(home: Path, rank: int) -> Outcome:
    log = home / f"log{rank}.txt"
    text = log.read_text() if log.exists() else ""
    file = home / f"outcome{rank}.json"
    if not file.exists():
        return Outcome("killed", "", 0.0, text)
    kind, message, ended = json.loads(file.read_text())
    begun = home / "begun"
    seconds = ended - float(begun.read_text()) if begun.exists() else 0.0
    return Outcome(kind, message, seconds, text)


def _main(
    rank: int, world_size: int, work: bytes, directory: str, timeout: float, store: str
) -> None:
    home = Path(directory)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["JDDIST_FAULTS"] = directory
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    sys.stderr = (home / f"log{rank}.txt").open("w", buffering=1)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    fn, args = pickle.loads(work)
    options: dict[str, Any] = {"init_method": f"file://{directory}/rendezvous"}
    if store == "tcp":
        options = {"store": _tcp_store(home, rank, world_size, timeout)}
    kind, message = _NOT_MET, ""
    try:
        dist.init_process_group(
            "gloo", rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout), **options
        )
        kind = ""
        fn(rank, world_size, *args)
    except SystemExit:
        kind = "SystemExit"
    except Exception as error:
        if kind != _NOT_MET:
            kind, message = type(error).__name__, str(error)
        sys.excepthook(type(error), error, error.__traceback__)  # as the interpreter does
    content = json.dumps([kind, message, time.time()])
    partial = home / f"outcome{rank}.partial"
    partial.write_text(content)
    partial.rename(home / f"outcome{rank}.json")
    sys.stderr.flush()
    os._exit(0 if kind == "" else 1)


def _tcp_store(home: Path, rank: int, world_size: int, timeout: float) -> dist.Store:
    limit = timedelta(seconds=timeout)
    port = home / "port"
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, world_size, True, limit, wait_for_workers=False)
        (home / "port.partial").write_text(str(store.port))
        (home / "port.partial").rename(port)
        return store
    while not port.exists():
        time.sleep(0.02)
    return dist.TCPStore("127.0.0.1", int(port.read_text()), world_size, False, limit)
