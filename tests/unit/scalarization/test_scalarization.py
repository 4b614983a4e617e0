"""Scalarizers: values, gradients, hooks, texts, and the same draws as torchjd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import jddist.scalarization as ours
from jddist.scalarization import Constant, Mean, Random, Scalarizer, Sum

SHAPES = [(), (1,), (5,), (3, 4), (2, 3, 4)]


def _values(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()


def _scalarizer(name: str, values: Tensor) -> Scalarizer:
    if name == "Constant":
        return Constant(torch.arange(1.0, values.numel() + 1).reshape(values.shape).to(values))
    return getattr(ours, name)()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["Mean", "Sum", "Constant", "Random"])
def test_the_scalar_is_a_weighted_sum(name: str, shape: tuple[int, ...]) -> None:
    values = _values(shape)
    torch.manual_seed(0)
    scalar = _scalarizer(name, values)(values)
    assert scalar.shape == ()
    (weights,) = torch.autograd.grad(scalar, values)
    expected = {
        "Mean": torch.full_like(values, 1 / values.numel()),
        "Sum": torch.ones_like(values),
        "Constant": torch.arange(1.0, values.numel() + 1).reshape(shape).to(values),
    }
    if name == "Random":
        assert (weights > 0).all()
        assert_close(weights.sum(), torch.ones((), dtype=torch.float64))
    else:
        assert_close(weights, expected[name])
    assert_close(scalar, (weights * values).sum())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_random_draws_like_the_peer(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    peer = pytest.importorskip("torchjd.scalarization")
    values = _values(shape, dtype)
    torch.manual_seed(3)
    expected = peer.Random()(values)
    position = torch.random.get_rng_state()
    torch.manual_seed(3)
    assert torch.equal(Random()(values), expected)
    assert torch.equal(torch.random.get_rng_state(), position)


@pytest.mark.parametrize(("weights", "values"), [((5,), (4,)), ((5,), (5, 1)), ((3, 4), (4, 3))])
def test_constant_weights_have_the_shape_of_the_values(
    weights: tuple[int, ...], values: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="shape"):
        Constant(torch.ones(weights))(torch.ones(values))


def test_hooks_run() -> None:
    scalarizer = Mean()
    scalarizer.register_forward_hook(lambda module, inputs, output: 2 * output)
    assert scalarizer(torch.ones(3)) == 2.0


@pytest.mark.parametrize(
    ("scalarizer", "long", "short"),
    [
        (Mean(), "Mean()", "Mean"),
        (Sum(), "Sum()", "Sum"),
        (Random(), "Random()", "Random"),
        (
            Constant(torch.tensor([1.0, 2.0])),
            "Constant(weights=tensor([1., 2.]))",
            "Constant([1., 2.])",
        ),
        (
            Constant(torch.ones(1, 2)),
            "Constant(weights=tensor([[1., 1.]]))",
            "Constant(weights of shape (1, 2))",
        ),
    ],
)
def test_texts(scalarizer: Scalarizer, long: str, short: str) -> None:
    assert repr(scalarizer) == long
    assert str(scalarizer) == short
