"""``engine.accumulate`` in ``fully_shard``: the step of the whole batch, however it is cut up."""

from __future__ import annotations

import time
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import Partial, Placement

from jddist.aggregation import UPGradWeighting
from jddist.autogram import Engine
from jddist.errors import JddistError, UnsupportedModelError
from tests._oracle import relative_error
from tests._ranks import run_ranks
from tests.distributed._sharded import (
    assign,
    make_mesh,
    rows_of,
    shard,
    whole_modules,
    whole_parameters,
)
from tests.distributed._training import LOSSES, local_part, make_data, make_network
from tests.distributed._wrapper_spy import spying_on_wrapper

BOUND = 1e-10
STEPS, BATCHES = 3, 3
# Objectives, where they live, and whether everything is sharded.
CASES: dict[str, tuple[str, int | None, Placement | None, bool]] = {
    "samples": ("instance", 0, None, True),
    "tasks": ("task", None, None, True),
    "tasks, sum": ("task sum", None, Partial("sum"), True),
    "samples, partly": ("instance", 0, None, False),
    "tasks, partly": ("task", None, None, False),
}


def _model(entirely: bool) -> nn.Module:
    model = make_network()
    apart = [model.first, model.norm, model.twice] if entirely else [model.first, model.twice]
    return shard(model, apart, mesh=make_mesh(), root=entirely, reshard=True)


def _train(rank: int, world_size: int, kind: str, case: str) -> list[Tensor]:
    objective, batch_dim, placement, entirely = CASES[case]
    model = _model(entirely)
    engine = Engine(model, batch_dim=batch_dim, objectives=placement)
    weighting = UPGradWeighting()
    x, y = (local_part(t, rank, world_size, kind) for t in make_data())
    for _ in range(STEPS):
        with engine.accumulate() as accumulation:
            # As many on every rank, of other sizes, and some without samples.
            for bx, by in zip(x.tensor_split(BATCHES), y.tensor_split(BATCHES), strict=True):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # the mean of an empty batch
                    losses = LOSSES[objective](model(bx), by)
                count = len(bx) if objective == "task" else None
                assert not engine.backward(losses, weighting, count=count).numel()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.05 * p.grad
                p.grad = None
    assert accumulation.weights is not None
    return [accumulation.weights, whole_parameters(model)]


def _reference(case: str) -> list[Tensor]:
    model, (x, y) = make_network(), make_data()
    for _ in range(STEPS):
        rows = rows_of(LOSSES[CASES[case][0]](model(x), y), model)
        weights = UPGradWeighting()(rows @ rows.T)
        assign(model, weights @ rows)
        with torch.no_grad():
            for p in model.parameters():
                assert p.grad is not None
                p -= 0.05 * p.grad
    return [weights, whole_parameters(model)]


def _message(call: Any) -> str:
    try:
        call()
    except JddistError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _failures(rank: int, world_size: int) -> dict[str, str]:
    """What ends the same on all ranks, each followed by a step that works."""
    model = _model(True)
    x, y = (local_part(t, rank, world_size, "uneven") for t in make_data())
    samples, tasks = Engine(model, batch_dim=0), Engine(model, batch_dim=None)
    weighting = UPGradWeighting()

    def nothing_to_differentiate(engine: Engine, name: str) -> None:
        with engine.accumulate():
            for i in range(2):
                losses = LOSSES[name](model(x), y)
                losses = losses.detach() if rank and i else losses
                engine.backward(losses, weighting, count=len(x) if engine is tasks else None)

    def not_finite() -> None:
        with tasks.accumulate():
            for i in range(2):
                losses = LOSSES["task"](model(x), y)
                # Finite itself, with a gradient that is not.
                losses = losses + (losses - losses).sqrt() if rank and i else losses
                tasks.backward(losses, weighting, count=len(x))

    def hooked() -> None:
        handle = model.twice.register_full_backward_hook(lambda *_: None)
        try:
            with tasks.accumulate():
                tasks.backward(LOSSES["task"](model(x), y), weighting, count=len(x))
        finally:
            handle.remove()

    found = {
        "samples": _message(lambda: nothing_to_differentiate(samples, "instance")),
        "tasks": _message(lambda: nothing_to_differentiate(tasks, "task")),
        "not finite": _message(not_finite),
        "hooked": _message(hooked),
    }
    assert all(p.grad is None for p in model.parameters())
    with tasks.accumulate(), spying_on_wrapper() as log:
        tasks.backward(LOSSES["task"](model(x), y), weighting, count=len(x))
    assert sum(name == "reduce_scatter" for name, _ in log) == 4 * 4  # tasks x modules
    assert all(p.grad is not None for p in model.parameters()) and whole_modules(model) == 0
    return found


def _all(rank: int, world_size: int, kind: str) -> dict[str, Any]:
    found: dict[str, Any] = {case: _train(rank, world_size, kind, case) for case in CASES}
    if kind == "uneven":
        found["failures"] = _failures(rank, world_size)
    return found


