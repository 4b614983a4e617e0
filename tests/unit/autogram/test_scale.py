"""Steps under a GradScaler: the weights of the unscaled objectives, and skipped steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from jddist.aggregation import UPGradWeighting
from jddist.autogram import Engine
from tests._oracle import flat_grad, jacobian, relative_error

SCALE = 2.0**10


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()


def losses_of(model: nn.Module) -> Tensor:
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return 1e-3 * model(x).square().sum(1)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_weights_are_those_of_the_unscaled_objectives(as_tensor: bool) -> None:
    model = make_model()
    rows = jacobian(losses_of(model), model.parameters())
    # The trace is below norm_eps, so a scaled Gramian would give other weights.
    with pytest.warns(UserWarning, match="norm_eps"):
        expected = UPGradWeighting()(rows @ rows.T)
    assert not torch.allclose(expected, UPGradWeighting()(SCALE**2 * rows @ rows.T))
    scale = torch.tensor(SCALE) if as_tensor else SCALE
    engine = Engine(model, batch_dim=0)
    with pytest.warns(UserWarning, match="norm_eps"):
        weights = engine.backward(SCALE * losses_of(model), UPGradWeighting(), scale=scale)
    assert relative_error(weights, expected) <= 1e-10
    assert relative_error(flat_grad(model.parameters()), SCALE * expected @ rows) <= 1e-10


@pytest.mark.parametrize("accumulate", [False, True])
def test_an_overflow_makes_the_scaler_skip_the_step(accumulate: bool) -> None:
    model = make_model().float()
    engine = Engine(model, batch_dim=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1e30)
    weighting = UPGradWeighting()
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    before = [p.detach().clone() for p in model.parameters()]
    taken = 0
    for _ in range(60):
        optimizer.zero_grad()
        if accumulate:
            with engine.accumulate() as accumulation:
                for part in x.split(4):
                    losses = scaler.scale(model(part).square().sum(1))
                    engine.backward(losses, weighting, scale=scaler.get_scale())
            weights = accumulation.weights
        else:
            losses = scaler.scale(model(x).square().sum(1))
            weights = engine.backward(losses, weighting, scale=scaler.get_scale())
        assert weights is not None
        overflow = bool(weights.isnan().any())
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        unchanged = all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
        if taken == 0:
            assert unchanged == overflow
        assert (scaler.get_scale() < scale) == overflow
        taken += not overflow
    # The scale falls until the products of rows, some 1e38 in float32, do fit.
    assert taken > 0


def test_one_scale_per_accumulation() -> None:
    model = make_model()
    engine = Engine(model, batch_dim=0)
    weighting = UPGradWeighting()
    with pytest.raises(ValueError, match="one scale"), engine.accumulate():
        engine.backward(2.0 * losses_of(model), weighting, scale=2.0)
        engine.backward(4.0 * losses_of(model), weighting, scale=4.0)
