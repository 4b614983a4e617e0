"""World-size invariance on models in ``fully_shard``: any cut takes the step of one process.

The bound 1e-10 is the project's: rounding in float64 stays near 1e-15 a step, and five steps of an
optimizer multiply it by far less than the rest. Starting processes is what takes time here, so all
the cases of a number of ranks share one start.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Partial, Shard

from jddist import attach, verify
from jddist.aggregation import UPGrad, UPGradWeighting
from jddist.autogram import Engine
from jddist.autojac import backward, jac, jac_to_grad, jac_to_grad_groups, mtl_backward
from jddist.grouping import per_layer
from tests._oracle import gramian as oracle_gramian
from tests._oracle import relative_error
from tests._ranks import run_ranks, split_sizes
from tests.distributed._methods import METHODS
from tests.distributed._sharded import (
    assign,
    make_mesh,
    make_tied,
    rows_of,
    shard,
    whole,
    whole_gradients,
    whole_parameters,
)
from tests.distributed._training import (
    LOSSES,
    OPTIMIZERS,
    SAMPLES,
    STEPS,
    TASKS,
    flatten,
    local_part,
    make_data,
    make_network,
    upgrad_for,
)
from tests.distributed.test_task_invariance import _labelled as labelled_of
from tests.distributed.test_task_invariance import _losses as task_losses
from tests.distributed.test_task_invariance import _model as make_multi_task

BOUND = 1e-10
MAX_NORM = 0.5

# Ranks, how the batch is split, and how many replicas of the model there are.
WORLDS = [(1, "even", 1), (2, "even", 1), (3, "uneven", 1), (4, "empty", 1), (4, "uneven", 2)]

Found = dict[str, list[Tensor]]

# Which objectives, model, optimizer and reshard_after_forward go together.
ENGINE_CASES = {
    "instance, reshard": ("instance", make_network, "adamw", True),
    "instance, keep": ("instance", make_network, "sgd", False),
    "instance, awkward": ("instance", make_tied, "sgd", None),
    "instance x task": ("instance x task", make_tied, "adamw", None),
    "task x instance": ("task x instance", make_network, "sgd", True),
    "task, reshard": ("task", make_tied, "adamw", True),
    "task, keep": ("task", make_network, "sgd", False),
    "task sum": ("task sum", make_tied, "sgd", None),
}

# What other numbers of ranks show well enough, where many ranks share few cores.
LEFT_OUT = {"instance, keep", "task, keep", "task x instance", "sharded heads"}


def _batch_dim(objective: str) -> int | None:
    return {"instance": 0, "instance x task": 0, "task x instance": 1}.get(objective)


def _children(model: nn.Module) -> list[nn.Module]:
    """What is sharded by itself: tied weights have to stay together, with the root's."""
    return [m for name, m in model.named_children() if name not in ("last", "again")]


def _train_engine(rank: int, world_size: int, kind: str, mesh: DeviceMesh, case: str) -> Found:
    objective, make, optimizer, reshard = ENGINE_CASES[case]
    model = make()
    shard(model, _children(model), mesh=mesh, reshard=reshard)
    x, y = (local_part(t, rank, world_size, kind) for t in make_data())
    placement = Partial("sum") if objective == "task sum" else None
    engine = Engine(model, batch_dim=_batch_dim(objective), objectives=placement)
    count = len(x) if objective == "task" else None
    opt = OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad])
    found: Found = {"gramians": [], "weights": [], "parameters": []}
    for step in range(STEPS):
        losses = LOSSES[objective](model(x), y)
        opt.zero_grad()
        if step % 2 == 0:
            weights = engine.backward(losses, upgrad_for(losses), count=count)
        else:
            gramian = engine.compute_gramian(losses, count=count)
            found["gramians"].append(gramian)
            weights = engine.compute_weights(gramian, upgrad_for(losses))
            losses.backward(engine.local_weights(weights))
        whole_gradients(model)  # checks where they lie
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        opt.step()
        found["weights"].append(weights)
        found["parameters"].append(whole_parameters(model))
    return found


