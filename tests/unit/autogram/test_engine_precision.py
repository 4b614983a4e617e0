"""Narrow dtypes: the Gramian is as exact as the factors from which it is made.

The reference multiplies the very same activations and gradients, in float64: a float64 network
would measure the rounding of the forward, which is not the engine's.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from jddist.autogram import Engine
from tests._oracle import gramian, jacobian, relative_error, rows_of_factors
from tests.benchmark import models
from tests.cases import CASES
from tests.unit.autogram._common import Offset, losses_of, slow_way


def _deep_mlp(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(4)
    layers: list[nn.Module] = []
    for _ in range(6):
        layers += [nn.Linear(48, 48), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(48, 10)).to(dtype)


def _gramian_of_factors(model: nn.Sequential, x: Tensor) -> Tensor:
    """The sum over layers of (A A^T + 1) * (D D^T), in float64, from the factors as they are."""
    pairs: list[tuple[Tensor, Tensor]] = []
    handles = [
        layer.register_forward_hook(lambda _m, args, out: pairs.append((args[0], out)))
        for layer in model
        if isinstance(layer, nn.Linear)
    ]
    losses = losses_of(model(x))
    for handle in handles:
        handle.remove()
    grads = torch.autograd.grad(losses.sum(), [out for _, out in pairs])
    total = torch.zeros(len(x), len(x), dtype=torch.float64)
    for (a, _), g in zip(pairs, grads, strict=True):
        a64, g64 = a.detach().double(), g.double()
        total += (a64 @ a64.T + 1) * (g64 @ g64.T)
    return total


@pytest.mark.parametrize(
    ("dtype", "bound"),
    [
        # One product of two float32 Grams, added up in float64: a few rounding errors of 6e-8.
        (torch.float32, 2e-7),
        # bf16 factors multiply exactly into float32; what is left is float32's own rounding.
        (torch.bfloat16, 5e-7),
    ],
    ids=["float32", "bfloat16"],
)
def test_the_gramian_is_that_of_the_factors(dtype: torch.dtype, bound: float) -> None:
    model = _deep_mlp(dtype)
    x = torch.randn(32, 48).to(dtype)
    engine = Engine(model, batch_dim=0)
    found = engine.compute_gramian(losses_of(model(x)))
    assert found.dtype == torch.float32
    assert relative_error(found, _gramian_of_factors(model, x)) <= bound


_REDUCED: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "mlp": (lambda: models.mlp(256, 196), models.vectors(196)),
    "cnn": (lambda: models.cnn(16, 16), models.images(16)),
    "transformer": (lambda: models.Transformer(48, 2), models.sentences(24)),
}


@pytest.mark.parametrize("precision", ["float32", "autocast", "bfloat16"])
@pytest.mark.parametrize("budget", [0, 1 << 28], ids=["small_tiles", "large_tiles"])
@pytest.mark.parametrize("name", _REDUCED)
def test_the_benchmarks_models(name: str, budget: int, precision: str) -> None:
    make, inputs = _REDUCED[name]
    torch.manual_seed(4)
    model, x = make(), inputs(24)
    if precision == "bfloat16":
        model = model.to(torch.bfloat16)
        x = x.to(torch.bfloat16) if x.is_floating_point() else x
    targets = torch.randint(10, (24,))
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "autocast")

    def losses(output: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output.float(), targets, reduction="none")

    engine = Engine(model, batch_dim=0, memory_budget=budget)
    with autocast:
        output = model(x)
        assert output.dtype == (torch.float32 if precision == "float32" else torch.bfloat16)
        rows = rows_of_factors(model, x, losses)
    found = engine.compute_gramian(losses(output))
    assert found.dtype == torch.float32
    found = found.double()
    norms = rows.norm(dim=1)
    error = ((found - rows @ rows.T).abs() / norms.outer(norms)).max()
    # float32 products and sums of up to some thousand terms, added up in float64: 6e-8 a few
    # times over. The project's bound.
    assert error <= 1e-6


@pytest.mark.parametrize("batch_dim", [0, None])
def test_float32_rows(batch_dim: int | None) -> None:
    """Layers of all ways, rows as autograd computes them in float32."""
    torch.manual_seed(4)
    model = nn.Sequential(
        nn.Unflatten(1, (6, 8)), nn.Linear(8, 9), Offset(9), nn.LayerNorm(9), nn.Flatten()
    )
    engine = Engine(model, batch_dim=batch_dim)
    losses = losses_of(model(torch.randn(12, 48)))
    found = engine.compute_gramian(losses)
    rows = jacobian(losses, model.parameters()).double()
    # Both sides round: each row, and each sum over 9 to 72 terms, a few times 6e-8.
    assert relative_error(found, rows @ rows.T) <= 1e-6


@pytest.mark.parametrize("batch_dim", [0, None])
def test_autocast(batch_dim: int | None) -> None:
    """The forward of the fallback runs again, outside of the user's autocast."""
    torch.manual_seed(4)
    model = nn.Sequential(
        nn.Linear(48, 40), nn.Tanh(), _Mixer(40), nn.LayerNorm(40), nn.Linear(40, 5)
    )
    engine = Engine(model, batch_dim=batch_dim)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(torch.randn(12, 48))
    assert output.dtype == torch.bfloat16
    losses = losses_of(output.float())
    found = engine.compute_gramian(losses)
    assert found.dtype == torch.float32
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = gramian(losses, model.parameters())
    # The oracle rounds every row to bf16 (eps 8e-3, half of it per entry, uncorrelated); the
    # engine does not.
    assert relative_error(found, expected) <= 4e-3


