"""Gradients from the rows over ranks: those of the second backward that they replace.

The bound is 1e-12 in float64: both are sums of the same products in another order.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from jddist.autogram import Engine
from jddist.autogram import step as step_module
from jddist.distribution import Scheme, data_parallel
from tests._oracle import jacobian, relative_error
from tests._ranks import run_ranks
from tests.distributed._exchanged import only
from tests.distributed._training import LOSSES, flatten, local_part, make_data, make_network, wrap

BOUND = 1e-12
STEPS = 7  # the engine checks itself, and differentiates, at the 1st, 2nd and 4th

OPTIONS: dict[str, tuple[dict[str, Any], bool]] = {
    # DDP's options, and whether gradients are handed over instead of running its backward.
    "none": ({}, True),
    "unused parameters": ({"find_unused_parameters": True}, True),
    "tiny buckets": ({"bucket_cap_mb": 0.0001}, True),
    "static graph": ({"static_graph": True}, False),
    "bucket view": ({"gradient_as_bucket_view": True}, False),
    "communication hook": ({}, False),
    "a bucket for each parameter": ({}, True),
}


class _Count:
    """How often the rows were combined."""

    def __init__(self) -> None:
        self.calls = 0

    def __enter__(self) -> _Count:
        self.patch = pytest.MonkeyPatch()
        original = step_module.combined

        def spied(*args: Any) -> Any:
            self.calls += 1
            return original(*args)

        self.patch.setattr(step_module, "combined", spied)
        return self

    def __exit__(self, *_: object) -> None:
        self.patch.undo()


def _weights(step: int, total: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(total, generator=generator, dtype=torch.float64)


def _train(rank: int, world_size: int, kind: str, name: str) -> dict[str, Any]:
    """Steps from the rows, and in between ordinary ones, of the same and of other graphs."""
    options, _ = OPTIONS[name]
    model = make_network()
    ddp = wrap(model, **options)
    if name == "communication hook":
        ddp.register_comm_hook(None, allreduce_hook)
    x, y = make_data()
    mine, targets = (local_part(t, rank, world_size, kind) for t in (x, y))
    engine = Engine(ddp, batch_dim=0)
    grads = []
    with _Count() as count:
        if name == "a bucket for each parameter":
            count.patch.setattr(data_parallel, "_BUCKET", 1)
        for step in range(STEPS):
            model.zero_grad()
            losses = LOSSES["instance"](ddp(mine), targets)
            weights = _weights(step, len(x))
            engine.backward(losses, lambda _g, w=weights: w)
            grads.append(flatten([p.grad for p in model.parameters()]))
            if step % 2:
                model.zero_grad()
                LOSSES["instance"](ddp(mine), targets).sum().backward()
                grads.append(flatten([p.grad for p in model.parameters()]))
    return {"grads": grads, "combined": count.calls}


def _everything(rank: int, world_size: int, kind: str) -> dict[str, Any]:
    return {name: _train(rank, world_size, kind, name) for name in OPTIONS}


@pytest.mark.parametrize(
    ("world_size", "kind"), [(1, "even"), (2, "uneven"), (3, "empty"), (4, "uneven")]
)
def test_gradients_are_those_of_a_backward(world_size: int, kind: str) -> None:
    model, (x, y) = make_network(), make_data()
    rows = jacobian(LOSSES["instance"](model(x), y), list(model.parameters()))
    ranks = run_ranks(_everything, world_size, kind)
    for rank, found in enumerate(ranks):
        for name, (_, handed_over) in OPTIONS.items():
            grads = iter(found[name]["grads"])
            for step in range(STEPS):
                assert relative_error(next(grads), _weights(step, len(x)) @ rows) <= BOUND, name
                if step % 2:
                    # DDP's own mean over ranks of the sums of their losses.
                    assert relative_error(next(grads), rows.sum(0) / world_size) <= BOUND, name
            has_data = not (kind == "empty" and rank == 0)
            assert found[name]["combined"] == (4 if handed_over and has_data else 0), name


def _accumulate(rank: int, world_size: int) -> dict[str, Any]:
    """Micro-steps under no_sync, the last one of a kind with the others and not."""
    found = {}
    for last_is_ordinary in (False, True):
        model = make_network()
        ddp = wrap(model)
        x, y = (local_part(t, rank, world_size, "uneven") for t in make_data())
        engine = Engine(ddp, batch_dim=0)
        with _Count() as count:
            for step in range(8):
                with contextlib.nullcontext() if step == 7 else ddp.no_sync():
                    losses = LOSSES["instance"](ddp(x), y)
                    if last_is_ordinary and step == 7:
                        losses.sum().backward()
                    else:
                        engine.backward(losses, lambda g, s=step: _weights(s, len(g)))
        grads = flatten([p.grad for p in model.parameters()])
        found[str(last_is_ordinary)] = {"grads": grads, "combined": count.calls}
    return found


def test_micro_steps_accumulate() -> None:
    model, (x, y) = make_network(), make_data()
    rows = jacobian(LOSSES["instance"](model(x), y), list(model.parameters()))
    for found in run_ranks(_accumulate, 2):
        weights = torch.stack([_weights(step, len(x)) for step in range(8)])
        assert relative_error(found["False"]["grads"], weights.sum(0) @ rows) <= BOUND
        expected = weights[:7].sum(0) @ rows + rows.sum(0) / 2
        assert relative_error(found["True"]["grads"], expected) <= BOUND
        assert found["False"]["combined"] == found["True"]["combined"] == 4  # 3, 5, 6 and 7


class _Branches(nn.Module):
    """Each sample's sign decides which layer it goes through."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(5, 3), nn.Linear(5, 3)
        self.spare = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        layer = self.left if x[0, 0] > 0 else self.right
        out: Tensor = layer(x)
        return out


