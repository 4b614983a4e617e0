"""Task-wise objectives on every ZeRO stage: ``mtl_backward``, ``jac_to_grad``, groups, the engine.

Sizes are odd on purpose: no parameter can be cut into equal slices. Tolerance as in
``test_deepspeed``: float32 rounding (measured: 1.4e-7 after five updates).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import Partial, Shard

import jddist
from jddist.aggregation import TrimmedMean, UPGrad, UPGradWeighting
from jddist.autogram import Engine
from jddist.autojac import backward, jac, jac_to_grad, jac_to_grad_groups, mtl_backward
from jddist.grouping import per_layer
from tests._oracle import jacobian
from tests._ranks import run_ranks
from tests.distributed._deepspeed import (
    deepspeed_ready,
    make_engine,
    reference_optimizer,
    whole_gradients,
    whole_parameters,
)
from tests.distributed._training import (
    FEATURES,
    STEPS,
    TASKS,
    local_part,
    make_data,
    parameters_of,
)

pytest.importorskip("deepspeed", reason='needs DeepSpeed: pip install "jddist[deepspeed]"')

TOLERANCE = 1e-6


class Heads(nn.Module):
    """A trunk that all tasks share, with a head for each."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(FEATURES, 7), nn.Tanh(), nn.Linear(7, 3), nn.Tanh())
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.heads = nn.ModuleList(nn.Linear(3, 1) for _ in range(TASKS))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.trunk(x)
        hidden = torch.tanh(self.frozen(features))
        return features, torch.cat([head(hidden) for head in self.heads], dim=1)

    def shared(self) -> list[nn.Parameter]:
        return list(self.trunk.parameters())


def make_heads() -> Heads:
    torch.manual_seed(4)
    return Heads().double()


def _losses(outputs: Tensor, y: Tensor) -> Tensor:
    scale = torch.arange(1, TASKS + 1, dtype=y.dtype)
    return ((outputs - y).pow(2) + 0.3 * outputs * (scale - 2.5)).mean(dim=0)


class Case(NamedTuple):
    """One training run."""

    stage: int
    steps: int
    kind: str
    way: str


def _batches(case: Case) -> list[list[tuple[Tensor, Tensor]]]:
    x, y = make_data()
    return [
        [(x.roll(k + i, 0) * (1 + 0.1 * k), y.roll(i, 0)) for k in range(case.steps)]
        for i in range(STEPS)
    ]


def _global_gradient(way: str, model: Heads, losses: Tensor) -> Tensor:
    """The gradient [n] of all trainable parameters in one process, by brute force."""
    trained = [p for p in model.parameters() if p.requires_grad]
    rows = jacobian(losses, trained)
    width = sum(p.numel() for p in model.shared())  # they come first
    if way in ("engine", "backward"):
        return UPGradWeighting()(rows @ rows.T) @ rows
    shared, own = rows[:, :width], rows[:, width:].sum(dim=0)
    if way == "mtl":
        return torch.cat([UPGradWeighting()(shared @ shared.T) @ shared, own])
    if way == "columns":
        return torch.cat([TrimmedMean(1)(shared), own])
    pieces = []
    layers = [sum(p.numel() for p in layer.parameters()) for layer in model.trunk[::2]]
    for part in shared.split(layers, dim=1):
        pieces.append(UPGradWeighting()(part @ part.T) @ part)
    return torch.cat([*pieces, own])


def _reference(case: Case) -> Tensor:
    model = make_heads()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = reference_optimizer(model)
    for micro_steps in _batches(case):
        gradients = [
            _global_gradient(case.way, model, _losses(model(x)[1], y)) for x, y in micro_steps
        ]
        mean = torch.stack(gradients).mean(dim=0)  # DeepSpeed's convention for micro-steps
        for p, part in zip(trained, mean.split([p.numel() for p in trained]), strict=True):
            p.grad = part.view_as(p).clone()
        optimizer.step()
    return parameters_of(model)


def _take(case: Case, engine: Any, x: Tensor, y: Tensor) -> None:
    """One micro-step of this rank, up to ``engine.step()``."""
    features, outputs = engine(x)
    losses = _losses(outputs, y)
    if case.way == "engine":
        engine.backward(losses, count=len(x))
        return
    if case.way == "backward":
        # Means over ranks: every rank's estimate counts by its share of the samples.
        total, size = len(make_data()[0]), torch.distributed.get_world_size()
        backward(losses.nan_to_num() * (len(x) * size / total), UPGrad())
        return
    mtl_backward(list(losses), features, count=len(x))
    if case.way == "mtl":
        jac_to_grad(engine.module.shared(), UPGrad())
    elif case.way == "columns":
        jac_to_grad(engine.module.shared(), TrimmedMean(1))
    else:
        groups = [g for g in per_layer(engine) if g[0] in set(engine.module.shared())]
        jac_to_grad_groups(groups, [UPGrad() for _ in groups])


