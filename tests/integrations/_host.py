"""Runs an integration's cases on several ranks that share one import of its framework.

Frameworks take seconds to import, so a process of its own imports one, and forks all ranks:
``python -m tests.integrations._host MODULE FILE`` calls ``run(rank, world_size)`` of the module on
2 and on 3 ranks and saves what came back.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from tests._ranks import run_ranks

ROOT = Path(__file__).parents[2]
WORLDS = (2, 3)


def results_of(module: str, folder: Path, *, timeout: float = 400) -> dict[int, list[Any]]:
    """What ``run`` of a module beside this one returned, by number of ranks and by rank."""
    file = folder / f"{module}.pt"
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "tests.integrations._host", module, str(file)]
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stderr[-8000:]
    results: dict[int, list[Any]] = torch.load(file, weights_only=True)
    return results


def as_launched(rank: int, world_size: int) -> None:
    """Sets the variables that torchrun sets; the ranks have met already."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
        "TORCHELASTIC_RUN_ID": "tests",
        "ACCELERATE_USE_CPU": "true",
    }


def _main(name: str, file: str) -> None:
    torch.set_num_threads(1)
    module = importlib.import_module(f"tests.integrations.{name}")
    results = {
        world_size: run_ranks(module.run, world_size, start_method="fork", timeout=90.0)
        for world_size in WORLDS
    }
    torch.save(results, file)


if __name__ == "__main__":
    _main(*sys.argv[1:])
