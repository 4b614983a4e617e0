"""``backward`` and ``jac`` against one gradient at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from jddist.aggregation import UPGrad
from jddist.autojac import backward, jac
from tests._oracle import jacobian, relative_error

BOUND = 1e-12  # the same float64 operations, batched: a few units in the last place


def _network() -> tuple[nn.Module, list[nn.Parameter], Tensor]:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return model, list(model.parameters()), torch.randn(6, 4, dtype=torch.float64)


def _flat_jacs(parameters: list[nn.Parameter]) -> Tensor:
    return torch.cat([p.jac.reshape(len(p.jac), -1) for p in parameters], dim=1)


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 5, 100])
def test_backward_fills_jac_with_the_rows_of_all_elements(chunk_size: int | None) -> None:
    model, parameters, x = _network()
    y = model(x)
    tensors = [y[0], y[1:3].sum(), y[3:]]
    expected = torch.cat([jacobian(t, parameters) for t in tensors])
    backward(tensors, parallel_chunk_size=chunk_size)
    assert relative_error(_flat_jacs(parameters), expected) <= BOUND


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_jac_returns_the_rows_and_chains(chunk_size: int | None) -> None:
    model, parameters, x = _network()
    hidden = torch.tanh(model[0](x))
    y = model[2](hidden).sum(dim=0)
    expected = jacobian(y, parameters)
    (at_hidden,) = jac(y, hidden, retain_graph=True, parallel_chunk_size=chunk_size)
    first = jac(
        hidden,
        parameters[:2],
        jac_outputs=at_hidden,
        retain_graph=True,
        parallel_chunk_size=chunk_size,
    )
    second = jac(y, parameters[2:], parallel_chunk_size=chunk_size)
    found = torch.cat([j.reshape(3, -1) for j in (*first, *second)], dim=1)
    assert relative_error(found, expected) <= BOUND
    repeated = jac([x.sum() * parameters[0].sum()], [parameters[0], parameters[0]])
    assert torch.equal(repeated[0], repeated[1])


def test_backward_with_an_aggregator_fills_grad_and_frees_jac() -> None:
    model, parameters, x = _network()
    losses = model(x).pow(2).sum(dim=1)
    rows = jacobian(losses, parameters)
    backward(losses, UPGrad())
    grad = torch.cat([p.grad.reshape(-1) for p in parameters])
    assert relative_error(grad, UPGrad()(rows)) <= BOUND
    assert not any(hasattr(p, "jac") for p in parameters)


def test_jac_accumulates_and_inputs_restrict() -> None:
    model, parameters, x = _network()
    losses = model(x).sum(dim=1)
    rows = jacobian(losses, parameters[:1])
    backward(losses, inputs=parameters[:1], retain_graph=True)
    backward(losses, inputs=parameters[:1], parallel_chunk_size=2)
    assert relative_error(parameters[0].jac.reshape(6, -1), 2 * rows) <= BOUND
    assert not hasattr(parameters[1], "jac")


def test_unused_inputs_get_zero_rows() -> None:
    model, parameters, x = _network()
    unused = torch.ones(2, requires_grad=True)
    backward(model(x)[0], inputs=[*parameters, unused])
    assert torch.equal(unused.jac, torch.zeros(3, 2))


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_the_graph_is_freed_unless_retained(chunk_size: int | None) -> None:
    model, _, x = _network()
    losses = model(x).sum(dim=1)
    backward(losses, retain_graph=True, parallel_chunk_size=chunk_size)
    backward(losses, parallel_chunk_size=chunk_size)
    with pytest.raises(RuntimeError, match="second time"):
        backward(losses, parallel_chunk_size=chunk_size)


class _NoVmap(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        return x * 2

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return torch.from_numpy(grad.numpy() * 2)


def test_what_vmap_cannot_do_is_said_with_the_way_out() -> None:
    model, parameters, x = _network()
    losses = _NoVmap.apply(model(x)).sum(dim=1)
    with pytest.raises(RuntimeError, match="parallel_chunk_size=1"):
        backward(losses, retain_graph=True)
    rows = jacobian(losses, parameters)
    backward(losses, parallel_chunk_size=1)
    assert relative_error(_flat_jacs(parameters), rows) <= BOUND


def test_wrong_arguments_are_refused() -> None:
    model, parameters, x = _network()
    y = model(x).sum(dim=1)
    with pytest.raises(ValueError, match="Found no `tensors`"):
        backward([])
    with pytest.raises(ValueError, match="more than once"):
        backward([y, y])
    with pytest.raises(ValueError, match="parallel_chunk_size=0"):
        backward(y, parallel_chunk_size=0)
    with pytest.raises(ValueError, match="without a graph"):
        backward(torch.ones(2))
    with pytest.raises(ValueError, match="a leaf that requires a gradient"):
        backward(y, inputs=[x])
    with pytest.raises(ValueError, match=r"`inputs\[1\]` of shape \[6, 4\]"):
        jac(y, [parameters[0], x])
    with pytest.raises(ValueError, match="Found 2 `jac_tensors` for 1"):
        backward(y, jac_tensors=[torch.eye(6).double(), torch.eye(6).double()])
    with pytest.raises(ValueError, match=r"expected \[m, \*\[6\]\]"):
        backward(y, jac_tensors=torch.ones(2, 5).double())
    with pytest.raises(ValueError, match="same number of rows"):
        z = model(x).mean()
        backward([y, z], jac_tensors=[torch.ones(2, 6).double(), torch.ones(3).double()])
    assert not any(hasattr(p, "jac") for p in parameters)