def _train(case: Case, rank: int, world_size: int) -> Tensor:
    engine = make_engine(make_heads().float(), case.stage, steps=case.steps)
    if case.way == "engine":
        attached = jddist.attach(engine, weighting=UPGradWeighting())
    elif case.way == "backward":
        attached = jddist.attach(engine, objectives=Partial("avg"))
    else:
        attached = jddist.attach(engine)
    for micro_steps in _batches(case):
        for x, y in micro_steps:
            x, y = (local_part(t, rank, world_size, case.kind).float() for t in (x, y))
            _take(case, engine, x, y)
            engine.step()
    attached.detach()
    return whole_parameters(engine)


def _train_all(rank: int, world_size: int, cases: list[Case]) -> list[Tensor]:
    with deepspeed_ready(rank):
        return [_train(Case(*case), rank, world_size) for case in cases]


def _check(cases: list[Case], world_size: int) -> None:
    results = run_ranks(_train_all, world_size, [tuple(case) for case in cases], timeout=300.0)
    for i, case in enumerate(cases):
        for of_rank in results:
            assert torch.equal(of_rank[i], results[0][i]), case
        expected = _reference(case)
        error = float((results[0][i] - expected).norm() / expected.norm())
        assert error < TOLERANCE, (case, error)


WAYS = ("mtl", "groups", "engine", "backward", "columns")


def test_one_rank_takes_the_step_of_one_process() -> None:
    _check([Case(s, 1 + s % 2, "even", way) for s in range(4) for way in ("mtl", "engine")], 1)


def test_two_ranks_take_the_step_of_one_process() -> None:
    cases = [Case(s, 1, "uneven", way) for s in range(4) for way in WAYS]
    cases += [Case(s, 2, "empty", "mtl") for s in range(4)]
    _check(cases, 2)


def test_three_ranks_take_the_step_of_one_process() -> None:
    cases = [Case(s, 2, "uneven", way) for s in (0, 2, 3) for way in ("mtl", "groups")]
    cases += [Case(s, 1, "empty", way) for s in (1, 3) for way in ("mtl", "engine")]
    _check(cases, 3)


@pytest.mark.slow
def test_four_ranks_take_the_step_of_one_process() -> None:
    _check([Case(s, 2, "empty", way) for s in range(4) for way in WAYS], 4)


def _rows(rank: int, world_size: int) -> dict[str, list[Tensor]]:
    """What stage 3 gives of rows, Gramians and gradients, of samples and of tasks."""
    found: dict[str, list[Tensor]] = {"jac": [], "gramian": [], "gradient": [], "instances": []}
    with deepspeed_ready(rank):
        for stage in (2, 3):
            engine = make_engine(make_heads().float(), stage)
            attached = jddist.attach(engine, objectives=Shard(0))
            gramians = Engine(engine, batch_dim=0)
            x, y = (local_part(t, rank, world_size, "uneven").float() for t in make_data())
            _, outputs = engine(x)
            losses = (outputs - y).pow(2).sum(dim=1)
            trained = [p for p in engine.module.parameters() if p.requires_grad]
            rows = jac(losses, trained, retain_graph=True)
            found["jac"].append(torch.cat([r.reshape(len(x), -1) for r in rows], dim=1))
            found["gramian"].append(gramians.compute_gramian(losses))
            backward(losses, UPGrad())
            attached.hand_over()  # type: ignore[attr-defined]
            found["gradient"].append(whole_gradients(engine))
            engine.step()
            attached.detach()
    return found


def test_rows_gramians_and_gradients_agree_with_brute_force() -> None:
    results = run_ranks(_rows, 2, timeout=300.0)
    model, (x, y) = make_heads(), make_data()
    losses = (model(x)[1] - y).pow(2).sum(dim=1)
    rows = jacobian(losses, [p for p in model.parameters() if p.requires_grad])
    gramian = rows @ rows.T
    for i in range(2):
        found = torch.cat([of_rank["jac"][i] for of_rank in results])
        assert (found - rows).norm() < 1e-6 * rows.norm()
        for of_rank in results:
            assert (of_rank["gramian"][i] - gramian).norm() < 1e-6 * gramian.norm()
            expected = UPGradWeighting()(gramian) @ rows
            assert (of_rank["gradient"][i] - expected).norm() < 1e-5 * expected.norm()
