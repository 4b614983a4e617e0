"""World-size invariance on models in ``fully_shard``: any cut takes the step of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
)

from jddist.autogram import Engine
from tests._oracle import relative_error
from tests._ranks import run_ranks, split_sizes
from tests.distributed._conformance import BOUND, Found, Setup, check_cases, run_cases
from tests.distributed._every_method import Many
from tests.distributed._sharded import make_mesh, make_tied, rows_of, shard, whole_gradients
from tests.distributed._training import (
    LOSSES,
    SAMPLES,
    flatten,
    local_part,
    make_data,
    make_network,
)
from tests.distributed.test_task_invariance import MultiTask

# Ranks, how the batch is split, and how many replicas of the model there are.
WORLDS = [(1, "even", 1), (2, "even", 1), (3, "uneven", 1), (4, "empty", 1), (4, "uneven", 2)]

# What other numbers of ranks show well enough, where many ranks share few cores.
LEFT_OUT = {"instance, keep", "task, keep", "task x instance", "sharded heads"}


class FullyShardSetup(Setup):
    """All modules by themselves, but those with tied weights with the root's."""

    divide_factors = (None, 3.0)

    def __init__(self, rank: int, world_size: int, kind: str, replicas: int) -> None:
        super().__init__(rank, world_size, kind)
        self.mesh = make_mesh(replicas)

    def place(self, model: nn.Module, *, reshard: bool | None = None) -> nn.Module:
        apart = [m for name, m in model.named_children() if name not in ("last", "again")]
        if isinstance(model, Many):  # in one go
            apart = []
        return shard(model, apart, mesh=self.mesh, reshard=reshard)

    def place_tasks(self, model: MultiTask, *, heads: bool) -> nn.Module:
        shard(model.trunk, mesh=self.mesh, reshard=True)
        return shard(model, list(model.heads), mesh=self.mesh) if heads else model

    def sync(self, model: nn.Module, on: bool) -> None:
        assert isinstance(model, FSDPModule)
        model.set_requires_gradient_sync(on)

    def divide_by(self, model: nn.Module, factor: float) -> None:
        for module in model.modules():
            if isinstance(module, FSDPModule) and self.world_size > 1:
                module.set_gradient_divide_factor(factor)


def _all_cases(rank: int, world_size: int, kind: str, replicas: int) -> dict[str, Found]:
    setup = FullyShardSetup(rank, world_size, kind, replicas)
    return run_cases(setup, LEFT_OUT if world_size > 2 and replicas == 1 else ())


@pytest.mark.parametrize(("world_size", "kind", "replicas"), WORLDS)
def test_any_cut_takes_the_step_of_one_process(world_size: int, kind: str, replicas: int) -> None:
    assert kind != "empty" or 0 in split_sizes(SAMPLES, world_size, kind)
    check_cases(run_ranks(_all_cases, world_size, kind, replicas))


def test_the_shards_of_four_ranks_are_uneven_and_some_empty() -> None:
    """What the awkward model is for: a layer of 2 lines and one of 3 on 4 ranks."""
    lines = [len(p) for p in make_tied().parameters()]
    assert {2, 3, 5} <= set(lines)
    assert flatten(list(make_tied().parameters())).dtype == torch.float64


def _gramian_error(model: nn.Module, rank: int, world_size: int, tasks: bool) -> list[float]:
    """The relative errors of a Gramian and of the gradient that follows from it."""
    x, y = (local_part(t, rank, world_size, "uneven") for t in make_data())
    dtype = next(model.parameters()).dtype
    engine = Engine(model, batch_dim=None if tasks else 0)
    name, count = ("task", len(x)) if tasks else ("instance", None)
    losses = LOSSES[name](model(x.to(dtype)), y.to(dtype))
    gramian = engine.compute_gramian(losses, count=count)
    weights = torch.linspace(0.5, 1.0, len(gramian), dtype=dtype)
    engine.backward(losses, weights, count=count)
    gradient = whole_gradients(model)
    alone, (x, y) = make_network(), make_data()
    rows = rows_of(LOSSES[name](alone(x), y), alone)
    expected = weights.double() @ rows
    return [relative_error(gramian, rows @ rows.T), relative_error(gradient, expected)]


def _options(rank: int, world_size: int) -> dict[str, list[float]]:
    mesh = make_mesh()
    narrow = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32
    )
    options: dict[str, tuple[dict[str, Any], torch.dtype]] = {
        "bfloat16": ({"mp_policy": narrow}, torch.float32),
        "smaller mesh": ({"reshard_after_forward": 2}, torch.float64),
        "offloaded": ({"offload_policy": CPUOffloadPolicy(pin_memory=False)}, torch.float64),
    }
    found = {}
    for name, (given, dtype) in options.items():
        for tasks in (False, True):
            model = make_network().to(dtype)
            for module in (*model.children(), model):
                fully_shard(module, mesh=mesh, **given)
            found[f"{name}, {tasks}"] = _gramian_error(model, rank, world_size, tasks)
    return found


def test_options_of_the_wrapper() -> None:
    """bfloat16 has 8 bits: a few roundings of 0.4 % each, averaged over thousands of products."""
    for found in run_ranks(_options, 4):
        for name, errors in found.items():
            bound = 2e-2 if "bfloat16" in name else BOUND
            assert max(errors) <= bound, (name, errors)
            assert "bfloat16" not in name or min(errors) > 1e-5  # it did run narrow


class _TwoLayers(nn.Module):
    """Sharded layers below a parameter of its own, for which the whole module runs once more."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 3)
        self.offset = nn.Parameter(torch.randn(6))
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.last(self.first(x + self.offset).tanh())
        return out


def _parent_parameters(rank: int, world_size: int, size: int) -> list[float]:
    x = torch.randn(size, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    alone = _TwoLayers()
    rows = rows_of(alone(x).square().sum(dim=1), alone)
    model = _TwoLayers()
    shard(model, [model.first, model.last], mesh=make_mesh(), reshard=True)
    engine = Engine(model, batch_dim=0)
    losses = model(x).square().sum(dim=1)[: size if rank == 1 else 0]
    gramian = engine.compute_gramian(losses)
    weights = torch.linspace(0.5, 1.0, size, dtype=torch.float64)
    losses.backward(engine.local_weights(weights))
    gradient = whole_gradients(model)
    return [relative_error(gramian, rows @ rows.T), relative_error(gradient, weights @ rows)]


def test_a_forward_is_repeated_on_some_ranks_alone() -> None:
    """It must not gather parameters: a rank without samples repeats nothing."""
    for errors in run_ranks(_parent_parameters, 3, 4):
        assert max(errors) <= BOUND
