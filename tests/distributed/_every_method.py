"""Every public method in training, on whatever a strategy makes of a model: five steps each.

``train_together`` trains a small model for each method by the passes of one: their losses add up,
and every method aggregates the rows of its own model. ``train`` trains one by itself: what has a
weight for each objective takes its steps by turns through the engine and through rows, with one
state; what needs the Jacobian takes them all through rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import Partial, Placement, Shard

from jddist import attach
from jddist.aggregation import (
    Aggregator,
    GramianWeightedAggregator,
    MoDoWeighting,
    RowCountWeighting,
    SDMGradWeighting,
    WeightedAggregator,
    Weighting,
)
from jddist.autogram import Engine
from jddist.autojac import backward, jac_to_grad, jac_to_grad_groups, mtl_backward
from jddist.distribution.base import Distribution
from tests.distributed._methods import METHODS, state_losses
from tests.distributed._sharded import assign, rows_of, whole, whole_gradients, whole_parameters
from tests.distributed._training import (
    FEATURES,
    LOSSES,
    OPTIMIZERS,
    SAMPLES,
    STEPS,
    TASKS,
    make_data,
)

if TYPE_CHECKING:
    from tests.distributed._conformance import Setup

MAX_NORM = 0.5

# Of two batches' gradients, whose products the engine gives.
TWO_BATCHES: dict[str, Callable[[], Weighting[Tensor]]] = {
    "MoDo": MoDoWeighting,
    # With the usual steps of 10 its weights jump, and a rounding grows by 1e2 in every call.
    "SDMGrad": lambda: SDMGradWeighting(lr=0.1),
}

# How many objectives there are, the engine's batch_dim, and where the rows live.
KINDS: dict[str, tuple[int, int | None, Placement]] = {
    "task": (TASKS, None, Partial("avg")),
    "instance": (SAMPLES, 0, Shard(0)),
}

Found = dict[str, list[Tensor]]


class Small(nn.Module):
    """Two layers, of 6 and 4 lines: of the first, the last of four ranks holds nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, 6, bias=False)
        self.last = nn.Linear(6, TASKS, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


def make_small() -> Small:
    torch.manual_seed(7)
    return Small().double()


class Many(nn.Module):
    """A small model for each method, on the same data; the outputs are [methods, b, tasks]."""

    def __init__(self) -> None:
        super().__init__()
        for i in range(len(METHODS)):
            self.add_module(f"of{i}", Small())

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([model(x) for model in self.children()])


def make_many() -> Many:
    torch.manual_seed(8)
    return Many().double()


def weighting_of(aggregator: Aggregator) -> nn.Module | None:
    """What the engine can take in place of an aggregator, if it needs no Jacobian."""
    if isinstance(aggregator, GramianWeightedAggregator):
        return aggregator.gramian_weighting
    if not isinstance(aggregator, WeightedAggregator):
        return None
    parts = [m for m in aggregator.weighting.modules() if hasattr(m, "needs_jacobian")]
    if any(part.needs_jacobian for part in parts):
        return None
    counts = any(isinstance(part, RowCountWeighting) for part in parts)
    return aggregator.weighting if counts else None


def global_losses(losses: Tensor, mine: Tensor, distribution: Distribution) -> Tensor:
    """All ranks' losses, of the samples that are ``mine`` and of those of the others."""
    if distribution.objectives == Shard(0):
        values = losses.new_zeros(SAMPLES)
        values[mine] = losses.detach()
    else:
        values = losses.detach().nan_to_num() * len(mine) / SAMPLES
    if distribution.group.size > 1:
        dist.all_reduce(values, group=distribution.group.process_group)
    return values


def _state(module: nn.Module) -> list[Tensor]:
    """All tensors of a method's state, whole."""
    found = []
    for entry in module.state_dict().values():
        values = entry.values() if isinstance(entry, dict) else [entry]
        found += [whole(v).double().reshape(-1) for v in values if isinstance(v, Tensor)]
    return found


def train_together(setup: Setup, kind: str) -> Found:
    """Five steps of all methods on this rank's part of the batch."""
    m, _, placement = KINDS[kind]
    aggregators = [method.of(m) for method in METHODS.values()]
    many = make_many()
    model = setup.place(many)
    groups = [list(small.parameters()) for small in many.children()]
    distribution = attach(model, objectives=placement)
    optimizer = OPTIMIZERS["sgd"](list(model.parameters()))
    x, y = (setup.part(t) for t in make_data())
    mine = setup.part(torch.arange(SAMPLES))
    found: Found = {}
    for step in range(STEPS):
        outputs = model(x)
        losses = torch.stack([LOSSES[kind](output, y) for output in outputs])
        torch.manual_seed(step)
        optimizer.zero_grad()
        if kind == "task":
            nothing: list[list[Tensor]] = [[]] * TASKS
            total = list(losses.sum(dim=0))
            mtl_backward(total, features=outputs, tasks_params=nothing, count=len(x))
        else:
            backward(losses.sum(dim=0))
        for aggregator, of_model in zip(aggregators, losses, strict=True):
            state_losses(aggregator, global_losses(of_model, mine, distribution))
        weights = jac_to_grad_groups(groups, aggregators)
        whole_gradients(model)
        for group in groups:
            torch.nn.utils.clip_grad_norm_(group, MAX_NORM)
        optimizer.step()
        for name, small, aggregator, w in zip(
            METHODS, many.children(), aggregators, weights, strict=True
        ):
            entry = found.setdefault(name, [])
            entry += [whole_parameters(small), *_state(aggregator)]
            entry += [] if w is None else [w]
    return found | {"random numbers": [torch.get_rng_state().double()]}


@cache
def reference_together(kind: str) -> Found:
    """The same in one process, from the whole Jacobians."""
    m, _, _ = KINDS[kind]
    aggregators = [method.of(m) for method in METHODS.values()]
    model, (x, y) = make_many(), make_data()
    optimizer = OPTIMIZERS["sgd"](list(model.parameters()))
    parts = list(zip(METHODS, model.children(), aggregators, strict=True))
    # Where there are many groups, weightings of Gramians draw first.
    in_turn = sorted(parts, key=lambda part: not isinstance(part[2], GramianWeightedAggregator))
    expected: Found = {name: [] for name in METHODS}
    for step in range(STEPS):
        torch.manual_seed(step)
        for name, small, aggregator in in_turn:
            losses = LOSSES[kind](small(x), y)
            state_losses(aggregator, losses)
            weights: list[Tensor] = []
            with _weights_of(aggregator, weights):
                assign(small, aggregator(rows_of(losses, small)))
            torch.nn.utils.clip_grad_norm_(small.parameters(), MAX_NORM)
            expected[name] += [*_state(aggregator), *weights]
        optimizer.step()
        for name, small, aggregator in parts:
            kept = expected[name]
            added = len(_state(aggregator)) + isinstance(aggregator, WeightedAggregator)
            kept.insert(len(kept) - added, whole_parameters(small))
    return expected | {"random numbers": [torch.get_rng_state().double()]}


@contextmanager
def _weights_of(aggregator: Aggregator, weights: list[Tensor]) -> Iterator[None]:
    """Inside, the weights that an aggregator finds are kept."""
    if not isinstance(aggregator, WeightedAggregator):
        yield
        return
    handle = aggregator.weighting.register_forward_hook(lambda *args: weights.append(args[-1]))
    try:
        yield
    finally:
        handle.remove()


def train(setup: Setup, kind: str, name: str) -> Found:
    """Five steps of one method on this rank's part of the batch."""
    m, batch_dim, placement = KINDS[kind]
    aggregator = METHODS[name].of(m)
    weighting = weighting_of(aggregator)
    model = setup.place(make_small())
    engine = Engine(model, batch_dim=batch_dim)
    distribution = attach(model, objectives=placement)
    trained = list(model.parameters())
    optimizer = OPTIMIZERS["sgd"](trained)
    x, y = (setup.part(t) for t in make_data())
    count = len(x) if kind == "task" else None
    mine = setup.part(torch.arange(SAMPLES))
    found: Found = {"parameters": [], "state": [], "weights": []}
    for step in range(STEPS):
        output = model(x)
        losses = LOSSES[kind](output, y)
        torch.manual_seed(step)
        state_losses(aggregator, global_losses(losses, mine, distribution))
        optimizer.zero_grad()
        if weighting is not None and step % 2 == 0:
            found["weights"].append(engine.backward(losses, weighting, count=count))
        else:
            if kind == "task":
                nothing: list[list[Tensor]] = [[]] * TASKS
                mtl_backward(list(losses), features=output, tasks_params=nothing, count=count)
            else:
                backward(losses)
            weights = jac_to_grad(trained, aggregator)
            found["weights"] += [] if weights is None else [weights]
        whole_gradients(model)
        torch.nn.utils.clip_grad_norm_(trained, MAX_NORM)
        optimizer.step()
        found["parameters"].append(whole_parameters(model))
        found["state"] += _state(aggregator)
    found["state"].append(torch.get_rng_state().double())
    return found


def reference(kind: str, name: str) -> Found:
    """The same in one process, from the whole Jacobian."""
    m, _, _ = KINDS[kind]
    aggregator, model, (x, y) = METHODS[name].of(m), make_small(), make_data()
    optimizer = OPTIMIZERS["sgd"](list(model.parameters()))
    expected: Found = {"parameters": [], "state": [], "weights": []}
    for step in range(STEPS):
        losses = LOSSES[kind](model(x), y)
        rows = rows_of(losses, model)
        torch.manual_seed(step)
        state_losses(aggregator, losses)
        with _weights_of(aggregator, expected["weights"]):
            assign(model, aggregator(rows))
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        expected["parameters"].append(whole_parameters(model))
        expected["state"] += _state(aggregator)
    expected["state"].append(torch.get_rng_state().double())
    return expected


def train_on_two_batches(setup: Setup, name: str) -> Found:
    """Weights from the products of two batches' rows, which serve a third."""
    weighting = TWO_BATCHES[name]()
    model = setup.place(make_small())
    engine = Engine(model, batch_dim=None)
    optimizer = OPTIMIZERS["sgd"](list(model.parameters()))
    data = make_data()
    found: Found = {"parameters": [], "state": [], "weights": []}
    for _ in range(STEPS):
        first, second, third = (_losses_of(model, data, i, setup) for i in range(3))
        counts = (first[1], second[1])
        products = engine.cross_gramian(first[0], second[0], counts=counts)
        weights = engine.compute_weights(products, weighting)
        optimizer.zero_grad()
        engine.backward(third[0], weights, count=third[1])
        optimizer.step()
        found["weights"].append(weights)
        found["parameters"].append(whole_parameters(model))
        found["state"] += _state(weighting)
    return found


def _losses_of(model: nn.Module, data: Any, i: int, setup: Setup | None) -> tuple[Tensor, int]:
    x, y = (t.roll(i, 0)[i:] * (1 + 0.2 * i) for t in data)
    if setup is not None:
        x, y = setup.part(x), setup.part(y)
    return LOSSES["task"](model(x), y), len(x)


@cache
def reference_of_two_batches(name: str) -> Found:
    """The same in one process."""
    weighting, model, data = TWO_BATCHES[name](), make_small(), make_data()
    optimizer = OPTIMIZERS["sgd"](list(model.parameters()))
    expected: Found = {"parameters": [], "state": [], "weights": []}
    for _ in range(STEPS):
        rows = [rows_of(_losses_of(model, data, i, None)[0], model) for i in range(3)]
        weights = weighting(rows[0] @ rows[1].T)
        assign(model, weights @ rows[2])
        optimizer.step()
        expected["weights"].append(weights)
        expected["parameters"].append(whole_parameters(model))
        expected["state"] += _state(weighting)
    return expected


def train_all(setup: Setup, kind: str) -> Found:
    """What all methods find, by method and quantity."""
    return {f"{n}, {k}": v for n in METHODS for k, v in train(setup, kind, n).items()}


@cache
def reference_of_all(kind: str) -> Found:
    """The same in one process."""
    return {f"{n}, {k}": v for n in METHODS for k, v in reference(kind, n).items()}
