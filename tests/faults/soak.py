"""Steps of every kind for a long time, with memory sampled: nothing may grow.

    python -m tests.faults.soak --minutes 30 --ranks 2

prints one line per sample and a verdict, and exits with 1 if anything grew.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import threading
import time

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import Shard

from jddist import attach
from jddist.aggregation import GradVacWeighting, MoCo, UPGrad, UPGradWeighting
from jddist.autogram import Engine
from jddist.autojac import backward, jac_to_grad, mtl_backward
from jddist.checkpoint import Checkpointer
from tests._ranks import run_ranks
from tests.distributed._training import LOSSES, local_part, make_data, make_network, wrap

# What is sampled, and by how much its level may rise between the first and the last third of the
# samples after the warm-up: kinds of things not at all, memory by what an allocator may keep.
LIMITS = {"tensors": 0, "tensor_bytes": 0, "threads": 0, "files": 0, "objects": 50, "rss": 4 << 20}
WARM_UP, MINIMUM = 0.3, 9


class _Steps:
    """Every way to take a step, in turn."""

    def __init__(self, rank: int, world_size: int, directory: str) -> None:
        self.model = wrap(make_network())
        self.rows = wrap(make_network())
        attach(self.rows, objectives=Shard(0))
        self.engine = Engine(self.model, batch_dim=0)
        self.tasks = Engine(self.model, batch_dim=None)
        self.weighting, self.stateful = UPGradWeighting(), GradVacWeighting()
        self.aggregators = [UPGrad(), MoCo()]
        models = (self.model, self.rows)
        self.optimizers = [torch.optim.SGD(m.parameters(), lr=1e-4, momentum=0.9) for m in models]
        self.x, self.y = (local_part(t, rank, world_size, "even") for t in make_data())
        self.checkpointer = Checkpointer(
            directory, self.model, self.optimizers[0], others={"weighting": self.stateful}, keep=1
        )
        self.taken = 0

    def take(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        x, y = self.x, self.y
        kind = self.taken % 8
        if kind in (0, 1):
            weighting = self.weighting if kind else self.stateful
            self.engine.backward(LOSSES["instance"](self.model(x), y), weighting)
        elif kind == 2:
            losses = LOSSES["instance"](self.model(x), y)
            gramian = self.engine.compute_gramian(losses)
            weights = self.engine.compute_weights(gramian, self.weighting)
            losses.backward(self.engine.local_weights(weights))
        elif kind == 3:
            losses = LOSSES["task"](self.model(x), y)
            self.tasks.backward(losses, self.weighting, count=len(x))
        elif kind == 4:
            with self.engine.accumulate():
                for part in (slice(0, 1), slice(1, None)):
                    losses = LOSSES["instance"](self.model(x[part]), y[part])
                    self.engine.backward(losses, self.weighting)
        elif kind == 5:
            backward(LOSSES["instance"](self.rows(x), y))
            jac_to_grad(self.rows.parameters(), self.aggregators[self.taken // 8 % 2])
        elif kind == 6:
            features = self.rows(x)
            tasks: list[Tensor] = [features[:, i].square().mean() for i in range(4)]
            mtl_backward(tasks, features=features, count=len(x))
            jac_to_grad(self.rows.parameters(), self.aggregators[0])
        else:
            self.model(x)  # a validation forward: never goes back
            if self.taken % 400 == 7:
                self.checkpointer.save(self.taken, wait=self.taken % 800 != 7)
        for optimizer in self.optimizers:
            optimizer.step()
        self.taken += 1


def sample() -> dict[str, int]:
    """What this process holds."""
    gc.collect()
    found = gc.get_objects()
    tensors = [o for o in found if issubclass(type(o), Tensor)]
    process = psutil.Process()
    return {
        "tensors": len(tensors),
        "tensor_bytes": sum(t.untyped_storage().nbytes() for t in tensors),
        "objects": len(found),
        "threads": threading.active_count(),
        "files": process.num_fds(),
        "rss": process.memory_info().rss,
    }


def steps_for(
    rank: int, world_size: int, seconds: float, samples: int, folder: str
) -> list[dict[str, int]]:
    """Takes steps for some time; the samples, with the number of steps and the milliseconds."""
    torch.manual_seed(0)
    found: list[dict[str, int]] = []
    steps = _Steps(rank, world_size, f"{folder}/checkpoints")
    start = time.monotonic()
    due = torch.zeros(1)
    # On a machine that is too slow for all samples there are fewer, and the time is kept.
    while len(found) < MINIMUM or float(due) < seconds:
        for _ in range(40):
            steps.take()
        # The ranks have to take the same number of steps: rank 0's clock counts.
        due[0] = time.monotonic() - start
        dist.broadcast(due, 0)
        if float(due) >= seconds * (len(found) + 1) / samples or len(found) < MINIMUM:
            steps.checkpointer.wait()
            found.append({"steps": steps.taken, "ms": int(1000 * float(due)), **sample()})
    steps.checkpointer.close()
    return found


def growth(samples: list[dict[str, int]]) -> dict[str, float]:
    """By how much the level of each quantity rose, from the first to the last third."""
    steady = samples[int(WARM_UP * len(samples)) :]
    third = max(1, len(steady) // 3)
    return {
        name: statistics.median(s[name] for s in steady[-third:])
        - statistics.median(s[name] for s in steady[:third])
        for name in LIMITS
    }


def too_much(samples: list[dict[str, int]]) -> dict[str, float]:
    """What grew beyond its limit."""
    return {name: rise for name, rise in growth(samples).items() if rise > LIMITS[name]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--samples", type=int, default=60)
    args = parser.parse_args()
    seconds = 60 * args.minutes
    with tempfile.TemporaryDirectory() as folder:
        work = (seconds, args.samples, folder)
        ranks = run_ranks(steps_for, args.ranks, *work, timeout=seconds + 300)
    bad = False
    for rank, samples in enumerate(ranks):
        if rank == 0:
            for entry in samples:
                print(" ".join(f"{name}={value}" for name, value in entry.items()))
        print(f"rank {rank}: {samples[-1]['steps']} steps; growth {growth(samples)}")
        if grown := too_much(samples):
            bad = True
            print(f"rank {rank}: GREW {grown}")
    print("memory grew" if bad else "nothing grew")
    sys.exit(bad)


if __name__ == "__main__":
    main()
