"""What cannot be done on tensor-parallel layers, or goes wrong there, ends the same on every rank.

All of it runs in one set of processes for each strategy, and an ordinary step comes after each
failure: so none leaves a pending collective or a touched ``.grad``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from jddist import attach
from jddist.aggregation import Mean, RandomWeighting, UPGrad, UPGradWeighting
from jddist.autogram import Engine
from jddist.autojac import backward, jac_to_grad, mtl_backward
from jddist.distribution import Local
from tests._oracle import relative_error
from tests._ranks import run_ranks
from tests.distributed._conformance import Setup
from tests.distributed._sharded import rows_of, whole_gradients
from tests.distributed._tensor_parallel import (
    TensorParallelSetup,
    TwoDimensionalSetup,
    columns,
    plan_of,
)
from tests.distributed._training import LOSSES, make_data, make_network

BOUND = 1e-10
NO_RANK = "nothing was raised"


def _message(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return NO_RANK


def _ordinary_step(engine: Engine, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    model.zero_grad()
    engine.backward(LOSSES["instance"](model(x), y), UPGradWeighting())
    gradient = whole_gradients(model)
    model.zero_grad()
    return gradient


def _setup(rank: int, world_size: int) -> Setup:
    if world_size == 2:
        return TensorParallelSetup(rank, world_size)
    return TwoDimensionalSetup(rank, world_size, "even", 2)


def _failures(rank: int, world_size: int) -> dict[str, Any]:
    setup, culprit = _setup(rank, world_size), rank == 1
    model = setup.place(make_network())
    attach(model, objectives=Shard(0))
    engine, tasks = Engine(model, batch_dim=0), Engine(model, batch_dim=None)
    skipping = Engine(model, batch_dim=0, nonfinite="skip")
    x, y = (setup.part(t[:8]) for t in make_data())

    def losses(shift: float = 0.0) -> Tensor:
        return LOSSES["instance"](model(x), y + shift)

    def means(shift: float = 0.0) -> Tensor:
        return LOSSES["task"](model(x), y + shift)

    def bad(values: Tensor) -> Tensor:
        return values * float("nan") if culprit else values

    def shorter(values: Tensor) -> Tensor:
        return values[:-1] if culprit else values

    def mtl(change: Callable[[Tensor], Tensor] = lambda v: v, shift: float = 0.0) -> None:
        features = model(x)
        found = change(LOSSES["task"](features, y + shift))
        mtl_backward(list(found), features=features)

    def other_call() -> None:
        # Forward passes communicate too: those have to be the same.
        found, features = losses(), model(x)
        if culprit:
            mtl_backward(list(LOSSES["task"](features, y)), features=features)
        else:
            engine.compute_gramian(found)

    def partial_sum(call: Callable[[Tensor], Any]) -> None:
        mesh = next(p for p in model.parameters() if isinstance(p, DTensor)).device_mesh
        call(DTensor.from_local(losses(), mesh, [Shard(0)] * mesh.ndim, run_check=False))

    def foreign_rows() -> None:
        for p in model.parameters():
            p.jac = torch.ones(2, *p.shape, dtype=p.dtype)
        try:
            jac_to_grad(list(model.parameters()), Mean())
        finally:
            for p in model.parameters():
                del p.jac

    def raising(_: Tensor) -> Tensor:
        raise RuntimeError("a weighting of the user's own")

    def joined() -> None:
        with engine.accumulate():
            engine.backward(losses().detach() if culprit else losses(), UPGradWeighting())

    def skipped() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert not skipping.backward(bad(losses()), UPGradWeighting()).any()

    calls: dict[str, Callable[[], Any]] = {
        "nan": lambda: engine.backward(bad(losses()), UPGradWeighting()),
        "nan, tasks": lambda: tasks.backward(bad(means()), UPGradWeighting()),
        "nan, mtl": lambda: mtl(bad),
        "skipped": skipped,
        "other batch": lambda: Engine(model, batch_dim=0).compute_gramian(losses(0.1 * rank)),
        "other batch, tasks": lambda: Engine(model, batch_dim=None).compute_gramian(
            means(0.1 * rank)
        ),
        "other batch, mtl": lambda: mtl(shift=0.1 * rank),
        "other batch, rows": lambda: backward(losses(0.1 * rank)),
        "fewer objectives": lambda: engine.compute_gramian(shorter(losses())),
        "fewer tasks, mtl": lambda: mtl(shorter),
        "no graph": lambda: engine.compute_gramian(losses().detach() if culprit else losses()),
        "no graph, rows": lambda: backward(
            losses(), inputs=[torch.ones(2, requires_grad=True)] if culprit else None
        ),
        "other call": other_call,
        # After a pass that was called off, and without a pass of its own.
        "no graph, weights": lambda: engine.backward(
            losses().detach() if culprit else losses(), torch.ones(8, dtype=x.dtype)
        ),
        "weighting": lambda: engine.backward(losses(), raising),
        "sharded objectives": lambda: partial_sum(engine.compute_gramian),
        "sharded objectives, rows": lambda: partial_sum(lambda v: backward(v)),
        "foreign rows": foreign_rows,
        "local": lambda: Engine(model, batch_dim=0, distribution=Local()),
    }
    if world_size == 2:
        calls["no graph, joined"] = joined
    found: dict[str, Any] = {}
    for name, call in calls.items():
        message = _message(call)
        assert all(p.grad is None for p in model.parameters()), name
        found[name] = [message, _ordinary_step(engine, model, x, y)]
    return found


EXPECTED = {
    "nan": "NonFiniteObjectiveError: Found NaN or infinity in objective",
    "nan, tasks": "NonFiniteObjectiveError: Found NaN or infinity in objective 0 (rank 0)",
    "nan, mtl": "NonFiniteObjectiveError: Found NaN or infinity in the loss or the gradient of",
    "skipped": NO_RANK,
    "other batch": "values that differ between the 2 ranks of a tensor-parallel group: the obj",
    "other batch, tasks": "values that differ between the 2 ranks of a tensor-parallel group",
    "other batch, mtl": "values that differ between the 2 ranks of a tensor-parallel group",
    "other batch, rows": "values that differ between the 2 ranks of a tensor-parallel group",
    "fewer objectives": "LayoutMismatchError: Found ranks of one tensor-parallel group with diff",
    "fewer tasks, mtl": "LayoutMismatchError: Found ranks that disagree in mtl_backward on",
    "no graph": "RankError: a pass over tensor-parallel layers failed before the ranks exchanged "
    "anything: rank 1 raised ValueError: Found an output that does not require a gradient",
    "no graph, rows": "RankError: backward failed before the ranks exchanged anything: rank 1",
    "other call": "different calls",
    "no graph, weights": "RankError: Engine.backward failed before the ranks exchanged anything",
    "weighting": "RankError: The weighting failed on rank 0: RuntimeError: a weighting of the",
    "sharded objectives": "ValueError: Found objectives in a DTensor placed as (Shard(dim=0),",
    "sharded objectives, rows": "ValueError: Found objectives in a DTensor placed as (Shard(dim=",
    "foreign rows": "ValueError: Found a .jac of a sharded parameter",
    "local": "ValueError: Found distribution=Local() and a parameter that is a DTensor",
    "no graph, joined": "rank 1 raised ValueError: Found an output that does not require",
}


@pytest.mark.parametrize("world_size", [2, 4])
def test_failures_are_the_same_on_every_rank_and_leave_nothing_behind(world_size: int) -> None:
    ranks = run_ranks(_failures, world_size, timeout=40.0)
    model, (x, y) = make_network(), make_data()
    gradient = UPGrad()(rows_of(LOSSES["instance"](model(x[:8]), y[:8]), model))
    for found in ranks:
        for name, (message, after) in found.items():
            assert EXPECTED[name] in message, (name, message)
            assert message == ranks[0][name][0], name
            assert relative_error(after, gradient) <= BOUND, name


def _refusals(rank: int, world_size: int) -> dict[str, str]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    cube = init_device_mesh("cpu", (1, 2, 2), mesh_dim_names=("replicate", "dp", "tp"))
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")

    def on(part: DeviceMesh, names: tuple[str, ...] = ("first", "last")) -> nn.Module:
        model = make_network()
        return parallelize_module(model, part, {name: columns() for name in names})

    def in_ddp() -> DistributedDataParallel:
        return DistributedDataParallel(on(mesh["tp"]), device_mesh=mesh["dp"])

    def after_forward() -> DistributedDataParallel:
        ddp = in_ddp()
        ddp(make_data()[0])
        return ddp

    def two_meshes() -> nn.Module:
        model = on(mesh["tp"], ("first",))
        return parallelize_module(model, mesh["dp"], {"last": columns()})

    def hybrid() -> nn.Module:
        return fully_shard(on(cube["tp"]), mesh=cube["replicate", "dp"])

    def partly() -> nn.Module:
        model = on(mesh["tp"])
        fully_shard(model.first, mesh=mesh["dp"])
        return model

    def unequal() -> None:
        whole = init_device_mesh("cpu", (world_size,))
        torch.manual_seed(0)
        # One number for all features, of which each rank has some: nobody adds its gradients up.
        model = nn.Sequential(nn.Linear(5, 4), nn.PReLU(), nn.Linear(4, 3)).double()
        parallelize_module(model, whole, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        Engine(model, batch_dim=0).compute_gramian(model(make_data()[0]).pow(2).sum(dim=1))

    calls: dict[str, Callable[[], Any]] = {
        "a part of the ranks": lambda: attach(on(mesh["tp"])),
        "two meshes": lambda: attach(two_meshes()),
        "three dimensions": lambda: attach(hybrid()),
        "not in fully_shard": lambda: attach(partly()),
        "DDP": lambda: attach(in_ddp()),
        "DDP after a forward": lambda: attach(after_forward()),
        "unequal gradients": unequal,
    }
    return {name: _message(call) for name, call in calls.items()}


REFUSED = {
    "a part of the ranks": "Found tensor parallelism over 2 of 4 ranks, and no wrapper",
    "two meshes": "Found parameters on 2 meshes",
    "three dimensions": "Found the parameter 'first.weight' placed as (Replicate(), ",
    "not in fully_shard": "Found parameters sharded over several meshes",
    "DDP": "Found DistributedDataParallel around layers of parallelize_module",
    "DDP after a forward": "Found DistributedDataParallel around layers of parallelize_module",
    "unequal gradients": "differ between the 4 ranks of a tensor-parallel group: the gradient of "
    "1.weight",
}


def test_what_is_not_supported_is_refused_on_every_rank() -> None:
    ranks = run_ranks(_refusals, 4, timeout=40.0)
    for found in ranks:
        assert found == ranks[0]
        assert found.keys() == REFUSED.keys()
        for name, part in REFUSED.items():
            assert part in found[name], (name, found[name])
            assert found[name].startswith(("UnsupportedModelError", "LayoutMismatchError")), name


def _seeded_apart(rank: int, world_size: int) -> list[Tensor]:
    """Ranks that draw other random numbers, as data-parallel ranks do."""
    setup = _setup(rank, world_size)
    model = setup.place(make_network())
    engine = Engine(model, batch_dim=0)
    x, y = (setup.part(t) for t in make_data())
    torch.manual_seed(rank)
    weights = engine.backward(LOSSES["instance"](model(x), y), RandomWeighting())
    return [weights, whole_gradients(model)]


@pytest.mark.parametrize("world_size", [2, 4])
def test_weights_are_those_of_one_rank(world_size: int) -> None:
    model, (x, y) = make_network(), make_data()
    rows = rows_of(LOSSES["instance"](model(x), y), model)
    ranks = run_ranks(_seeded_apart, world_size)
    for weights, gradient in ranks:
        assert torch.equal(weights, ranks[0][0]) and torch.equal(gradient, ranks[0][1])
        assert relative_error(gradient, weights @ rows) <= BOUND


def test_every_plan_covers_all_parameters() -> None:
    """Else torch could not clip the gradients together."""
    model = make_network()
    owners = {name for name, m in model.named_modules() if list(m.parameters(recurse=False))}
    assert owners == plan_of(model, 2).keys()
