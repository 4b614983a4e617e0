"""This process among those that check together, with a store by which they compare results."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property

import torch
import torch.distributed as dist

from jddist.distribution.collectives import Group

# A collective of these few numbers that takes longer hangs.
_LONGEST_COLLECTIVE = 30.0
_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class CannotJoinError(RuntimeError):
    """The ranks did not find each other, or a backend is not there (the message names the fix)."""


@dataclass(frozen=True)
class Ranks:
    """One rank of several, or the only one.

    Attributes:
        rank: This process.
        size: The number of processes.
        backend: Of the process group: "nccl" or "gloo", or another that torch knows.
        device: Where the tensors of the checks are.
        store: Carries results between ranks; works when the backend does not.
        timeout: Seconds that a collective may take.
    """

    rank: int
    size: int
    backend: str
    device: torch.device
    store: dist.Store
    timeout: float

    @cached_property
    def group(self) -> Group:
        """All ranks, by jddist's own collectives."""
        return Group(dist.group.WORLD)

    @property
    def host(self) -> str:
        """The name of this rank's machine."""
        return socket.gethostname()

    def synchronize(self) -> None:
        """Waits for the device, so that a clock read next has seen all the work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def join(backend: str | None, device: str | None, timeout: float, *, alone: bool = False) -> Ranks:
    """Joins the ranks that torchrun (or anything else that sets its variables) started.

    Without ``RANK`` in the environment the process is a group of its own.

    Args:
        backend: None: NCCL if every local rank has a GPU, else gloo.
        device: "cpu" or "cuda"; None: as the backend needs it.
        timeout: Seconds that meeting the others may take.
        alone: To be a group of its own even with ``RANK``.

    Raises:
        CannotJoinError: Variables are missing, the backend is not there, or the others did not
            come in time.
    """
    alone = alone or "RANK" not in os.environ
    missing = [name for name in _NEEDED if name not in os.environ]
    if missing and not alone:
        raise CannotJoinError(
            f"Found RANK without {', '.join(missing)}; expected all of {', '.join(_NEEDED)}. "
            "Start with torchrun, or unset RANK to check one process."
        )
    local_rank = 0 if alone else int(os.environ.get("LOCAL_RANK", "0"))
    local_size = 1 if alone else int(os.environ.get("LOCAL_WORLD_SIZE", str(local_rank + 1)))
    backend = backend or _default_backend(device, local_size)
    found = _device(backend, device, local_rank)
    # Half of it: a store that finds nobody tries twice.
    limit = timedelta(seconds=timeout / 2)
    try:
        if alone:
            store: dist.Store = dist.HashStore()
            rank, size = 0, 1
        else:
            store, rank, size = next(iter(dist.rendezvous("env://", timeout=limit)))
        longest = min(timeout, _LONGEST_COLLECTIVE)
        store.set_timeout(timedelta(seconds=longest))
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("jddist-selftest-group", store),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=longest),
        )
    except (RuntimeError, ValueError) as error:
        where = "" if alone else f" at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise CannotJoinError(
            f"Found no group of ranks by {backend}{where} within {timeout:.0f} s ({error}); "
            "expected all ranks to meet. Look whether every one was started, whether the address "
            "and port can be reached from all machines, and whether GLOO_SOCKET_IFNAME or "
            "NCCL_SOCKET_IFNAME must name the network."
        ) from error
    results = dist.PrefixStore("jddist-selftest-results", store)
    return Ranks(rank, size, backend, found, results, longest)


def leave() -> None:
    """Ends the group that ``join`` began."""
    dist.destroy_process_group()
    # A gloo thread that lets go of the last collective's tensors only while Python shuts down
    # aborts the process (github.com/pytorch/pytorch/pull/179291): give it the time to do so before.
    time.sleep(0.2)


def _default_backend(device: str | None, local_size: int) -> str:
    enough = torch.cuda.device_count() >= local_size
    return "nccl" if device != "cpu" and enough and dist.is_nccl_available() else "gloo"


def _device(backend: str, device: str | None, local_rank: int) -> torch.device:
    if device == "cpu" or (device is None and backend != "nccl"):
        if backend == "nccl":
            raise CannotJoinError(
                "Found --backend nccl with --device cpu; expected a GPU, since NCCL sends from "
                "nowhere else. Leave out --device."
            )
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count == 0 or (backend == "nccl" and local_rank >= count):
        raise CannotJoinError(
            f"Found {count} GPUs for local rank {local_rank} with the backend {backend}; expected "
            "one for each local rank. Start fewer ranks, or pass --backend gloo --device cpu."
        )
    found = torch.device("cuda", local_rank % count)  # gloo ranks may share a GPU
    torch.cuda.set_device(found)
    return found
