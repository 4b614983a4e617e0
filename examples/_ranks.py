"""The ranks that train together: joining, leaving and starting them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together."""

    rank: int
    size: int
    device: torch.device

    def part(self, batch: Tensor) -> Tensor:
        """This rank's contiguous part of a batch; sizes may differ by one."""
        return batch.tensor_split(self.size)[self.rank]

    def clock(self) -> float:
        """Seconds, read when all the work so far is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of every rank's tensor."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor


def under_torchrun() -> bool:
    """Whether torchrun, or something like it, started this process."""
    return "RANK" in os.environ


def start_ranks() -> Ranks:
    """Joins the ranks that torchrun started; without torchrun, there is one."""
    torch.set_num_threads(1)
    if not under_torchrun():
        return Ranks(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    device = torch.device("cpu")
    # NCCL wants a GPU for each rank; with fewer of them all ranks stay on the CPU.
    if torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"]):
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # All attempts of torchrun --max-restarts share one store, in torch 2.13: without a prefix, a
    # rank may read where its peers of the attempt before were listening.
    store, rank, size = next(dist.rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"attempt {attempt}", store)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    return Ranks(rank, size, device)


def leave_ranks() -> None:
    """Ends the group that `start_ranks` began, if any."""
    if not dist.is_initialized():
        return
    dist.destroy_process_group()
    # A gloo thread that lets go of the last collective's tensors only while Python shuts down
    # aborts the process (github.com/pytorch/pytorch/pull/179291): give it the time to do so before.
    time.sleep(0.2)


def torchrun(script: str, count: int, options: Sequence[str]) -> None:
    """Runs ``script`` on ``count`` ranks of this machine."""
    print(f"\n{count} rank{'s' if count > 1 else ''}", flush=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    # Without "--", torchrun takes a script's --nproc for a short form of an option of its own.
    command += ["--nproc-per-node", str(count), "--", script, *options]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    subprocess.run(command, check=True, env=environment)
