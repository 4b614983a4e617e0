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
from torch import Tensor, nn
from torch.distributed.tensor import Shard

from jddist import attach, grouping
from jddist.aggregation import GradVacWeighting, MoCo, UPGrad, UPGradWeighting
from jddist.autogram import Engine
from jddist.autojac import backward, jac_to_grad, jac_to_grad_groups, mtl_backward
from jddist.checkpoint import Checkpointer
from jddist.monitoring import Recorder
from tests._ranks import run_ranks
from tests.distributed._sharded import make_mesh, make_tied, shard
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
        tied = make_tied()
        self.shards = shard(tied, [tied.first, tied.narrow], mesh=make_mesh())
        attach(self.rows, objectives=Shard(0))
        self.engine = Engine(self.model, batch_dim=0)
        self.tasks = Engine(self.model, batch_dim=None)
        self.on_shards = Engine(self.shards, batch_dim=0)
        self.tasks_on_shards = Engine(self.shards, batch_dim=None)
        self.recorder = Recorder(f"{directory}/run", every=3, per_layer_every=20)
        self.recorder.watch(self.engine)
        self.weighting, self.stateful = UPGradWeighting(), GradVacWeighting()
        self.aggregators = [UPGrad(), MoCo()]
        self.groups = grouping.per_layer(self.rows)
        self.by_group = [UPGrad() for _ in self.groups]
        models = (self.model, self.rows, self.shards)
        self.optimizers = [torch.optim.SGD(m.parameters(), lr=1e-4, momentum=0.9) for m in models]
        self.x, self.y = (local_part(t, rank, world_size, "even") for t in make_data())
        self.checkpointer = Checkpointer(
            f"{directory}/checkpoints",
            self.model,
            self.optimizers[0],
            others={"weighting": self.stateful},
            keep=1,
        )
        self.kinds = (
            self._with_weights_that_remember,
            self._whole_step,
            self._step_by_step,
            self._tasks,
            self._accumulated,
            self._rows,
            self._rows_of_tasks,
            self._groups_of_rows,
            self._sharded,
            self._tasks_on_shards,
            self._accumulated_on_shards,
            self._rows_of_tasks_on_shards,
            self._nothing_but_a_forward,
        )
        self.taken = 0

    def take(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        self.kinds[self.taken % len(self.kinds)]()
        for optimizer in self.optimizers:
            optimizer.step()
        self.taken += 1

    def close(self) -> None:
        self.checkpointer.close()
        self.recorder.close()

    def _losses(
        self, model: nn.Module, kind: str = "instance", part: slice = slice(None)
    ) -> Tensor:
        return LOSSES[kind](model(self.x[part]), self.y[part])

    def _with_weights_that_remember(self) -> None:
        self.engine.backward(self._losses(self.model), self.stateful)

    def _whole_step(self) -> None:
        self.engine.backward(self._losses(self.model), self.weighting)

    def _step_by_step(self) -> None:
        losses = self._losses(self.model)
        gramian = self.engine.compute_gramian(losses)
        weights = self.engine.compute_weights(gramian, self.weighting)
        losses.backward(self.engine.local_weights(weights))

    def _tasks(self) -> None:
        losses = self._losses(self.model, "task")
        self.tasks.backward(losses, self.weighting, count=len(self.x))

    def _accumulated(self) -> None:
        with self.engine.accumulate():
            for part in (slice(0, 1), slice(1, None)):
                self.engine.backward(self._losses(self.model, part=part), self.weighting)

    def _rows(self) -> None:
        backward(self._losses(self.rows))
        number = self.taken // len(self.kinds)
        jac_to_grad(self.rows.parameters(), self.aggregators[number % 2])

    def _tasks_of(self, model: nn.Module) -> None:
        features = model(self.x)
        tasks: list[Tensor] = [features[:, i].square().mean() for i in range(4)]
        mtl_backward(tasks, features=features, count=len(self.x))

    def _rows_of_tasks(self) -> None:
        self._tasks_of(self.rows)
        jac_to_grad(self.rows.parameters(), self.aggregators[0])

    def _groups_of_rows(self) -> None:
        self._tasks_of(self.rows)
        jac_to_grad_groups(self.groups, self.by_group)

    def _sharded(self) -> None:
        self.on_shards.backward(self._losses(self.shards), self.weighting)

    def _tasks_on_shards(self) -> None:
        losses = self._losses(self.shards, "task")
        self.tasks_on_shards.backward(losses, self.weighting, count=len(self.x))

    def _accumulated_on_shards(self) -> None:
        with self.on_shards.accumulate():
            for part in (slice(0, 1), slice(1, None)):
                self.on_shards.backward(self._losses(self.shards, part=part), self.weighting)

    def _rows_of_tasks_on_shards(self) -> None:
        self._tasks_of(self.shards)
        trained = [p for p in self.shards.parameters() if p.requires_grad]
        jac_to_grad(trained, self.aggregators[0])

    def _nothing_but_a_forward(self) -> None:
        self.model(self.x)  # a validation forward: never goes back
        number = self.taken // len(self.kinds)
        if number % 50 == 0:
            self.checkpointer.save(self.taken, wait=number % 100 == 0)


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
    steps = _Steps(rank, world_size, folder)
    start = time.monotonic()
    due = torch.zeros(1)
    # On a machine that is too slow for all samples there are fewer, and the time is kept.
    while len(found) < MINIMUM or float(due) < seconds:
        for _ in range(2 * len(steps.kinds)):  # every sample is taken after the same ones
            steps.take()
        # The ranks have to take the same number of steps: rank 0's clock counts.
        due[0] = time.monotonic() - start
        dist.broadcast(due, 0)
        if float(due) >= seconds * (len(found) + 1) / samples or len(found) < MINIMUM:
            steps.checkpointer.wait()
            found.append({"steps": steps.taken, "ms": int(1000 * float(due)), **sample()})
    steps.close()
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