EXPECTED = {
    "samples": "RankError: a batch of Engine.accumulate failed before",
    "tasks": "RankError: a batch of Engine.accumulate failed before",
    "not finite": "NonFiniteObjectiveError: Found NaN or infinity in objective 0 (rank 1)",
    "hooked": f"{UnsupportedModelError.__name__}: Found a graph that leads to tensors outside",
}


@pytest.mark.parametrize(("world_size", "kind"), [(2, "uneven"), (3, "empty")])
def test_equals_one_process(world_size: int, kind: str) -> None:
    ranks = run_ranks(_all, world_size, kind)
    for case in CASES:
        for i, want in enumerate(_reference(case)):
            for found in ranks:
                assert relative_error(found[case][i], want) <= BOUND, (case, i)
                assert torch.equal(found[case][i], ranks[0][case][i]), (case, i)
    for found in ranks:
        for name, message in found.get("failures", {}).items():
            assert message.startswith(EXPECTED[name]), (name, message)


def _own_failures(rank: int, world_size: int) -> dict[str, Any]:
    """What a user's own code raises within the context, on the last rank alone, or on all."""
    culprit = rank == world_size - 1
    model = _model(True)
    x, y = (local_part(t, rank, world_size, "uneven") for t in make_data())
    engines = {"instance": Engine(model, batch_dim=0), "task": Engine(model, batch_dim=None)}
    weighting = UPGradWeighting()

    def step(name: str, fails: str, who: bool) -> None:
        def fail(where: str, batch: int) -> None:
            if who and fails == f"{where} {batch}":
                raise ValueError(f"of the user's own, {where} {batch}")

        engine = engines[name]
        with engine.accumulate():
            for batch in range(2):
                fail("before", batch)
                losses = LOSSES[name](model(x), y)
                fail("after", batch)
                count = len(x) if name == "task" else None
                engine.backward(losses, weighting, count=count)
            fail("last", 2)

    found: dict[str, Any] = {"messages": {}, "seconds": 0.0}
    for name in engines:
        for fails in ("before 0", "after 0", "before 1", "last 2"):
            for how in ("one", "all") if fails == "after 0" else ("one",):
                who = culprit or how == "all"
                start = time.monotonic()
                try:
                    step(name, fails, who)
                    message = ""
                except Exception as error:
                    message = f"{type(error).__name__}: {error}"
                seconds = time.monotonic() - start
                found["seconds"] = max(found["seconds"], seconds)
                found["messages"][f"{name}, {fails}, {how}"] = message
                assert all(p.grad is None for p in model.parameters())
                # Nothing is left behind.
                step(name, "", False)
                assert all(p.grad is not None for p in model.parameters())
                model.zero_grad()
                assert whole_modules(model) == 0
    return found


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_failure_of_the_users_own_is_heard_of_at_once(world_size: int) -> None:
    ranks = run_ranks(_own_failures, world_size)
    culprit = world_size - 1
    for rank, found in enumerate(ranks):
        assert found["seconds"] < 30.0  # the group's timeout is 60
        assert len(found["messages"]) == 10
        for case, message in found["messages"].items():
            where = case.split(", ")[1]
            own = f"ValueError: of the user's own, {where}"
            if rank == culprit or case.endswith("all"):
                assert message == own, case
            else:
                assert message.startswith("RankError: "), (case, message)
                assert f"rank {culprit} raised {own}" in message, (case, message)


def _fails_in_a_forward(rank: int, world_size: int, seconds: float) -> str:
    """The last rank raises in the middle of a forward, where others wait in the wrapper's own
    messages, and lives on."""
    culprit = rank == world_size - 1
    model = _model(True)
    engine, weighting = Engine(model, batch_dim=0), UPGradWeighting()
    x, y = (local_part(t, rank, world_size, "uneven") for t in make_data())

    def hook(*_: object) -> None:
        raise ValueError("a layer of the user's own")

    handle = model.norm.register_forward_hook(hook) if culprit else None
    try:
        with engine.accumulate():
            engine.backward(LOSSES["instance"](model(x), y), weighting)
    except Exception as error:
        if handle is not None:
            time.sleep(2.0 * seconds)
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_failure_within_a_forward_is_named_by_those_who_wait(world_size: int) -> None:
    seconds = 6.0  # the group's timeout
    ranks = run_ranks(_fails_in_a_forward, world_size, seconds, timeout=seconds, margin=30.0)
    culprit = world_size - 1
    assert ranks[culprit] == "ValueError: a layer of the user's own"
    for message in ranks[:culprit]:
        assert message.startswith(
            f"StalledRankError: Found rank {culprit} after ValueError: a layer of the user's own "
            "(raised in a forward within Engine.accumulate) in step 0, forward"
        ), message
