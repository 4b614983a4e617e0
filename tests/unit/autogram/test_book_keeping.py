"""When the weighted gradient comes from the rows, when from a backward; the result is the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import Partial

from jddist.autogram import Engine
from jddist.autogram import step as step_module
from tests._oracle import flat_grad, relative_error, weighted_gradient
from tests.cases import CASES, Case
from tests.unit.autogram._common import data, losses_of, small_model

STEPS = 7  # the engine checks itself, and differentiates, at the 1st, 2nd and 4th


@pytest.fixture
def combined(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one entry at each step that combines rows."""
    steps: list[int] = []
    original = step_module.combined

    def spied(*args: Any) -> Any:
        steps.append(len(steps))
        return original(*args)

    monkeypatch.setattr(step_module, "combined", spied)
    return steps


BATCHED = [
    pytest.param(case, id=case.name)
    for case in CASES
    if case.batch_dim_ok
    and not case.announced
    and case.losses(case.model(), case.batch(2)).ndim == 1
]


@pytest.mark.parametrize("case", BATCHED)
@pytest.mark.parametrize("budget", [0, 1 << 28], ids=["no_memory", "memory"])
def test_the_zoo(case: Case, budget: int, combined: list[int]) -> None:
    """With rows held for the gradient, and without."""
    model, untouched = case.model(), case.model()
    engine = Engine(model, batch_dim=0, memory_budget=budget)
    for step in range(3):
        model.zero_grad()
        torch.manual_seed(step)
        losses = case.losses(model, case.batch(5, step))
        torch.manual_seed(step)
        reference = case.losses(untouched, case.batch(5, step))
        weights = torch.randn(losses.shape, dtype=torch.float64)
        engine.backward(losses, lambda _g, w=weights: w)
        expected = weighted_gradient(reference, weights, untouched.parameters())
        # Sums of the same products in another order; Llama computes its norms in float32.
        bound = 1e-12 if case.tolerance <= 1e-10 else case.tolerance
        assert relative_error(flat_grad(model.parameters()), expected) <= bound
    assert len(combined) == 1


def _step(engine: Engine, model: nn.Module, losses: Tensor) -> None:
    weights = torch.randn(len(losses), dtype=torch.float64)
    parameters = list(model.parameters())
    expected = flat_grad(parameters) + weighted_gradient(losses, weights, parameters)
    engine.backward(losses, lambda _g: weights)
    assert relative_error(flat_grad(parameters), expected) <= 1e-12


def test_gradients_accumulate_in_place(combined: list[int]) -> None:
    model = small_model()
    engine = Engine(model, batch_dim=0)
    _step(engine, model, losses_of(model(data())))
    before = [p.grad for p in model.parameters()]
    for _ in range(STEPS - 1):
        _step(engine, model, losses_of(model(data())))
    assert all(p.grad is g for p, g in zip(model.parameters(), before, strict=True))
    assert len(combined) == 4


def test_gradients_have_the_parameters_layout(combined: list[int]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Linear(16, 2))
    model.double().to(memory_format=torch.channels_last)
    engine = Engine(model, batch_dim=0)
    for _ in range(3):
        model.zero_grad()
        x = torch.randn(3, 3, 3, 3, dtype=torch.float64)
        _step(engine, model, losses_of(model(x)))
        assert model[0].weight.grad.stride() == model[0].weight.stride()
    assert len(combined) == 1


def _parameter_hook(model: nn.Module, seen: list[str]) -> None:
    model[0].weight.register_hook(lambda _g: seen.append("hook"))


def _after_accumulation(model: nn.Module, seen: list[str]) -> None:
    model[0].weight.register_post_accumulate_grad_hook(lambda _p: seen.append("hook"))


def _module_hook(model: nn.Module, seen: list[str]) -> None:
    model[3].register_full_backward_hook(lambda *_: seen.append("hook"))


@pytest.mark.parametrize("hook", [_parameter_hook, _after_accumulation, _module_hook])
def test_hooks_get_their_backward(
    hook: Callable[[nn.Module, list[str]], None], combined: list[int]
) -> None:
    model = small_model()
    seen: list[str] = []
    hook(model, seen)
    engine = Engine(model, batch_dim=0)
    for step in range(3):
        seen.clear()
        losses = losses_of(model(data()))
        engine.backward(losses, lambda g: g.diagonal())
        assert seen, step
    assert not combined


def test_other_leaves_get_their_gradient(combined: list[int]) -> None:
    model, outside = small_model(), nn.Linear(6, 6).double()
    engine = Engine(model, batch_dim=0)
    for _ in range(3):
        x = data().requires_grad_()
        outside.zero_grad()
        losses = losses_of(model(outside(x)))
        engine.backward(losses, lambda g: g.diagonal())
        assert x.grad is not None and x.grad.any()
        assert outside.weight.grad is not None and outside.weight.grad.any()
    assert not combined


def test_given_weights_need_no_rows(combined: list[int]) -> None:
    model = small_model()
    engine = Engine(model, batch_dim=0)
    for _ in range(3):
        engine.backward(losses_of(model(data())), torch.ones(4, dtype=torch.float64))
    assert not combined


@pytest.mark.parametrize("count", [None, 4])
@pytest.mark.parametrize("batch_dim", [0, None])
def test_a_retained_graph_is_there_for_the_next_step(
    batch_dim: int | None, count: int | None
) -> None:
    model = small_model()
    engine = Engine(model, batch_dim=batch_dim, objectives=Partial("avg"))
    losses = losses_of(model(data()))
    for _ in range(STEPS):
        weights = torch.randn(len(losses), dtype=torch.float64)
        model.zero_grad()
        expected = weighted_gradient(losses, weights, model.parameters())
        engine.backward(losses, lambda _g, w=weights: w, retain_graph=True, count=count)
        assert relative_error(flat_grad(model.parameters()), expected) <= 1e-12


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # the data has no gradient
def test_hooks_on_all_modules_get_their_backward(combined: list[int]) -> None:
    model = small_model()
    engine = Engine(model, batch_dim=0)
    handle = torch.nn.modules.module.register_module_full_backward_hook(lambda *_: None)
    try:
        for _ in range(3):
            engine.backward(losses_of(model(data())), lambda g: g.diagonal())
    finally:
        handle.remove()
    assert not combined


def test_the_graph_is_freed_and_says_so() -> None:
    model = small_model()
    engine = Engine(model, batch_dim=0)
    for _ in range(3):
        losses = losses_of(model(data()))
        engine.backward(losses, lambda g: g.diagonal())
    with pytest.raises(RuntimeError, match="second time"):
        losses.sum().backward()


def test_a_failed_weighting_leaves_the_next_step_alone(combined: list[int]) -> None:
    model = small_model()
    engine = Engine(model, batch_dim=0)

    def fail(_gramian: Tensor) -> Tensor:
        raise ZeroDivisionError

    for _ in range(4):
        with pytest.raises(ZeroDivisionError):
            engine.backward(losses_of(model(data())), fail)
        assert not flat_grad(model.parameters()).any()
    _step(engine, model, losses_of(model(data())))
    assert len(combined) == 1


def test_changed_weights_and_batch_sizes(combined: list[int]) -> None:
    """Held memory is used again for the same sizes, and for no others."""
    model = nn.Sequential(
        nn.Unflatten(1, (6, 1)), nn.Conv1d(6, 40, 1), nn.Flatten(), nn.Linear(40, 3)
    ).double()
    engine = Engine(model, batch_dim=0)
    for size in (4, 4, 4, 5, 3, 4, 5, 3):
        model.zero_grad()
        _step(engine, model, losses_of(model(data(size))))
    assert combined