def _engine_reference(case: str) -> Found:
    objective, make, optimizer, _ = ENGINE_CASES[case]
    model, (x, y) = make(), make_data()
    opt = OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad])
    expected: Found = {"gramians": [], "weights": [], "parameters": []}
    for step in range(STEPS):
        losses = LOSSES[objective](model(x), y)
        if step % 2:
            expected["gramians"].append(oracle_gramian(losses, model.parameters()))
        rows = rows_of(losses, model)
        weights = UPGradWeighting()(rows @ rows.T)
        assign(model, weights @ rows)
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        opt.step()
        expected["weights"].append(weights.view(losses.shape))
        expected["parameters"].append(whole_parameters(model))
    return expected


def _accumulate(rank: int, world_size: int, kind: str, mesh: DeviceMesh) -> Found:
    """Micro-steps without gradient sync, and a divisor of the user's own."""
    found: Found = {"gradient": []}
    for factor in (None, 3.0):
        model = make_network()
        assert isinstance(shard(model, mesh=mesh), FSDPModule)
        if factor is not None and world_size > 1:
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.set_gradient_divide_factor(factor)
        engine = Engine(model, batch_dim=0, nonfinite="skip")
        x, y = make_data()
        for start, sync in ((0, False), (4, True)):
            model.set_requires_gradient_sync(sync)
            parts = (local_part(t[start:], rank, world_size, kind) for t in (x, y))
            bx, by = parts
            engine.backward(LOSSES["instance"](model(bx), by), UPGradWeighting())
        found["gradient"].append(whole_gradients(model))
    return found


def _accumulate_reference() -> Found:
    model, (x, y) = make_network(), make_data()
    total = torch.zeros(())
    for start in (0, 4):
        rows = rows_of(LOSSES["instance"](model(x[start:]), y[start:]), model)
        total = total + UPGradWeighting()(rows @ rows.T) @ rows
    return {"gradient": [total, total]}


def _multi_task(how: str, mesh: DeviceMesh) -> nn.Module:
    model = make_multi_task()
    shard(model.trunk, mesh=mesh, reshard=True)
    if how == "sharded heads":
        shard(model, list(model.heads), mesh=mesh)
    return model


def _train_tasks(rank: int, world_size: int, kind: str, mesh: DeviceMesh, how: str) -> Found:
    """``mtl_backward`` with heads that are sharded, or are not and are reduced all the same."""
    model = _multi_task(how, mesh)
    attach(model)
    x, y = make_data()
    labelled = local_part(labelled_of(y), rank, world_size, kind)
    x, y = (local_part(t, rank, world_size, kind) for t in (x, y))
    trunk, heads = list(model.trunk.parameters()), list(model.heads.parameters())
    opts = [OPTIMIZERS["adamw"](trunk), OPTIMIZERS["adamw"](heads)]
    found: Found = {"weights": [], "parameters": []}
    for _ in range(STEPS):
        features, outputs = model(x)
        counts = labelled.sum(dim=0).tolist()
        losses = task_losses(outputs, y, labelled)
        # Without samples neither the loss nor its gradient need be numbers.
        losses = [
            loss if n else loss * float("nan") for loss, n in zip(losses, counts, strict=True)
        ]
        mtl_backward(losses, features=features, count=counts)
        for p in trunk:
            assert isinstance(p.jac, DTensor) and p.jac.shape == (TASKS, *p.shape)
        found["weights"].append(jac_to_grad(model.trunk.parameters(), UPGrad()))
        for opt in opts:
            opt.step()
            opt.zero_grad()
        found["parameters"].append(whole_parameters(model))
    return found


def _tasks_reference() -> Found:
    model, (x, y) = make_multi_task(), make_data()
    opt = OPTIMIZERS["adamw"](list(model.parameters()))
    expected: Found = {"weights": [], "parameters": []}
    for _ in range(STEPS):
        losses = torch.stack(task_losses(model(x)[1], y, labelled_of(y)))
        rows = rows_of(losses, model.trunk)
        own = rows_of(losses.sum().unsqueeze(0), model.heads)[0]
        weights = UPGrad().gramian_weighting(rows @ rows.T)
        assign(model.trunk, weights @ rows)
        assign(model.heads, own)
        opt.step()
        expected["weights"].append(weights)
        expected["parameters"].append(whole_parameters(model))
    return expected


# These need the losses, and are tested with the others on shards.
AGGREGATORS = {
    name: method.make for name, method in METHODS.items() if name not in ("DBMTL", "GradNorm")
}


