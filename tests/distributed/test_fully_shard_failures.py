"""What cannot be done on sharded parameters, or goes wrong there, ends the same on every rank.

All of it runs in one set of processes, and an ordinary step comes after each failure: so none
leaves a pending collective, a touched ``.grad`` or parameters that stay gathered.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Partial

from jddist import attach
from jddist.aggregation import Mean, UPGrad, UPGradWeighting
from jddist.autogram import Engine
from jddist.autojac import backward, jac_to_grad, mtl_backward
from tests._oracle import relative_error
from tests._ranks import run_ranks
from tests.distributed._sharded import (
    make_mesh,
    rows_of,
    shard,
    whole,
    whole_gradients,
    whole_modules,
)
from tests.distributed._training import LOSSES, local_part, make_data, make_network, wrap

BOUND = 1e-10
NO_RANK = "nothing was raised"


def _message(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return NO_RANK


class _Raises(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise RuntimeError("a backward of the user's own")


def _ordinary_step(engine: Engine, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    model.zero_grad()
    engine.backward(LOSSES["instance"](model(x), y), UPGradWeighting())
    gradient = whole_gradients(model)
    model.zero_grad()
    return gradient


def _failures(rank: int, world_size: int) -> dict[str, Any]:
    culprit = rank == 1
    model = make_network()
    shard(model, mesh=make_mesh(), reshard=True)
    attach(model, objectives=Partial("avg"))
    engine = Engine(model, batch_dim=0)
    tasks = Engine(model, batch_dim=None)
    skipping = Engine(model, batch_dim=0, nonfinite="skip")
    x, y = (local_part(t[:8], rank, world_size, "even") for t in make_data())
    hooked = next(model.parameters())

    def losses() -> Tensor:
        return LOSSES["instance"](model(x), y)

    def means() -> Tensor:
        return LOSSES["task"](model(x), y)

    def bad(values: Tensor) -> Tensor:
        return values * float("nan") if culprit else values

    def shorter(values: Tensor) -> Tensor:
        return values[:-1] if culprit else values

    def other_graph() -> None:
        values, head = means(), model.last(torch.ones(1, 6, dtype=torch.float64))
        tasks.compute_gramian(head.flatten() if culprit else values)

    def with_hook() -> None:
        handle = hooked.register_post_accumulate_grad_hook(lambda _: None)
        try:
            tasks.compute_gramian(means())
        finally:
            handle.remove()

    def without_sync(call: Callable[[], Any]) -> None:
        model.set_requires_gradient_sync(False)
        try:
            call()
        finally:
            model.set_requires_gradient_sync(True)

    def failing_pass(here: bool) -> None:
        # In the middle of the model: its end has then announced what is due after the pass.
        features = model.norm(model.first(x))
        output = model.last(_Raises.apply(features) if here else features)
        engine.compute_gramian(LOSSES["instance"](output, y))

    def failing_row(reshard: Literal["memory", "speed"]) -> None:
        features = model.norm(model.first(x))
        output = model.last(_Raises.apply(features))
        tasks.distribution.reshard = reshard
        try:
            tasks.compute_gramian(LOSSES["task"](output, y))
        finally:
            tasks.distribution.reshard = "memory"
            assert whole_modules(model) == 0
            # A pass that was not ended keeps later backwards from reducing some gradients.
            losses().sum().backward()
            assert all(p.grad is not None for p in model.parameters())
            model.zero_grad()

    def other_reshard(call: Callable[[], Any]) -> None:
        tasks.distribution.reshard = "speed" if culprit else "memory"
        try:
            call()
        finally:
            tasks.distribution.reshard = "memory"

    def factors() -> None:
        model.last.set_gradient_divide_factor(5.0)
        try:
            engine.backward(losses(), UPGradWeighting())
        finally:
            model.last.set_gradient_divide_factor(None)

    def on_shards(aggregator: Any, rows: bool = True) -> None:
        if rows:
            backward(list(means()))
        try:
            jac_to_grad(list(model.parameters()), aggregator)
        finally:
            for p in model.parameters():
                if hasattr(p, "jac"):
                    del p.jac

    def foreign_rows() -> None:
        for p in model.parameters():
            p.jac = torch.ones(2, *p.shape, dtype=p.dtype)
        on_shards(Mean(), rows=False)

    def skipped() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert not skipping.backward(bad(losses()), UPGradWeighting()).any()
        assert all(p.grad is None for p in model.parameters())

    calls: dict[str, Callable[[], Any]] = {
        "nan": lambda: engine.backward(bad(losses()), UPGradWeighting()),
        "nan, tasks": lambda: tasks.backward(bad(means()), UPGradWeighting()),
        "nan, mtl": lambda: _mtl(model, x, y, bad),
        "fewer tasks": lambda: tasks.compute_gramian(shorter(means())),
        "fewer tasks, mtl": lambda: _mtl(model, x, y, shorter),
        "fewer rows": lambda: backward(list(shorter(means()))),
        "no graph": lambda: engine.compute_gramian(losses().detach() if culprit else losses()),
        "other call": lambda: (
            tasks.compute_gramian(means()) if culprit else engine.compute_gramian(losses())
        ),
        "other graph": other_graph,
        "hook": with_hook,
        "no sync": lambda: without_sync(lambda: tasks.compute_gramian(means())),
        "no sync, mtl": lambda: without_sync(lambda: _mtl(model, x, y, lambda v: v)),
        "failing pass": lambda: failing_pass(True),
        "failing pass of one rank": lambda: failing_pass(culprit),
        "failing row": lambda: failing_row("memory"),
        "failing row, speed": lambda: failing_row("speed"),
        "other reshard": lambda: other_reshard(lambda: tasks.compute_gramian(means())),
        "other reshard, mtl": lambda: other_reshard(lambda: _mtl(model, x, y, lambda v: v)),
        "other reshard, rows": lambda: other_reshard(lambda: backward(list(means()))),
        "factors": factors,
        "foreign rows": foreign_rows,
        "skipped": skipped,
        "inputs": lambda: backward(list(means()), inputs=[torch.ones(2, requires_grad=True)]),
    }
    found: dict[str, Any] = {}
    for name, call in calls.items():
        message = _message(call)
        assert all(p.grad is None for p in model.parameters()), name
        found[name] = [message, _ordinary_step(engine, model, x, y)]
    return found


def _mtl(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    change: Callable[[Tensor], Tensor],
    count: int | None = None,
) -> None:
    features = model.norm(model.first(x))
    losses = change(LOSSES["task"](model.last(features), y))
    mtl_backward(list(losses), features=features, count=count)


def _without_samples(rank: int, world_size: int) -> list[Tensor]:
    """Rows where one rank's estimates do not count, and are no numbers."""
    model = make_network()
    attach(shard(model, mesh=make_mesh()))
    x, y = (local_part(t[:8], rank, world_size, "even") for t in make_data())
    _mtl(model, x, y, lambda v: v * float("nan") if rank else v, count=0 if rank else len(x))
    assert all(bool(whole(p.grad).isfinite().all()) for p in model.last.parameters())
    return [whole(p.jac) for p in model.first.parameters()]


