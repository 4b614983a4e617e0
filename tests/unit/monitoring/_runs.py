"""Small runs to record."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from jddist.aggregation import UPGradWeighting
from jddist.autogram import Engine
from jddist.monitoring import Recorder

TASKS = 4


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, TASKS)).double()


def batch(step: int, size: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(size, 5, generator=generator, dtype=torch.float64)


def task_losses(model: nn.Module, x: Tensor) -> Tensor:
    """One loss per output, with some conflict."""
    targets = torch.tensor([1.0, -1.0, 2.0, 0.5], dtype=torch.float64)
    return (model(x) - targets).square().mean(dim=0)


def train_on_tasks(recorder: Recorder, steps: int, start: int = 0) -> list[Tensor]:
    """Steps of an engine, recorded; the weights of each."""
    model = make_model()
    engine = Engine(model, batch_dim=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    weighting = UPGradWeighting()
    found = []
    with recorder.watch(engine):
        for step in range(start, start + steps):
            optimizer.zero_grad()
            found.append(engine.backward(task_losses(model, batch(step)), weighting))
            optimizer.step()
    return found


def train_on_samples(recorder: Recorder, steps: int, size: int = 8) -> None:
    """The same, every sample being an objective."""
    model = make_model()
    engine = Engine(model, batch_dim=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    weighting = UPGradWeighting()
    with recorder.watch(engine):
        for step in range(steps):
            optimizer.zero_grad()
            engine.backward(model(batch(step, size)).square().sum(dim=1), weighting)
            optimizer.step()
