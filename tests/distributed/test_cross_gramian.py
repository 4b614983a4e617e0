"""``Engine.cross_gramian`` on several ranks: the matrix of the two concatenated batches."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import Partial, Placement, Shard

from jddist.autogram import Engine
from jddist.errors import LayoutMismatchError, NonFiniteObjectiveError, RankError
from tests._oracle import jacobian, relative_error
from tests._ranks import run_ranks
from tests.distributed._training import local_part, make_data, make_network, wrap

BOUND = 1e-12


def kinds(world_size: int) -> list[str]:
    return ["even", "uneven", "empty"] if world_size > 1 else ["even"]


def batches() -> tuple[Tensor, Tensor]:
    x, _ = make_data()
    return x, x.flip(0)[:7] + 0.5


def task_losses(outputs: Tensor) -> Tensor:
    return outputs.square().mean(0)


def per_sample(outputs: Tensor) -> Tensor:
    return outputs.square().sum(1)


def per_sample_and_task(outputs: Tensor) -> Tensor:
    return outputs.square().T


PLACEMENTS: dict[str, tuple[Any, int | None, Placement]] = {
    "tasks": (task_losses, None, Partial("avg")),
    "samples": (per_sample, 0, Shard(0)),
    "samples and tasks": (per_sample_and_task, 1, Shard(0)),
}


def expected_cross(case: str) -> Tensor:
    losses, _, _ = PLACEMENTS[case]
    model = make_network()
    first, second = (losses(model(x)) for x in batches())
    rows = [jacobian(output, model.parameters()) for output in (first, second)]
    full = (rows[0] @ rows[1].T).reshape(*first.shape, *second.shape)
    ndim = first.ndim
    return full.permute(*range(ndim), *reversed(range(ndim, 2 * ndim)))


def _crosses(rank: int, world_size: int) -> dict[tuple[str, str], Tensor]:
    found = {}
    for case, (losses, batch_dim, placement) in PLACEMENTS.items():
        for kind in kinds(world_size):
            model = wrap(make_network())
            engine = Engine(model, batch_dim=batch_dim, objectives=placement)
            # Another distribution of the second batch.
            x1 = local_part(batches()[0], rank, world_size, kind)
            x2 = local_part(batches()[1].flip(0), world_size - 1 - rank, world_size, kind)
            x2 = x2.flip(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the mean of an empty batch
                first, second = losses(model(x1)), losses(model(x2))
            counts = (len(x1), len(x2)) if case == "tasks" else None
            found[case, kind] = engine.cross_gramian(first, second, counts=counts)
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_equals_one_process(world_size: int) -> None:
    results = run_ranks(_crosses, world_size)
    for case in PLACEMENTS:
        expected = expected_cross(case)
        for kind in kinds(world_size):
            for result in results:
                assert relative_error(result[case, kind], expected) <= BOUND
                assert torch.equal(result[case, kind], results[0][case, kind])


def _failures(rank: int, world_size: int) -> list[tuple[str, str]]:
    model = wrap(make_network())
    engine = Engine(model, batch_dim=None)
    x = local_part(make_data()[0][:8], rank, world_size, "even")
    good = task_losses(model(x))
    seen = []
    for bad in (good[: 4 - rank], good * (float("nan") if rank == 1 else 1.0), None):
        first = good if bad is not None or rank != 1 else good.detach()
        try:
            engine.cross_gramian(first, good if bad is None else bad)
        except (LayoutMismatchError, NonFiniteObjectiveError, RankError, ValueError) as error:
            seen.append((type(error).__name__, str(error)))
    return seen


def test_failures_are_heard_everywhere() -> None:
    results = run_ranks(_failures, 2)
    assert results[0][:2] == results[1][:2]
    assert [name for name, _ in results[0][:2]] == [
        "LayoutMismatchError",
        "NonFiniteObjectiveError",
    ]
    assert "rank 1" in results[0][1][1]
    assert all("does not require a gradient" in seen[2][1] for seen in results)
