"""What cannot be done on shards is refused, in the same words on every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from jddist import attach
from jddist.aggregation import (
    DBMTL,
    Aggregator,
    Constant,
    ConstantWeighting,
    CRMOGMWeighting,
    ExcessMTL,
    ExcessMTLWeighting,
    Flattening,
    GradDrop,
    GradNorm,
    Mean,
    MoCo,
    TrimmedMean,
    UPGrad,
    WeightedAggregator,
    Weighting,
)
from jddist.autogram import Engine
from jddist.autojac import jac_to_grad
from tests._ranks import run_ranks
from tests.distributed._methods import M
from tests.distributed._training import local_part, make_network, wrap
from tests.distributed.test_shards import UNEVEN, Rows, jacobian_of, set_jacs


class _Whole(Aggregator):
    """An aggregator that says nothing about shards."""

    def forward(self, matrix: Tensor, /) -> Tensor:
        return matrix.sum(dim=0) / matrix.norm()


class _RowLengths(Weighting[Tensor]):
    """A weighting that says nothing about shards."""

    def forward(self, stat: Tensor, /) -> Tensor:
        return stat.norm(dim=1)


def _message(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def _refusals(rank: int, world_size: int) -> dict[str, str]:
    mesh = init_device_mesh("cpu", (world_size,))
    dtensor = distribute_tensor(jacobian_of(UNEVEN, 0), mesh, [Shard(1)])
    model = Rows(UNEVEN)
    attach(wrap(model), objectives=Shard(0))
    parameters = list(model.parameters())

    def on_jacs(aggregator: Aggregator) -> None:
        set_jacs(parameters, local_part(jacobian_of(UNEVEN, 0), rank, world_size, "even"))
        jac_to_grad(parameters, aggregator)

    def with_losses(aggregator: GradNorm | DBMTL, losses: Tensor) -> Aggregator:
        aggregator.set_losses(losses)
        return aggregator

    def after_shards(aggregator: Aggregator) -> None:
        aggregator(dtensor)
        aggregator(jacobian_of(UNEVEN, 0))

    square = init_device_mesh("cpu", (world_size, 1))
    flat = distribute_tensor(jacobian_of(UNEVEN, 0), square, [Shard(1), Shard(0)])
    odd = DTensor.from_local(
        torch.ones(M, 1 + rank), mesh, [Shard(1)], run_check=False, shape=(M, 3), stride=(3, 1)
    )
    engine = Engine(wrap(make_network()), batch_dim=0)
    gramian = torch.eye(3)
    rank_losses = torch.full((M,), 1.0 + rank)
    own = torch.full((M,), 0.5 + 0.1 * rank)
    constant = ConstantWeighting(own)
    calls: dict[str, Callable[[], Any]] = {
        "unknown, DTensor": lambda: _Whole()(dtensor),
        "unknown, jac_to_grad": lambda: on_jacs(_Whole()),
        "unknown weighting": lambda: on_jacs(WeightedAggregator(_RowLengths())),
        "unknown, smoothed": lambda: on_jacs(WeightedAggregator(CRMOGMWeighting(_RowLengths()))),
        "mesh": lambda: UPGrad()(flat),
        "sizes": lambda: Mean()(odd),
        "needs J": lambda: engine.compute_weights(gramian, ExcessMTLWeighting()),
        "needs J, flattened": lambda: engine.compute_weights(
            gramian, Flattening(CRMOGMWeighting(ExcessMTLWeighting()))
        ),
        "no losses": lambda: GradNorm()(dtensor),
        "no losses, columns": lambda: DBMTL()(dtensor),
        "own losses": lambda: on_jacs(with_losses(GradNorm(), rank_losses)),
        "own weights": lambda: on_jacs(Constant(own)),
        "own weights, smoothed": lambda: on_jacs(WeightedAggregator(CRMOGMWeighting(constant))),
        "own leak": lambda: on_jacs(GradDrop(leak=own)),
        "own trim": lambda: on_jacs(TrimmedMean(rank)),
        "own beta": lambda: on_jacs(MoCo(beta=0.5 + 0.1 * rank)),
        "state on shards": lambda: after_shards(ExcessMTL()),
    }
    return {name: _message(call) for name, call in calls.items()}


EXPECTED = {
    "unknown, DTensor": "ValueError: Found _Whole on several ranks",
    "unknown, jac_to_grad": "ValueError: Found _Whole on several ranks",
    "unknown weighting": "ValueError: Found WeightedAggregator on several ranks",
    "unknown, smoothed": "ValueError: Found WeightedAggregator on several ranks",
    "mesh": "on a mesh of 2 dimensions",
    "sizes": "DTensor's own cut",
    "needs J": "ValueError: Found ExcessMTLWeighting where there is only a Gramian",
    "needs J, flattened": "ValueError: Found ExcessMTLWeighting where there is only a Gramian",
    "no losses": "RankError: The weighting failed on rank 0: ValueError: GradNormWeighting needs",
    "no losses, columns": "ValueError: DBMTL needs the values of the losses",
    "own losses": "LayoutMismatchError: Found ranks that disagree in jac_to_grad on losses",
    **{
        f"own {name}": "LayoutMismatchError: Found ranks that disagree in jac_to_grad on settings"
        for name in ("weights", "weights, smoothed", "leak", "trim", "beta")
    },
    "state on shards": "ValueError: Found a state that is spread over ranks",
}


def test_refusals() -> None:
    ranks = run_ranks(_refusals, 2)
    for found in ranks:
        assert found.keys() == EXPECTED.keys()
        for name, part in EXPECTED.items():
            assert part in found[name], name
    assert [n for n in EXPECTED if ranks[0][n] != ranks[1][n] and n != "sizes"] == []


@pytest.mark.parametrize("weighting", [ExcessMTLWeighting(), CRMOGMWeighting(ExcessMTLWeighting())])
def test_one_process_refuses_weightings_of_jacobians_too(weighting: Weighting) -> None:
    engine = Engine(make_network(), batch_dim=0)
    with pytest.raises(ValueError, match="WeightedAggregator"):
        engine.compute_weights(torch.eye(3), weighting)