class _Mixer(nn.Module):
    """No rule: its matrix product runs in bf16 under autocast, in float32 without."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size, size) / size**0.5)

    def forward(self, x: Tensor) -> Tensor:
        assert torch.is_autocast_enabled("cpu")
        return (x @ self.weight).sin()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_not_taken_for_a_wrong_attribution(dtype: torch.dtype) -> None:
    """The self-check stays silent in low precision, and still speaks where rows are wrong."""
    for case in (case for case in CASES if case.batch_dim_ok):
        model = case.model().to(dtype)
        engine = Engine(model, batch_dim=0)
        batch = {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor
            for name, tensor in case.batch(5).items()
        }
        with slow_way(case.announced):
            gramian_found = engine.compute_gramian(case.losses(model, batch))
        assert torch.isfinite(gramian_found).all(), case.name


def _normed(dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    """A norm whose output is averaged over many positions: its bias gets many equal terms."""
    torch.manual_seed(4)
    return nn.LayerNorm(32).to(dtype), torch.randn(16, 256, 32).to(dtype)


def test_sums_in_narrow_precision_are_not_taken_for_a_wrong_attribution() -> None:
    """torch adds up the gradient of a bf16 LayerNorm's bias in bf16, 20 % off; the rows are not."""
    norm, x = _normed(torch.bfloat16)
    targets = torch.randn(16, 32)

    def losses(output: Tensor) -> Tensor:
        return (output.float().mean(1) * targets).sum(1)

    # The premise: otherwise this test shows nothing.
    (summed,) = torch.autograd.grad(losses(norm(x)) @ torch.ones(16), [norm.bias])
    assert relative_error(summed, targets.sum(0)) > 0.1
    found = Engine(norm, batch_dim=0).compute_gramian(losses(norm(x)))
    rows = rows_of_factors(norm, x, losses)
    assert relative_error(found, rows @ rows.T) <= 1e-6


class _Mixed(nn.Module):
    """Swaps the samples behind the norm, unseen by the hooks of its only layer."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm, _ = _normed(dtype)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x)
        return out.flip(0)


def test_mixed_samples_are_noticed_in_narrow_precision() -> None:
    model, (_, x) = _Mixed(torch.bfloat16), _normed(torch.bfloat16)
    targets = torch.randn(16, 32)
    engine = Engine(model, batch_dim=0)
    losses = (model(x).float().mean(1) * targets).sum(1)
    with pytest.warns(UserWarning, match="a module mixes the samples"):
        found = engine.compute_gramian(losses)
    expected = jacobian(losses, model.parameters()).double()
    assert relative_error(found, expected @ expected.T) <= 2e-2
