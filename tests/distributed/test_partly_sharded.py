"""Parameters beside the sharded ones: every rank holds them, and no backward reduces theirs.

``engine.backward`` has to reduce them all the same, and to count their rows once. The bound is the
project's, 1e-10.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from jddist.aggregation import UPGradWeighting
from jddist.autogram import Engine
from jddist.errors import UnsupportedModelError
from tests._oracle import gramian as oracle_gramian
from tests._oracle import relative_error
from tests._ranks import run_ranks
from tests.distributed._sharded import assign, make_mesh, rows_of, shard, whole, whole_parameters
from tests.distributed._training import (
    LOSSES,
    OPTIMIZERS,
    STEPS,
    local_part,
    make_data,
    make_network,
)

BOUND = 1e-10
Found = dict[str, list[Tensor]]
OBJECTIVES = ("instance", "task")


def _split(model: nn.Module) -> list[list[nn.Parameter]]:
    parameters = list(model.parameters())
    sharded = [p for p in parameters if isinstance(p, DTensor)]
    return [sharded, [p for p in parameters if not isinstance(p, DTensor)]]


def _by_itself(replicas: int) -> nn.Module:
    """A norm and the last layer outside of all sharded modules."""
    model = make_network()
    mesh = make_mesh(replicas)
    return shard(model, [model.first, model.twice], mesh=mesh, root=False, reshard=True)


def _ignored(replicas: int) -> nn.Module:
    """The bias of the last layer, which the wrapper was told to leave alone."""
    model = make_network()
    mesh = make_mesh(replicas)
    ignored = {model.last.bias}
    shard(model, [model.first, model.twice], mesh=mesh, root=False, reshard=True)
    fully_shard(model, mesh=mesh, ignored_params=ignored)
    return model


def _train(
    rank: int, world_size: int, kind: str, model: nn.Module, objective: str, reshard: str
) -> Found:
    engine = Engine(
        model,
        batch_dim=0 if objective == "instance" else None,
        reshard=reshard,  # type: ignore[arg-type]
    )
    x, y = (local_part(t, rank, world_size, kind) for t in make_data())
    count = len(x) if objective == "task" else None
    opts = [OPTIMIZERS["adamw"](part) for part in _split(model)]  # type: ignore[arg-type]
    found: Found = {"gramians": [], "weights": [], "parameters": []}
    for step in range(STEPS):
        losses = LOSSES[objective](model(x), y)
        if step % 2 == 0:
            weights = engine.backward(losses, UPGradWeighting(), count=count)
        else:
            gramian = engine.compute_gramian(losses, count=count)
            found["gramians"].append(gramian)
            weights = engine.compute_weights(gramian, UPGradWeighting())
            if world_size > 1:
                with pytest.raises(UnsupportedModelError, match=r"not sharded: .*last\.bias"):
                    engine.local_weights(weights)  # a plain backward would not reduce all
                with pytest.raises(UnsupportedModelError, match=r"last\.bias.*backward="):
                    engine.backward(losses, weights, count=count, backward=lambda *_: None)
            engine.backward(losses, weights, count=count)
        for opt in opts:
            opt.step()
            opt.zero_grad()
        found["weights"].append(weights)
        found["parameters"].append(whole_parameters(model))
    return found


def _unused(rank: int, world_size: int, objective: str) -> Found:
    """Gradients add to what is there; on one rank the graph does not lead to the head."""
    model = _by_itself(1)
    engine = Engine(model, batch_dim=0)
    x, y = (local_part(t, rank, world_size, "even") for t in make_data())
    for p in _split(model)[1]:
        p.grad = torch.ones_like(p)
    features = model.norm(model.first(x))
    outputs = features[:, :4] if rank == 0 else model.last(features)
    losses = LOSSES["instance"](outputs, y)
    engine.backward(losses, torch.ones(len(make_data()[0]), dtype=torch.float64))
    return {"last": [whole(p.grad) for p in model.last.parameters()]}


def _all(rank: int, world_size: int, kind: str, replicas: int) -> dict[str, Found]:
    where = (rank, world_size, kind)
    found = {
        objective: _train(*where, _by_itself(replicas), objective, "speed")
        for objective in OBJECTIVES
    }
    found |= {f"{o}, ignored": _train(*where, _ignored(replicas), o, "memory") for o in OBJECTIVES}
    if world_size == 2:
        found["unused"] = _unused(rank, world_size, "instance")
    return found


def _reference(objective: str) -> Found:
    model, (x, y) = make_network(), make_data()
    opt = OPTIMIZERS["adamw"](list(model.parameters()))
    expected: Found = {"gramians": [], "weights": [], "parameters": []}
    for step in range(STEPS):
        losses = LOSSES[objective](model(x), y)
        rows = rows_of(losses, model)
        if step % 2:
            expected["gramians"].append(oracle_gramian(losses, model.parameters()))
        weights = UPGradWeighting()(rows @ rows.T)
        assign(model, weights @ rows)
        opt.step()
        expected["weights"].append(weights)
        expected["parameters"].append(whole_parameters(model))
    return expected


@pytest.mark.parametrize(("world_size", "kind", "replicas"), [(2, "uneven", 1), (4, "empty", 2)])
def test_partly_sharded_models_take_the_step_of_one_process(
    world_size: int, kind: str, replicas: int
) -> None:
    ranks = run_ranks(_all, world_size, kind, replicas)
    references = {objective: _reference(objective) for objective in OBJECTIVES}
    for found in ranks:
        for case in found:
            if case == "unused":
                continue
            for name, values in references[case.split(",")[0]].items():
                for i, (got, want) in enumerate(zip(found[case][name], values, strict=True)):
                    assert relative_error(got, want) <= BOUND, (case, name, i)
                    assert torch.equal(got, ranks[0][case][name][i]), (case, name, i)
    if world_size == 2:
        model, (x, y) = make_network(), make_data()
        first = len(local_part(x, 0, 2, "even"))
        losses = LOSSES["instance"](model.last(model.norm(model.first(x[first:]))), y[first:])
        losses.sum().backward()
        for found in ranks:
            for got, p in zip(found["unused"]["last"], model.last.parameters(), strict=True):
                assert p.grad is not None
                assert relative_error(got, p.grad + 1) <= BOUND
