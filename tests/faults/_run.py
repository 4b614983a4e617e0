"""A small training run with every kind of state, for the tests of checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from jddist.aggregation import GradVacWeighting
from jddist.autogram import Engine
from jddist.checkpoint import Checkpointer


class Run:
    """Adam with a schedule, dropout, a stateful random weighting, and a shuffle of its own."""

    def __init__(self, directory: Path, seed: int = 0, keep: int = 2) -> None:
        torch.manual_seed(seed)
        layers = [nn.Linear(5, 6), nn.Tanh(), nn.Dropout(0.2), nn.BatchNorm1d(6), nn.Linear(6, 4)]
        self.model = nn.Sequential(*layers).double()
        self.model[3].eval()  # its running statistics stay, but are part of the state
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
        self.schedule = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, [2, 5])
        self.weighting = GradVacWeighting()
        self.shuffle = torch.Generator().manual_seed(seed)
        self.engine = Engine(self.model, batch_dim=0)
        others = {
            "schedule": self.schedule,
            "weighting": self.weighting,
            "shuffle": self.shuffle,
        }
        self.checkpointer = Checkpointer(
            directory, self.model, self.optimizer, others=others, keep=keep
        )
        self.taken = 0

    def steps(self, count: int) -> Tensor:
        for _ in range(count):
            x = torch.randn(8, 5, generator=self.shuffle, dtype=torch.float64)
            self.optimizer.zero_grad()
            self.engine.backward(self.model(x).square().mean(dim=1), self.weighting)
            self.optimizer.step()
            self.schedule.step()
            self.taken += 1
        return self.parameters()

    def save(self, *, wait: bool = True) -> None:
        self.checkpointer.save(self.taken, {"samples": 8 * self.taken}, wait=wait)

    def resume(self) -> int | None:
        loaded = self.checkpointer.load_latest()
        if loaded is None:
            return None
        assert loaded.position == {"samples": 8 * loaded.step}
        self.taken = loaded.step
        return loaded.step

    def parameters(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.model.parameters()])
