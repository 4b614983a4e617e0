"""The cross Gramian of two batches, in one process, against rows of plain autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import Partial, Shard

from jddist.aggregation import Flattening, UPGradWeighting
from jddist.autogram import Engine
from jddist.errors import NonFiniteObjectiveError
from tests._oracle import flat_grad, jacobian, relative_error


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(3, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 4, bias=False)
    ).double()


def batch(samples: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, 3, generator=generator, dtype=torch.float64)


def brute_force(first: Tensor, second: Tensor, model: nn.Module) -> Tensor:
    parameters = list(model.parameters())
    cross = jacobian(first, parameters) @ jacobian(second, parameters).T
    full = cross.reshape(*first.shape, *second.shape)
    ndim = first.ndim
    return full.permute(*range(ndim), *reversed(range(ndim, full.ndim)))


@pytest.mark.parametrize(
    ("shape", "batch_dim"),
    [("tasks", None), ("samples", 0), ("samples", -1), ("matrix", 0), ("transposed", 1)],
)
def test_agrees_with_brute_force(shape: str, batch_dim: int | None) -> None:
    model = make_model()
    engine = Engine(model, batch_dim=batch_dim)

    def losses(x: Tensor) -> Tensor:
        y = model(x).square()
        return {"tasks": y.mean(0), "samples": y.sum(1), "matrix": y, "transposed": y.T}[shape]

    # The second batch has other samples, and another number of them.
    first, second = losses(batch(5, 1)), losses(batch(2 if shape != "tasks" else 7, 2))
    cross = engine.cross_gramian(first, second)
    expected = brute_force(first, second, model)
    assert relative_error(cross, expected) <= 1e-13
    # J1 J2ᵀ and not its transpose.
    transposed = engine.cross_gramian(second, first)
    order = list(reversed(range(transposed.ndim)))
    assert relative_error(transposed.permute(order), expected) <= 1e-13


def test_of_one_batch_is_the_gramian() -> None:
    model = make_model()
    engine = Engine(model, batch_dim=None)
    losses = model(batch(5, 1)).square().mean(0)
    gramian = engine.compute_gramian(losses)
    assert relative_error(engine.cross_gramian(losses, losses), gramian) <= 1e-14


def test_weights_then_a_step() -> None:
    model = make_model()
    engine = Engine(model, batch_dim=None)
    first, second = (model(batch(5, seed)).square().mean(0) for seed in (1, 2))
    cross = engine.cross_gramian(first, second)
    weights = engine.compute_weights(cross, lambda matrix: matrix.sum(dim=1).softmax(dim=0))
    assert weights.shape == (4,)
    losses = (first + second) / 2
    expected = weights @ jacobian(losses, model.parameters())
    with pytest.raises(RuntimeError, match="compute_gramian"):
        engine.local_weights(weights)
    assert torch.equal(engine.backward(losses, weights), weights)
    assert relative_error(flat_grad(model.parameters()), expected) <= 1e-13


def test_an_ordinary_step_is_not_disturbed() -> None:
    model = make_model()
    engine = Engine(model, batch_dim=0)
    engine.cross_gramian(model(batch(5, 1)).square().sum(1), model(batch(4, 2)).square().sum(1))
    losses = model(batch(6, 3)).square()
    weights = engine.backward(losses, Flattening(UPGradWeighting()))
    again = make_model()
    alone = Engine(again, batch_dim=0).backward(
        again(batch(6, 3)).square(), Flattening(UPGradWeighting())
    )
    assert torch.equal(weights, alone)


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
@pytest.mark.parametrize("which", [0, 1])
def test_not_finite(nonfinite: str, which: int) -> None:
    model = make_model()
    engine = Engine(model, batch_dim=None, nonfinite=nonfinite)  # type: ignore[arg-type]
    inputs = [batch(5, 1), batch(5, 2)]
    inputs[which][0, 0] = float("nan")
    first, second = (model(x).square().mean(0) for x in inputs)
    with pytest.raises(NonFiniteObjectiveError):
        engine.cross_gramian(first, second)
    assert all(p.grad is None for p in model.parameters())


def test_refuses_what_has_no_graph() -> None:
    model = make_model()
    engine = Engine(model, batch_dim=None)
    losses = model(batch(5, 1)).square().mean(0)
    for outputs in [(losses, losses.detach()), (losses.detach(), losses)]:
        with pytest.raises(ValueError, match="does not require a gradient"):
            engine.cross_gramian(*outputs)
    with pytest.raises(ValueError, match="dimension"):
        Engine(model, batch_dim=1).cross_gramian(losses, losses)


@pytest.mark.parametrize("objectives", [Shard(0), Partial("sum")])
def test_counts_belong_to_averages(objectives: Shard | Partial) -> None:
    model = make_model()
    engine = Engine(model, batch_dim=None, objectives=objectives)
    losses = model(batch(5, 1)).square().mean(0)
    with pytest.raises(ValueError, match="count"):
        engine.cross_gramian(losses, losses, counts=(5, 5))