def test_estimates_without_samples_count_for_nothing() -> None:
    model, (x, y) = make_network(), make_data()
    losses = LOSSES["task"](model.last(model.norm(model.first(x[:4]))), y[:4])
    rows = rows_of(losses, model.first)
    for found in run_ranks(_without_samples, 2):
        assert relative_error(torch.cat([f.flatten(1) for f in found], dim=1), rows) <= BOUND


EXPECTED = {
    "nan": "NonFiniteObjectiveError: Found NaN or infinity in objective 4 (rank 1)",
    "nan, tasks": "NonFiniteObjectiveError: Found NaN or infinity in objective 0 (rank 1)",
    "nan, mtl": "NonFiniteObjectiveError: Found NaN or infinity in the loss or the gradient of "
    "task 0 (rank 1)",
    "fewer tasks": "LayoutMismatchError: Found ranks that disagree in Engine.compute_gramian on "
    "shape of the objectives",
    "fewer tasks, mtl": "LayoutMismatchError: Found ranks that disagree in mtl_backward on",
    "fewer rows": "LayoutMismatchError: Found ranks that disagree in backward on number of rows",
    "no graph": "RankError: Engine.compute_gramian failed before the ranks exchanged anything: "
    "rank 1 raised",
    "other call": "LayoutMismatchError: Found the ranks in different calls",
    "other graph": "LayoutMismatchError: Found ranks that disagree in Engine.compute_gramian on",
    "hook": "UnsupportedModelError: Found a hook that waits",
    "no sync": "ValueError: Found a fully_shard that does not reduce gradients",
    "no sync, mtl": "ValueError: Found a fully_shard that does not reduce gradients",
    "failing pass": "RuntimeError: a backward of the user's own",
    "failing pass of one rank": "RankError: Engine.compute_gramian failed before the ranks "
    "exchanged anything: rank 1 raised",
    "failing row": "RuntimeError: a backward of the user's own",
    "failing row, speed": "RuntimeError: a backward of the user's own",
    "other reshard": "LayoutMismatchError: Found ranks that disagree in Engine.compute_gramian on "
    "reshard",
    "other reshard, mtl": "LayoutMismatchError: Found ranks that disagree in mtl_backward on "
    "reshard",
    "other reshard, rows": "LayoutMismatchError: Found ranks that disagree in backward on reshard",
    "factors": "ValueError: Found modules with different gradient divide factors",
    "foreign rows": "ValueError: Found a .jac of a sharded parameter",
    "skipped": NO_RANK,
    "inputs": "ValueError: Found a tensor of shape (2,) to differentiate towards",
}


