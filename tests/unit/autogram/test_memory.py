"""What an engine holds while it works, by counting: bytes of live tensors, never time."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from jddist.autogram import Engine
from jddist.autogram.blocks import JacobianBlock, OuterBlock
from jddist.autogram.record import LayerRecord
from jddist.autogram.rules import registry
from jddist.autogram.self_check import _PIECE, _distance, _norm
from tests._oracle import gramian, relative_error
from tests.benchmark.models import Transformer, cnn, mlp
from tests.unit.autogram._common import data, losses_of

STEADY = 3  # the first step that is not checked


def peak_bytes(call: Callable[[], object]) -> int:
    """By how much the bytes of live CPU tensors grow during the call, at most."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


class Probed(nn.Linear):
    """A Linear whose rule notes how many of the gradients that it was given are still alive."""


@contextmanager
def probed(seen: list[int]) -> Iterator[None]:
    """Within this context a rule for Probed appends to ``seen`` at each call."""
    given: list[weakref.ref[Tensor]] = []

    def rule(record: LayerRecord) -> dict[str, JacobianBlock] | None:
        (grads,) = record.grads
        assert grads is not None
        seen.append(sum(r() is not None for r in given))
        base = grads if grads._base is None else grads._base
        given.append(weakref.ref(base))
        g = grads.transpose(0, 1).unsqueeze(2)
        return {"weight": OuterBlock(record.input.unsqueeze(1), g)}

    registry.register_rule(Probed, overwrite=True)(rule)
    try:
        yield
    finally:
        del registry._rules[Probed]


def probes(count: int = 6) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Sequential(Probed(6, 6, bias=False), nn.Tanh()) for _ in range(count)]
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("step", ["compute_gramian", "backward"])
def test_gradients_of_outputs_are_let_go_of_layer_by_layer(step: str) -> None:
    """Also at the steps that are checked; only a step that combines rows keeps them."""
    seen: list[int] = []
    with probed(seen):
        model = probes()
        engine = Engine(model, batch_dim=0)
        for i in range(STEADY):
            seen.clear()
            losses = losses_of(model(data()))
            if step == "compute_gramian":
                engine.compute_gramian(losses)
            else:
                engine.backward(losses, lambda g: g.diagonal())
            keeps = step == "backward" and i + 1 == STEADY
            assert len(seen) == 6
            assert max(seen) == (5 if keeps else 0), (i, seen)


def test_a_rule_that_raises_leaves_the_graph_as_it_was() -> None:
    model = probes(3)

    def broken(record: LayerRecord) -> dict[str, JacobianBlock] | None:
        raise ValueError("not today")

    registry.register_rule(Probed, overwrite=True)(broken)
    try:
        engine = Engine(model, batch_dim=0)
        losses = losses_of(model(data()))
        with pytest.raises(ValueError, match="not today"):
            engine.compute_gramian(losses)
        with pytest.raises(ValueError, match="not today"):
            Engine(model, batch_dim=0).compute_gramian(losses)
    finally:
        del registry._rules[Probed]
    plain = Engine(model, batch_dim=0)
    found = plain.compute_gramian(losses)
    assert relative_error(found, gramian(losses, model.parameters())) <= 1e-10
    losses.sum().backward()  # no hook of the first two is left on it


def test_hooks_on_activations_count() -> None:
    """The rows are those that autograd gives, with whatever a hook did to the gradient."""
    torch.manual_seed(0)
    first, second = nn.Linear(6, 5).double(), nn.Linear(5, 3).double()
    model = nn.Sequential(first, nn.Tanh(), second)
    engine = Engine(model, batch_dim=0)
    hidden = first(data())
    hidden.register_hook(lambda g: 3 * g)
    out = second(hidden.tanh())
    out.register_hook(lambda g: 2 * g)
    losses = losses_of(out)
    found = engine.compute_gramian(losses)
    assert relative_error(found, gramian(losses, model.parameters())) <= 1e-10


def _transformer() -> tuple[nn.Module, Tensor]:
    return Transformer(64, blocks=6), torch.randint(1000, (8, 64))


def _mlp() -> tuple[nn.Module, Tensor]:
    return mlp(), torch.randn(256, 784)


def _cnn() -> tuple[nn.Module, Tensor]:
    return cnn(), torch.randn(16, 3, 32, 32)


# Peak of a checked step, of one that combines rows, and of compute_gramian with a backward of its
# own, over that of a plain step.
BOUNDS = [
    pytest.param(_transformer, (1.3, 1.15, 1.2), id="transformer"),
    pytest.param(_mlp, (2.2, 1.4, 1.4), id="mlp"),
    pytest.param(_cnn, (1.6, 1.4, 1.4), id="cnn"),
]


@pytest.mark.parametrize(("make", "bounds"), BOUNDS)
def test_peak_over_a_plain_step(
    make: Callable[[], tuple[nn.Module, Tensor]], bounds: tuple[float, float, float]
) -> None:
    torch.manual_seed(0)
    model, x = make()
    y = torch.randint(10, (len(x),))

    def losses() -> Tensor:
        return nn.functional.cross_entropy(model(x), y, reduction="none")

    def plain() -> None:
        losses().mean().backward()

    def step() -> None:
        engine.backward(losses(), lambda _g: weights)

    def second_backward() -> None:
        found = losses()
        engine.compute_gramian(found)
        found.backward(engine.local_weights(weights))

    def measured(call: Callable[[], None]) -> int:
        model.zero_grad()
        return peak_bytes(call)

    measured(plain)
    expected = measured(plain)
    engine = Engine(model, batch_dim=0, memory_budget=1 << 20)
    weights = torch.full((len(x),), 1 / len(x))
    steps = [measured(step) for _ in range(STEADY)]
    measured(second_backward)  # the fourth step is a checked one
    second = measured(second_backward)
    found = [p / expected for p in (max(steps[:2]), steps[2], second)]
    assert all(f <= b for f, b in zip(found, bounds, strict=True)), found


def test_distances_look_at_every_element() -> None:
    size = 2 * _PIECE + 17
    first = torch.randn(size)
    second = first.clone()
    second[-1] += 3
    assert _distance(first, first) == 0
    assert _distance(first, second) == pytest.approx(3)
    assert _distance(first, torch.zeros(())) == pytest.approx(_norm(first))
    assert _norm(first) == pytest.approx(float(first.double().norm()))
