"""``engine.accumulate`` on several ranks: the step of the whole batch, however it is cut up."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from jddist.aggregation import UPGradWeighting
from jddist.autogram import Engine
from jddist.errors import RankError
from tests._oracle import jacobian, relative_error
from tests._ranks import run_ranks
from tests.distributed._training import local_part, make_data, make_network, wrap

BOUND = 1e-10
STEPS = 3
OPTIONS: list[dict[str, bool]] = [{}, {"find_unused_parameters": True}, {"static_graph": True}]


def per_sample(outputs: Tensor) -> Tensor:
    return outputs.square().sum(1)


def per_task(outputs: Tensor) -> Tensor:
    return outputs.square().mean(0)


CASES: dict[str, tuple[Any, int | None]] = {"samples": (per_sample, 0), "tasks": (per_task, None)}


def flat(model: torch.nn.Module, *, grad: bool) -> Tensor:
    values = [(p.grad if grad else p.detach()) for p in model.parameters()]
    return torch.cat([v.reshape(-1) for v in values if v is not None])


def reference(case: str) -> tuple[Tensor, Tensor]:
    """Weights and parameters after some steps of one process on the whole batch."""
    loss, _ = CASES[case]
    model = make_network()
    x, _ = make_data()
    for _ in range(STEPS):
        rows = jacobian(loss(model(x)), model.parameters())
        weights = UPGradWeighting()(rows @ rows.T)
        with torch.no_grad():
            gradient = weights @ rows
            for p, g in zip(
                model.parameters(),
                gradient.split([p.numel() for p in model.parameters()]),
                strict=True,
            ):
                p -= 0.05 * g.view_as(p)
    return weights, flat(model, grad=False)


def _train(rank: int, world_size: int) -> dict[str, tuple[Tensor, Tensor]]:
    found = {}
    for case, (loss, batch_dim) in CASES.items():
        for kind in ["uneven", "empty"]:
            for options in OPTIONS:
                model = wrap(make_network(), **options)
                engine = Engine(model, batch_dim=batch_dim)
                optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
                weighting = UPGradWeighting()
                mine = local_part(make_data()[0], rank, world_size, kind)
                # Another number of batches on every rank.
                cuts = max(1, len(mine) // (rank + 1))
                for _ in range(STEPS):
                    optimizer.zero_grad()
                    with engine.accumulate() as accumulation:
                        for x in mine.split(cuts) if len(mine) else [mine]:
                            with warnings.catch_warnings():
                                warnings.simplefilter("ignore")  # the mean of an empty batch
                                losses = loss(model(x))
                            count = len(x) if case == "tasks" else None
                            engine.backward(losses, weighting, count=count)
                    optimizer.step()
                assert accumulation.weights is not None
                name = f"{case}, {kind}, {options}"
                found[name] = (accumulation.weights, flat(model, grad=False))
    return found


@pytest.mark.parametrize("world_size", [2, 3])
def test_equals_one_process(world_size: int) -> None:
    results = run_ranks(_train, world_size)
    expected = {case: reference(case) for case in CASES}
    for name in results[0]:
        weights, parameters = expected[name.split(",")[0]]
        for result in results:
            assert relative_error(result[name][0], weights) <= BOUND, name
            assert relative_error(result[name][1], parameters) <= BOUND, name
            assert torch.equal(result[name][0], results[0][name][0])


def _fail(rank: int, world_size: int) -> tuple[str, str]:
    model = wrap(make_network())
    engine = Engine(model, batch_dim=0)
    weighting = UPGradWeighting()
    x = local_part(make_data()[0], rank, world_size, "even")
    try:
        with engine.accumulate():
            engine.backward(per_sample(model(x)), weighting)
            if rank == 1:
                raise KeyError("the second batch")
            engine.backward(per_sample(model(x)), weighting)
    except (KeyError, RankError) as error:
        caught = (type(error).__name__, str(error))
    assert all(p.grad is None for p in model.parameters())
    engine.backward(per_sample(model(x)), weighting)  # all ranks go on together
    return caught


def test_an_error_within_the_context_reaches_all_ranks() -> None:
    results = run_ranks(_fail, 3)
    assert results[1][0] == "KeyError"
    for rank in (0, 2):
        assert results[rank][0] == "RankError"
        assert "the second batch" in results[rank][1] and "rank 1" in results[rank][1]
