"""NaN that a rank sends, at any stage: an error with a name on every rank, and no gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import Partial
from torch.nn.parallel import DistributedDataParallel

from jddist.aggregation import UPGradWeighting
from jddist.autogram import Engine
from jddist.distribution.collectives import Group
from jddist.distribution.triangle import pack_lower
from tests._ranks import run_ranks
from tests.distributed._training import (
    LOSSES,
    SAMPLES,
    local_part,
    make_data,
    make_network,
    wrap,
)

NAN = float("nan")
Scenario = Callable[[DistributedDataParallel, Tensor, bool, pytest.MonkeyPatch], object]


def _losses(ddp: DistributedDataParallel, x: Tensor) -> Tensor:
    return LOSSES["instance"](ddp(x), torch.zeros(len(x), 4, dtype=x.dtype))


def _forward(
    ddp: DistributedDataParallel, x: Tensor, culprit: bool, patch: pytest.MonkeyPatch
) -> object:
    x = x.clone()
    if culprit:
        x[0, 0] = NAN
    return Engine(ddp, batch_dim=0).backward(_losses(ddp, x), UPGradWeighting())


def _handshake(
    ddp: DistributedDataParallel, x: Tensor, culprit: bool, patch: pytest.MonkeyPatch
) -> object:
    engine = Engine(ddp, batch_dim=None, objectives=Partial("avg"))
    losses = LOSSES["task"](ddp(x), torch.zeros(len(x), 4, dtype=x.dtype))
    count = torch.full((4,), NAN) if culprit else torch.full((4,), 3.0)
    return engine.backward(losses, UPGradWeighting(), count=count)


def _exchange(
    ddp: DistributedDataParallel, x: Tensor, culprit: bool, patch: pytest.MonkeyPatch
) -> object:
    engine = Engine(ddp, batch_dim=0)
    all_reduce = Group.all_reduce

    def broken(group: Group, tensor: Tensor) -> Tensor:
        if culprit:
            packed = pack_lower(torch.arange(SAMPLES**2).view(SAMPLES, SAMPLES)).tolist()
            tensor[packed.index(SAMPLES * 4 + 1)] = NAN  # not on the diagonal
        return all_reduce(group, tensor)

    losses = _losses(ddp, x)
    patch.setattr(Group, "all_reduce", broken)
    return engine.backward(losses, UPGradWeighting())


def _weighting(
    ddp: DistributedDataParallel, x: Tensor, culprit: bool, patch: pytest.MonkeyPatch
) -> object:
    def weights(gramian: Tensor) -> Tensor:
        return gramian.diagonal() * NAN

    return Engine(ddp, batch_dim=0).backward(_losses(ddp, x), weights)


def _broadcast(
    ddp: DistributedDataParallel, x: Tensor, culprit: bool, patch: pytest.MonkeyPatch
) -> object:
    engine = Engine(ddp, batch_dim=0)
    broadcast = Group.broadcast

    def broken(group: Group, tensor: Tensor) -> Tensor:
        if group.rank == 0:
            tensor[-1] = NAN
        return broadcast(group, tensor)

    losses = _losses(ddp, x)
    patch.setattr(Group, "broadcast", broken)
    return engine.backward(losses, UPGradWeighting())


SCENARIOS: dict[str, tuple[Scenario, str, str]] = {
    "forward": (_forward, "NonFiniteObjectiveError", "rank 1"),
    "handshake": (_handshake, "RankError", "rank 1"),
    "exchange": (_exchange, "NonFiniteObjectiveError", "1 (rank 0), objective 4 (rank 1)"),
    "weighting": (_weighting, "RankError", "NaN or infinity among the weights of weights"),
    "broadcast": (_broadcast, "RankError", "came from rank 0"),
}


def _run(rank: int, world_size: int) -> dict[str, list[object]]:
    ddp = wrap(make_network())
    x, _ = (local_part(t, rank, world_size, "uneven") for t in make_data())
    found: dict[str, list[object]] = {}
    for name, (scenario, _, _) in SCENARIOS.items():
        for p in ddp.parameters():
            p.grad = torch.full_like(p, 7.0)
        kind, message = "", ""
        with pytest.MonkeyPatch.context() as patch:
            try:
                scenario(ddp, x, rank == 1, patch)
            except Exception as error:  # compared below
                kind, message = type(error).__name__, str(error)
        untouched = all(bool((p.grad == 7.0).all()) for p in ddp.parameters())
        found[name] = [kind, message, untouched]
    return found


def test_nan_is_an_error_on_every_rank() -> None:
    ranks = run_ranks(_run, 3)
    for name, (_, kind, part) in SCENARIOS.items():
        for found in ranks:
            assert found[name] == ranks[0][name], name
            assert found[name][0] == kind, (name, found[name])
            assert part in str(found[name][1]), (name, found[name])
            assert found[name][2], name


def test_weights_that_are_not_finite_are_an_error_in_one_process_too() -> None:
    model = make_network()
    losses = LOSSES["task"](model(make_data()[0]), make_data()[1])
    with pytest.raises(ValueError, match="NaN or infinity among the weights"):
        Engine(model, batch_dim=None).backward(losses, lambda gramian: gramian[0] / 0)
    assert all(p.grad is None for p in model.parameters())
