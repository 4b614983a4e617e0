"""Several batches that join one Gramian, in one process: the step of the concatenated batch."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import Partial, Placement, Shard

from jddist.aggregation import Flattening, UPGradWeighting
from jddist.autogram import Engine
from jddist.errors import NonFiniteObjectiveError
from tests._oracle import flat_grad, jacobian, relative_error

SIZES = [3, 1, 0, 4]


class Mixed(nn.Module):
    """Layers of every kind of block: lookup, outer products, patches, norms, and a fallback."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.norm = nn.LayerNorm(6)
        self.scale = Scale(6)
        self.head = nn.Linear(6, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embedding(tokens)
        h = torch.tanh(self.conv(h.transpose(1, 2)).transpose(1, 2))
        return self.head(self.scale(self.norm(h)).mean(1))


class Scale(nn.Module):
    """A module without a closed form."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.linspace(0.5, 1.5, size))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor.exp()


def make_model() -> Mixed:
    torch.manual_seed(0)
    return Mixed().double()


def tokens() -> Tensor:
    return torch.randint(7, (sum(SIZES), 5), generator=torch.Generator().manual_seed(1))


LOSSES = {
    "samples": (0, Shard(0), lambda y: y.square().sum(1)),
    "samples and tasks": (0, Shard(0), lambda y: y.square()),
    "tasks and samples": (1, Shard(0), lambda y: y.square().T),
    "one by one": (None, Shard(0), lambda y: y.square().sum(1)),
    "sums": (None, Partial("sum"), lambda y: y.square().sum(0)),
    "means": (None, Partial("avg"), lambda y: y.square().mean(0)),
}


def weighting_for(losses: Tensor) -> UPGradWeighting | Flattening:
    return UPGradWeighting() if losses.ndim == 1 else Flattening(UPGradWeighting())


@pytest.mark.parametrize("case", LOSSES)
def test_equals_the_concatenated_batch(case: str) -> None:
    batch_dim, placement, loss = LOSSES[case]
    model = make_model()
    whole = loss(model(tokens()))
    rows = jacobian(whole, model.parameters())
    weighting = weighting_for(whole)
    weights = UPGradWeighting()(rows @ rows.T)

    engine = Engine(model, batch_dim=batch_dim, objectives=placement)
    for _ in range(2):  # nothing is left behind by the first
        model.zero_grad()
        with engine.accumulate() as accumulation:
            for part in tokens().split(SIZES):
                if len(part) == 0 and case != "samples":
                    continue
                count = len(part) if case == "means" else None
                assert engine.backward(loss(model(part)), weighting, count=count).numel() == 0
                assert all(p.grad is None for p in model.parameters())
        assert accumulation.weights is not None
        assert relative_error(accumulation.weights, weights.view(whole.shape)) <= 1e-10
        assert relative_error(flat_grad(model.parameters()), weights @ rows) <= 1e-10


def test_means_without_counts_are_averaged_over_batches() -> None:
    model = make_model()
    engine = Engine(model, batch_dim=None)
    parts = [part for part in tokens().split(SIZES) if len(part)]
    loss = LOSSES["means"][2]
    whole = torch.stack([loss(model(part)) for part in parts]).mean(0)
    rows = jacobian(whole, model.parameters())
    weighting = UPGradWeighting()
    with engine.accumulate():
        for part in parts:
            engine.backward(loss(model(part)), weighting)
    expected = UPGradWeighting()(rows @ rows.T) @ rows
    assert relative_error(flat_grad(model.parameters()), expected) <= 1e-10


def test_an_objective_without_samples_may_be_nan() -> None:
    model = make_model()
    engine = Engine(model, batch_dim=None)
    weighting = UPGradWeighting()
    x = tokens()
    reference = model(x).square().mean(0)
    rows = jacobian(reference, model.parameters())
    with engine.accumulate() as accumulation:
        for part, nan in ((x, False), (x[:0], True)):
            losses = model(part).square().mean(0)
            assert bool(losses.isnan().all()) == nan
            engine.backward(losses, weighting, count=len(part))
    weights = UPGradWeighting()(rows @ rows.T)
    assert relative_error(accumulation.weights, weights) <= 1e-10


def step(engine: Engine, model: nn.Module, batches: Sequence[Tensor], weighting: object) -> None:
    for x in batches:
        engine.backward(model(x).square().sum(1), weighting)  # type: ignore[arg-type]


def test_an_error_leaves_no_trace() -> None:
    model = make_model()
    engine = Engine(model, batch_dim=0)
    weighting = UPGradWeighting()
    with pytest.raises(KeyError, match="mine"), engine.accumulate():
        step(engine, model, tokens().split(4), weighting)
        raise KeyError("mine")
    assert all(p.grad is None for p in model.parameters())
    weights = engine.backward(model(tokens()).square().sum(1), weighting)
    assert weights.shape == (sum(SIZES),)


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_not_finite(nonfinite: str) -> None:
    model = make_model()
    engine = Engine(model, batch_dim=0, nonfinite=nonfinite)  # type: ignore[arg-type]
    weighting = UPGradWeighting()

    def accumulate() -> Tensor | None:
        with engine.accumulate() as accumulation:
            engine.backward(model(tokens()[:3]).square().sum(1), weighting)
            engine.backward(model(tokens()[3:]).square().sum(1) * float("nan"), weighting)
        return accumulation.weights

    if nonfinite == "raise":
        with pytest.raises(NonFiniteObjectiveError, match="objective 3"):
            accumulate()
    else:
        with pytest.warns(UserWarning, match="zero"):
            weights = accumulate()
        assert weights is not None and not weights.any()
    assert all(p.grad is None for p in model.parameters())


def test_refusals() -> None:
    model = make_model()
    engine = Engine(model, batch_dim=0)
    weighting = UPGradWeighting()
    x = tokens()
    with pytest.raises(ValueError, match="no batch"), engine.accumulate():
        pass
    with pytest.raises(ValueError, match="same object"), engine.accumulate():
        step(engine, model, [x], weighting)
        step(engine, model, [x], UPGradWeighting())
    with pytest.raises(ValueError, match="expected a weighting"), engine.accumulate():
        engine.backward(model(x).square().sum(1), torch.ones(len(x)))
    with pytest.raises(RuntimeError, match="inside of"), engine.accumulate(), engine.accumulate():
        pass
    with pytest.raises(ValueError, match="same\nobjectives|same objectives"), engine.accumulate():
        step(engine, model, [x], weighting)
        engine.backward(model(x).square(), weighting)
    mixed = Engine(model, batch_dim=None, objectives=Partial("avg"))
    with pytest.raises(ValueError, match="count"), mixed.accumulate():
        mixed.backward(model(x).square().mean(0), weighting, count=3)
        mixed.backward(model(x).square().mean(0), weighting)


@pytest.mark.parametrize("placement", [Shard(0), Partial("avg")], ids=str)
def test_only_one_batch(placement: Placement) -> None:
    model = make_model()
    batch_dim = 0 if placement == Shard(0) else None
    engine = Engine(model, batch_dim=batch_dim, objectives=placement)
    weighting = UPGradWeighting()

    def losses() -> Tensor:
        y = model(tokens()).square()
        return y.sum(1) if batch_dim == 0 else y.mean(0)

    expected = engine.backward(losses(), weighting)
    gradient = flat_grad(model.parameters()).clone()
    model.zero_grad()
    with engine.accumulate() as accumulation:
        engine.backward(losses(), weighting)
    assert relative_error(accumulation.weights, expected) <= 1e-12
    assert relative_error(flat_grad(model.parameters()), gradient) <= 1e-12