def _branch(rank: int, world_size: int) -> dict[str, Any]:
    """Ranks that reach different parameters; one that nobody reaches keeps no gradient."""
    torch.manual_seed(0)
    model = _Branches().double()
    ddp = wrap(model, find_unused_parameters=True)
    engine = Engine(ddp, batch_dim=0)
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(3, 5, generator=generator, dtype=torch.float64).abs()
    x = x if rank == 0 else -x
    with _Count() as count:
        for _ in range(3):
            model.zero_grad()
            engine.backward(
                ddp(x).square().sum(1), lambda g: torch.arange(1.0, len(g) + 1).double()
            )
    grads = [p.grad for p in (*model.left.parameters(), *model.right.parameters())]
    assert all(p.grad is None for p in model.spare.parameters())
    once = flatten(grads)
    model.zero_grad()
    for step in range(2):  # each rank reaches the one, then the other
        with contextlib.nullcontext() if step else ddp.no_sync():
            losses = ddp(-x if step else x).square().sum(1)
            engine.backward(losses, lambda g: torch.arange(1.0, len(g) + 1).double())
    twice = flatten([p.grad for p in (*model.left.parameters(), *model.right.parameters())])
    return {"grad": once, "both": twice, "combined": count.calls, "x": x}


def test_ranks_that_reach_different_parameters() -> None:
    found = run_ranks(_branch, 2)
    torch.manual_seed(0)
    model = _Branches().double()
    losses = torch.cat([model(rank["x"]).square().sum(1) for rank in found])
    (losses * torch.arange(1.0, 7)).sum().backward()
    expected = flatten([p.grad for p in (*model.left.parameters(), *model.right.parameters())])
    losses = torch.cat([model(-rank["x"]).square().sum(1) for rank in found])
    (losses * torch.arange(1.0, 7)).sum().backward()
    both = flatten([p.grad for p in (*model.left.parameters(), *model.right.parameters())])
    for rank in found:
        assert rank["combined"] == 1
        assert relative_error(rank["grad"], expected) <= BOUND
        assert relative_error(rank["both"], both) <= BOUND


def _different_kinds(rank: int, world_size: int) -> str:
    """From the third step on, rank 1 asks for a gradient with respect to its input."""
    ddp = wrap(make_network())
    engine = Engine(ddp, batch_dim=0)
    x, y = (local_part(t, rank, world_size, "even") for t in make_data())
    for step in range(3):
        inputs = x.clone().requires_grad_(step == 2 and rank == 1)
        try:
            engine.backward(LOSSES["instance"](ddp(inputs), y), lambda g: g.diagonal())
        except RuntimeError as error:
            return f"{step}: {error}"
    return "no error"


def test_graphs_of_different_kinds_are_an_error_on_every_rank() -> None:
    for message in run_ranks(_different_kinds, 2):
        assert message.startswith("2: Found graphs of different kinds: that of rank 1")
        assert "retain_graph=True" in message


def _biases_alone(rank: int, world_size: int) -> list[Tensor]:
    """Steps whose graph is kept, on columns that are exchanged as factors and then held as rows."""
    model = make_network()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.ndim == 1)
    ddp = wrap(model)
    x, y = (local_part(t, rank, world_size, "uneven") for t in make_data())
    engine = Engine(ddp, batch_dim=0)
    grads = []
    with only(Scheme.FACTORS), _Count() as count:
        for step in range(STEPS):
            model.zero_grad()
            losses = LOSSES["instance"](ddp(x), y)
            engine.backward(losses, lambda g, s=step: _weights(s, len(g)), retain_graph=True)
            grads.append(flatten([p.grad for p in model.parameters() if p.ndim == 1]))
    assert count.calls == STEPS
    return grads


def test_biases_alone_with_the_graph_kept() -> None:
    model, (x, y) = make_network(), make_data()
    biases = [p for p in model.parameters() if p.ndim == 1]
    rows = jacobian(LOSSES["instance"](model(x), y), biases)
    for grads in run_ranks(_biases_alone, 2):
        for step, grad in enumerate(grads):
            assert relative_error(grad, _weights(step, len(x)) @ rows) <= BOUND
