"""torch.compile, of parts or the whole: hooks are met outside of the compiled code."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
import torch._functorch.config
from torch import Tensor, nn

from jddist.aggregation import UPGradWeighting
from jddist.autogram import Engine
from jddist.errors import UnsupportedModelError
from tests._oracle import flat_grad, gramian, jacobian, relative_error


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(3, 5)
        self.middle = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.LayerNorm(5))
        self.last = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(torch.tanh(self.first(x))))


def _submodule(net: Net, backend: str) -> nn.Module:
    net.middle = torch.compile(net.middle, backend=backend)  # type: ignore[assignment]
    return net


def _in_place(net: Net, backend: str) -> nn.Module:
    net.middle.compile(backend=backend)
    return net


def _leaf(net: Net, backend: str) -> nn.Module:
    net.last = torch.compile(net.last, backend=backend)  # type: ignore[assignment]
    return net


def _whole(net: Net, backend: str) -> nn.Module:
    return torch.compile(net, backend=backend)  # type: ignore[return-value]


def _whole_in_place(net: Net, backend: str) -> nn.Module:
    net.compile(backend=backend)
    return net


WAYS: list[Callable[[Net, str], nn.Module]] = [
    _submodule,
    _in_place,
    _leaf,
    _whole,
    _whole_in_place,
]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch")  # of the compiler about itself
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()


@pytest.mark.parametrize(
    ("compiled", "backend"),
    [*((way, "eager") for way in WAYS), (_submodule, "aot_eager"), (_whole, "aot_eager")],
    ids=lambda value: getattr(value, "__name__", value),
)
@torch._functorch.config.patch(donated_buffer=False)
def test_compiled_models(compiled: Callable[[Net, str], nn.Module], backend: str) -> None:
    plain, model = Net().double(), compiled(Net().double(), backend)
    engine = Engine(model, batch_dim=0)
    for samples in (6, 6, 4):
        x = torch.randn(samples, 3, dtype=torch.float64)
        expected = plain(x).square().sum(1)
        # No warning: every layer has its closed form, as without the compiler.
        found = engine.compute_gramian(model(x).square().sum(1))
        assert relative_error(found, gramian(expected, plain.parameters())) <= 1e-10
        model.zero_grad()
        weights = engine.backward(model(x).square().sum(1), UPGradWeighting())
        rows = jacobian(expected, plain.parameters())
        assert relative_error(flat_grad(model.parameters()), weights @ rows) <= 1e-10


def test_donated_buffers_are_refused_with_the_fix() -> None:
    model = _whole(Net().double(), "aot_eager")
    engine = Engine(model, batch_dim=0)
    with pytest.raises(UnsupportedModelError, match="donated_buffer = False"):
        for samples in (6, 4, 5):  # sizes that vary are compiled with buffers to give away
            engine.compute_gramian(model(torch.randn(samples, 3).double()).square().sum(1))


def test_a_compiled_function_around_the_model() -> None:
    plain, model = Net().double(), Net().double()
    engine = Engine(model, batch_dim=0)
    losses = torch.compile(lambda x: model(x).square().sum(1), backend="eager")
    x = torch.randn(6, 3, dtype=torch.float64)
    expected = gramian(plain(x).square().sum(1), plain.parameters())
    assert relative_error(engine.compute_gramian(losses(x)), expected) <= 1e-10


def test_a_copy_of_a_hooked_model_can_be_compiled() -> None:
    model = Net().double()
    engine = Engine(model, batch_dim=0)
    x = torch.randn(6, 3, dtype=torch.float64)
    copied = torch.compile(copy.deepcopy(model), backend="eager")
    assert torch.equal(copied(x), model(x))
    del engine