def test_failures_are_the_same_on_every_rank_and_leave_nothing_behind() -> None:
    ranks = run_ranks(_failures, 2)
    model, (x, y) = make_network(), make_data()
    rows = rows_of(LOSSES["instance"](model(x[:8]), y[:8]), model)
    gradient = UPGrad()(rows)
    for found in ranks:
        assert found.keys() == EXPECTED.keys()
        wrong = {n: m for n, (m, _) in found.items() if not m.startswith(EXPECTED[n])}
        assert not wrong
        for name, (message, after) in found.items():
            assert message == ranks[0][name][0], name
            assert relative_error(after, gradient) <= BOUND, name


def _refusals(rank: int, world_size: int) -> dict[str, str]:
    mesh = make_mesh()

    def step_by_step_beside() -> None:
        model = make_network()
        fully_shard(model.first, mesh=mesh)
        engine = Engine(model, batch_dim=0)
        losses = model(torch.ones(2, 5, dtype=torch.float64)).square().sum(dim=1)
        gramian = engine.compute_gramian(losses)
        losses.backward(engine.local_weights(torch.ones_like(gramian[0])))

    def both() -> nn.Module:
        model = nn.Sequential(wrap(make_network()), nn.Linear(4, 4).double())
        fully_shard(model[1], mesh=mesh)
        return model

    def fsdp1() -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated
            return FullyShardedDataParallel(make_network(), device_id=torch.device("cpu"))

    calls: dict[str, Callable[[], Any]] = {
        "plain parameters": step_by_step_beside,
        "two wrappers": lambda: attach(both()),
        "FSDP1": lambda: attach(fsdp1()),
    }
    return {name: _message(call) for name, call in calls.items()}


REFUSED = {
    "plain parameters": "UnsupportedModelError: Found trainable parameters that are not sharded: "
    "norm.weight",
    "two wrappers": "UnsupportedModelError: Found modules in DistributedDataParallel and",
    "FSDP1": "UnsupportedModelError: Found a model wrapped in FSDP1",
}


def test_what_is_not_supported_is_refused_on_every_rank() -> None:
    ranks = run_ranks(_refusals, 2)
    for found in ranks:
        assert found == ranks[0]
        assert found.keys() == REFUSED.keys()
        for name, part in REFUSED.items():
            assert found[name].startswith(part), (name, found[name])
