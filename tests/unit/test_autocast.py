"""Inside of the user's autocast region everything is as exact as after it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor, nn

from jddist.aggregation import UPGrad
from jddist.autogram import Engine
from jddist.autojac import backward, jac, jac_to_grad, jac_to_grad_groups, mtl_backward


def _engine(inside: AbstractContextManager[None], model: nn.Sequential, x: Tensor) -> list[Tensor]:
    engine = Engine(model, batch_dim=0)
    found = []
    for _ in range(3):  # with and without a check
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
            losses = model(x).float().pow(2).mean(dim=(1, 2))
        with inside:
            engine.backward(losses, UPGrad().gramian_weighting)
    found += [p.grad for p in model.parameters() if p.grad is not None]
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        losses = model(x).float().pow(2).mean(dim=(1, 2))
    with inside:
        gramian = engine.compute_gramian(losses)
        weights = engine.compute_weights(gramian, lambda g: (g @ g).sum(dim=1))
    joined: list[Tensor] = []

    def weigh(gramian: Tensor) -> Tensor:
        joined.append(gramian)
        return gramian.diagonal()

    with inside, engine.accumulate():
        for part in x.split(3):
            with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
                losses = model(part).float().pow(2).mean(dim=(1, 2))
            engine.backward(losses, weigh)
    return [*found, gramian, weights, *joined]


def _rows(inside: AbstractContextManager[None], model: nn.Sequential, x: Tensor) -> list[Tensor]:
    parameters = list(model.parameters())

    def tasks() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
            return model(x).float().pow(2).mean(dim=(0, 1))

    losses = tasks()
    with inside:
        rows = jac([losses], parameters)
    losses = tasks()
    with inside:
        backward([losses])
        jac_to_grad(parameters, UPGrad())
    losses = tasks()
    with inside:
        backward([losses])
        jac_to_grad_groups([parameters[:2], parameters[2:]], [UPGrad(), UPGrad()])
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        features = model[:2](x)
        outputs = model[2](features).float().pow(2)
        pair = [outputs[..., :4].mean(), outputs[..., 4:].mean()]
    with inside:
        mtl_backward(pair, features=features, tasks_params=[[], []])
        jac_to_grad(list(model[0].parameters()), UPGrad())
    return [*rows, *(p.grad for p in parameters if p.grad is not None)]


@pytest.mark.parametrize("call", [_engine, _rows])
def test_what_is_computed_inside_is_what_is_computed_after(
    call: Callable[[AbstractContextManager[None], nn.Sequential, Tensor], list[Tensor]],
) -> None:
    found = []
    for inside in (nullcontext(), torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16))
        found.append(call(inside, model, torch.randn(6, 40, 8)))
    after, within = found
    assert len(after) == len(within) > 4
    for a, b in zip(after, within, strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert torch.equal(a, b)
