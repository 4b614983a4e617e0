"""``model_engine.backward(losses)`` on every ZeRO stage: the update of one process.

Tolerances: DeepSpeed's master weights are float32 (relative rounding 6e-8; measured: 1.3e-7 after
five updates). UPGrad's weights solve with the Gramian, and that of the tied model, whose layers are
two and three wide under nine samples, is nearly singular: there 3e-6 was measured.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import jddist
from jddist.aggregation import UPGradWeighting
from tests._oracle import jacobian
from tests._ranks import run_ranks
from tests.distributed._deepspeed import (
    deepspeed_ready,
    make_engine,
    reference_optimizer,
    whole_parameters,
)
from tests.distributed._sharded import make_tied
from tests.distributed._training import (
    LOSSES,
    STEPS,
    local_part,
    make_data,
    make_network,
    parameters_of,
    upgrad_for,
)

pytest.importorskip("deepspeed", reason='needs DeepSpeed: pip install "jddist[deepspeed]"')

# For each model: how far weights and parameters may be off one process in float64.
TOLERANCES = {"network": (1e-5, 1e-6), "tied": (1e-4, 2e-5)}


class Case(NamedTuple):
    """One training run: which model, on which stage, how the batch is split."""

    stage: int
    steps: int
    kind: str
    objective: str = "instance"
    model: str = "network"


MODELS = {"network": make_network, "tied": make_tied}


def _batches(case: Case) -> list[list[tuple[Tensor, Tensor]]]:
    """For each update, the micro-steps' whole batches."""
    x, y = make_data()
    return [
        [(x.roll(k + i, 0) * (1 + 0.1 * k), y.roll(i, 0)) for k in range(case.steps)]
        for i in range(STEPS)
    ]


def _reference(case: Case) -> tuple[list[Tensor], Tensor]:
    """Weights of all micro-steps and the final parameters of one process in float64."""
    model = MODELS[case.model]()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = reference_optimizer(model)
    weights = []
    for micro_steps in _batches(case):
        total = torch.zeros(sum(p.numel() for p in trained), dtype=torch.float64)
        for x, y in micro_steps:
            losses = LOSSES[case.objective](model(x), y)
            rows = jacobian(losses, trained)
            weights.append(UPGradWeighting()(rows @ rows.T).view(losses.shape))
            total += weights[-1].reshape(-1) @ rows / case.steps  # DeepSpeed takes the mean
        for p, part in zip(trained, total.split([p.numel() for p in trained]), strict=True):
            p.grad = part.view_as(p).clone()
        optimizer.step()
    return weights, parameters_of(model)


def _train(case: Case, rank: int, world_size: int) -> dict[str, Any]:
    engine = make_engine(MODELS[case.model]().float(), case.stage, steps=case.steps)
    batch_dim = {"instance": 0, "instance x task": 0, "task x instance": 1}[case.objective]
    attached = None
    weights = []
    for micro_steps in _batches(case):
        for x, y in micro_steps:
            x, y = (local_part(t, rank, world_size, case.kind).float() for t in (x, y))
            if attached is None:
                weighting = upgrad_for(LOSSES[case.objective](torch.zeros_like(y), y))
                attached = jddist.attach(engine, weighting=weighting, batch_dim=batch_dim)
            weights.append(engine.backward(LOSSES[case.objective](engine(x), y)))
            engine.step()
    assert attached is not None
    attached.detach()
    return {"weights": weights, "parameters": whole_parameters(engine)}


def _train_all(rank: int, world_size: int, cases: list[Case]) -> list[dict[str, Any]]:
    with deepspeed_ready(rank):
        return [_train(Case(*case), rank, world_size) for case in cases]


def _check(cases: list[Case], world_size: int) -> None:
    results = run_ranks(_train_all, world_size, [tuple(case) for case in cases], timeout=300.0)
    for i, case in enumerate(cases):
        expected_weights, expected = _reference(case)
        of_weights, of_parameters = TOLERANCES[case.model]
        for of_rank in results:
            for found, first in zip(of_rank[i]["weights"], results[0][i]["weights"], strict=True):
                assert torch.equal(found, first), case  # bit-identical on all ranks
            assert torch.equal(of_rank[i]["parameters"], results[0][i]["parameters"]), case
        found_weights, found = results[0][i]["weights"], results[0][i]["parameters"]
        for weights, expected_of_step in zip(found_weights, expected_weights, strict=True):
            error = (weights - expected_of_step).norm() / expected_of_step.norm()
            assert error < of_weights, (case, float(error))
        error = (found - expected).norm() / expected.norm()
        assert error < of_parameters, (case, float(error))


def test_one_rank_takes_the_step_of_one_process() -> None:
    _check([Case(stage, 1 + stage % 2, "even") for stage in range(4)], 1)


def test_two_ranks_take_the_step_of_one_process() -> None:
    cases = [Case(s, n, kind) for s in range(4) for n, kind in ((1, "uneven"), (2, "empty"))]
    cases += [
        Case(3, 1, "empty", "instance x task"),
        Case(2, 2, "uneven", "task x instance"),
        Case(1, 1, "even", "instance", "tied"),
        Case(3, 2, "uneven", "instance", "tied"),
    ]
    _check(cases, 2)


def test_three_ranks_take_the_step_of_one_process() -> None:
    cases = [Case(s, n, kind) for s in range(4) for n, kind in ((2, "uneven"), (1, "empty"))]
    _check([*cases, Case(3, 1, "uneven", "instance", "tied")], 3)


@pytest.mark.slow
def test_four_ranks_take_the_step_of_one_process() -> None:
    cases = [Case(s, n, kind) for s in range(4) for n, kind in ((1, "uneven"), (2, "empty"))]
    cases += [Case(s, 1, "uneven", "instance", "tied") for s in range(4)]
    _check(cases, 4)