def _rows(rank: int, world_size: int, kind: str, mesh: DeviceMesh) -> Found:
    """Rows with either placement, every aggregator on them, and groups."""
    model = make_tied()
    shard(model, _children(model), mesh=mesh, reshard=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    x, y = (local_part(t, rank, world_size, kind) for t in make_data())
    found: Found = {}
    distribution = attach(model, objectives=Partial("sum"))
    losses = list(LOSSES["task sum"](model(x), y))
    found["jac, tasks"] = [whole(j) for j in jac(losses, trained, retain_graph=True)]
    backward(losses, retain_graph=True)
    found[".jac, tasks"] = [whole(p.jac) for p in trained]
    for name, make in AGGREGATORS.items():
        torch.manual_seed(5)
        jac_to_grad(trained, make(), retain_jac=True)
        found[name] = [whole_gradients(model)]
        model.zero_grad()
    groups = per_layer(model)
    weights = jac_to_grad_groups(groups, [UPGrad() for _ in groups])
    found["groups"] = [whole_gradients(model), *weights]
    model.zero_grad()
    distribution.detach()
    attach(model, objectives=Shard(0))
    backward(LOSSES["instance"](model(x), y), UPGrad())
    found["instances"] = [whole_gradients(model)]
    model.zero_grad()
    errors = verify(model, lambda: LOSSES["instance"](model(x), y), batch_dim=0)
    found["verify"] = [torch.tensor(list(errors.values()))]
    return found


def _rows_reference() -> Found:
    model, (x, y) = make_tied(), make_data()
    trained = [p for p in model.parameters() if p.requires_grad]
    rows = rows_of(LOSSES["task sum"](model(x), y), model)
    parts = rows.split([p.numel() for p in trained], dim=1)
    shaped = [part.view(TASKS, *p.shape) for p, part in zip(trained, parts, strict=True)]
    expected: Found = {"jac, tasks": shaped, ".jac, tasks": shaped}
    for name, make in AGGREGATORS.items():
        torch.manual_seed(5)
        expected[name] = [make()(rows)]
    groups = per_layer(model)
    columns = dict(zip(trained, parts, strict=True))
    matrices = [torch.cat([columns[p] for p in group], dim=1) for group in groups]
    weights = [UPGrad().gramian_weighting(g @ g.T) for g in matrices]
    vectors = [w @ g for w, g in zip(weights, matrices, strict=True)]
    expected["groups"] = [torch.cat(vectors), *weights]
    instances = rows_of(LOSSES["instance"](model(x), y), model)
    expected["instances"] = [UPGrad()(instances)]
    return expected


def _all_cases(rank: int, world_size: int, kind: str, replicas: int) -> dict[str, Found]:
    where = (rank, world_size, kind, make_mesh(replicas))
    cases: dict[str, Callable[[], Found]] = {
        **{case: partial(_train_engine, *where, case) for case in ENGINE_CASES},
        "accumulation": partial(_accumulate, *where),
        "sharded heads": partial(_train_tasks, *where, "sharded heads"),
        "plain heads": partial(_train_tasks, *where, "plain heads"),
        "rows": partial(_rows, *where),
    }
    kept = cases.keys() - (LEFT_OUT if world_size > 2 and replicas == 1 else set())
    return {name: case() for name, case in cases.items() if name in kept}


REFERENCES: dict[str, Callable[[], Found]] = {
    **{case: partial(_engine_reference, case) for case in ENGINE_CASES},
    "accumulation": _accumulate_reference,
    "sharded heads": _tasks_reference,
    "plain heads": _tasks_reference,
    "rows": _rows_reference,
}


@pytest.mark.parametrize(("world_size", "kind", "replicas"), WORLDS)
def test_any_cut_takes_the_step_of_one_process(world_size: int, kind: str, replicas: int) -> None:
    assert kind != "empty" or 0 in split_sizes(SAMPLES, world_size, kind)
    ranks = run_ranks(_all_cases, world_size, kind, replicas)
    for case in ranks[0]:
        expected = REFERENCES[case]()
        for found in (rank[case] for rank in ranks):
            for name, values in expected.items():
                for i, (got, want) in enumerate(zip(found[name], values, strict=True)):
                    assert relative_error(got, want) <= BOUND, (case, name, i)
                    # Bit-identical, not merely close.
                    assert torch.equal(got, ranks[0][case][name][i]), (case, name, i)
    assert float(ranks[0]["rows"]["verify"][0].max()) <= BOUND


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
