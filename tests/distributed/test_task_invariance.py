"""World-size invariance of ``mtl_backward`` and ``jac_to_grad``: tasks with means over all samples.

Some tasks lack labels for some samples, so their counts differ, also between the ranks. The bound
1e-10 is the project's: rounding in float64 stays far below it over five steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from jddist import attach
from jddist.aggregation import UPGrad
from jddist.autojac import jac_to_grad, mtl_backward
from tests._oracle import jacobian, relative_error
from tests._ranks import run_ranks
from tests.distributed._training import (
    OPTIMIZERS,
    STEPS,
    TASKS,
    local_part,
    make_data,
    make_network,
    parameters_of,
    wrap,
)

BOUND = 1e-10


class MultiTask(nn.Module):
    """A trunk whose rows are aggregated, and a head per task."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = make_network()
        self.heads = nn.ModuleList([nn.Linear(TASKS, 1).double() for _ in range(TASKS)])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.trunk(x)
        return features, torch.cat([head(features) for head in self.heads], dim=1)


def _model() -> MultiTask:
    torch.manual_seed(2)
    return MultiTask()


def _labelled(y: Tensor) -> Tensor:
    """Which labels [b, TASKS] there are: each task lacks those above a bound of its own."""
    bounds = torch.tensor([9.0, 1.0, 0.5, 0.2], dtype=torch.float64)
    return y < bounds


def _losses(outputs: Tensor, y: Tensor, labelled: Tensor) -> list[Tensor]:
    """Each task's mean over the samples that have its label; NaN if there are none."""
    errors = (outputs - y).pow(2)
    return [errors[labelled[:, t], t].mean() for t in range(TASKS)]


def _train(rank: int, world_size: int, kind: str, optimizer: str) -> dict[str, list[Tensor]]:
    model = _model()
    ddp = wrap(model)
    attach(ddp)
    x, y = make_data()
    labelled = local_part(_labelled(y), rank, world_size, kind)
    x, y = (local_part(t, rank, world_size, kind) for t in (x, y))
    opt = OPTIMIZERS[optimizer](list(model.parameters()))
    found: dict[str, list[Tensor]] = {"weights": [], "parameters": []}
    for _ in range(STEPS):
        features, outputs = ddp(x)
        counts = labelled.sum(dim=0).tolist()
        mtl_backward(_losses(outputs, y, labelled), features=features, count=counts)
        found["weights"].append(jac_to_grad(model.trunk.parameters(), UPGrad()))
        opt.step()
        opt.zero_grad()
        found["parameters"].append(parameters_of(model))
    return found


def _reference(optimizer: str) -> dict[str, list[Tensor]]:
    model, (x, y) = _model(), make_data()
    opt = OPTIMIZERS[optimizer](list(model.parameters()))
    expected: dict[str, list[Tensor]] = {"weights": [], "parameters": []}
    for _ in range(STEPS):
        _, outputs = model(x)
        losses = torch.stack(_losses(outputs, y, _labelled(y)))
        rows = jacobian(losses, model.trunk.parameters())
        own = jacobian(losses.sum(), model.heads.parameters())[0]
        weights = UPGrad().gramian_weighting(rows @ rows.T)
        _assign(list(model.trunk.parameters()), weights @ rows)
        _assign(list(model.heads.parameters()), own)
        opt.step()
        expected["weights"].append(weights)
        expected["parameters"].append(parameters_of(model))
    return expected


def _assign(parameters: Sequence[Tensor], vector: Tensor) -> None:
    parts = vector.split([p.numel() for p in parameters])
    for p, part in zip(parameters, parts, strict=True):
        p.grad = part.view_as(p).clone()


def _all_optimizers(rank: int, world_size: int, kind: str) -> dict[str, dict[str, list[Tensor]]]:
    return {name: _train(rank, world_size, kind, name) for name in OPTIMIZERS}


@pytest.mark.parametrize(
    ("world_size", "kind"),
    [
        (1, "even"),
        (2, "even"),
        (2, "uneven"),
        (2, "empty"),
        (3, "uneven"),
        (3, "empty"),
        (4, "uneven"),
        (4, "empty"),
    ],
)
def test_any_split_takes_the_step_of_one_process(world_size: int, kind: str) -> None:
    _, y = make_data()
    parts = [_labelled(local_part(y, r, world_size, kind)).sum(dim=0) for r in range(world_size)]
    if world_size > 1:
        assert kind != "empty" or any((count == 0).any() for count in parts)  # NaN losses
        assert len({tuple(count.tolist()) for count in parts}) > 1
    ranks = run_ranks(_all_optimizers, world_size, kind)
    for optimizer in OPTIMIZERS:
        expected = _reference(optimizer)
        for found in (rank[optimizer] for rank in ranks):
            for name in ("weights", "parameters"):
                for step in range(STEPS):
                    got, want = found[name][step], expected[name][step]
                    assert relative_error(got, want) <= BOUND, (optimizer, name, step)
                    assert torch.equal(got, ranks[0][optimizer][name][step])
