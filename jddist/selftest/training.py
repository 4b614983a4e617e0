"""Small models trained on all ranks, against one process on the whole batch.

The reference is slow and obvious: every row of the Jacobian by a backward pass of its own, in
float64, on every rank. The batch is split unevenly, and with three ranks or more one has nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from jddist.aggregation import Aggregator, MoCo, UPGrad, UPGradWeighting
from jddist.autogram import Engine
from jddist.autojac import jac_to_grad, mtl_backward
from jddist.distribution import attach
from jddist.errors import NonFiniteObjectiveError
from jddist.verify import _rows_one_by_one

from .checks import Check, Finding
from .ranks import Ranks
from .wrappers import WRAPPERS, Wrapper

_FEATURES, _TASKS, _STEPS, _RATE = 5, 4, 3, 0.05
# With many ranks the brute-force rows would take long: later ranks then have no samples.
_MOST_SAMPLES = 64


class _Network(nn.Module):
    """Dense layers, a norm, and a layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(_FEATURES, 7)
        self.norm = nn.LayerNorm(7)
        self.twice = nn.Linear(7, 7)
        self.last = nn.Linear(7, _TASKS)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.norm(self.first(x)))
        return self.last(torch.tanh(self.twice(torch.tanh(self.twice(hidden)))))


@dataclass(frozen=True)
class _Run:
    """What training left behind.

    Attributes:
        weights: Of the objectives, at each step; empty for an aggregator without any.
        parameters: All of them in one vector, at the end.
    """

    weights: list[Tensor]
    parameters: Tensor


def training_checks(wrappers: Sequence[str]) -> list[Check]:
    """The checks of all methods for each of the wrappers."""
    methods: dict[str, Callable[[Ranks, Wrapper], Finding]] = {
        "per sample, UPGrad": _per_sample,
        "per task, uneven, UPGrad": _per_task,
        "per task by rows, MoCo (state)": _by_rows,
    }

    def check(method: str, name: str) -> Check:
        return Check(f"{name}: {method}", lambda ranks: _with_wrapper(methods[method], ranks, name))

    found = [check(method, name) for name in wrappers for method in methods]
    return [*found, Check("NaN on the last rank is named on all", _errors_reach_all)]


def _with_wrapper(method: Callable[[Ranks, Wrapper], Finding], ranks: Ranks, name: str) -> Finding:
    wrapper = WRAPPERS[name](ranks)
    if wrapper.unavailable:
        return Finding(skipped=wrapper.unavailable)
    return method(ranks, wrapper)


def split(size: int) -> list[int]:
    """How many samples each rank has."""
    sizes = [1 + rank % 3 for rank in range(size)]
    if size >= 3:
        sizes[size // 2] = 0
    if size == 1:
        sizes = [5]
    for rank in range(size):
        sizes[rank] = min(sizes[rank], max(0, _MOST_SAMPLES - sum(sizes[:rank])))
    return sizes


def _network(device: torch.device, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The same numbers, which float32 holds exactly, in any dtype."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _Network().to(device, dtype)


def _data(ranks: Ranks) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs and targets of every rank, the same everywhere."""
    generator = torch.Generator().manual_seed(1)
    sizes = split(ranks.size)
    shape = (sum(sizes), _FEATURES + _TASKS)
    both = torch.randn(shape, generator=generator).to(ranks.device, torch.float64)
    return list(both[:, :_FEATURES].split(sizes)), list(both[:, _FEATURES:].split(sizes))


def _sample_losses(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().sum(dim=1)


def _task_losses(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean(dim=0)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    whole = [t.full_tensor() if isinstance(t, DTensor) else t for t in tensors]
    return torch.cat([t.detach().reshape(-1) for t in whole])


def _reference(
    ranks: Ranks, losses: Callable[[Tensor, Tensor], Tensor], aggregator: Aggregator
) -> _Run:
    """One process on the samples of all ranks."""
    model = _network(ranks.device)
    parameters: list[Tensor] = list(model.parameters())
    x, y = (torch.cat(parts) for parts in _data(ranks))
    weights = []
    for _ in range(_STEPS):
        rows = _rows_one_by_one(losses(model(x), y), parameters)
        if isinstance(aggregator, UPGrad):
            weights.append(UPGradWeighting()(rows @ rows.T))
            update = weights[-1] @ rows
        else:
            update = aggregator(rows)
        parts = update.split([p.numel() for p in parameters])
        with torch.no_grad():
            for parameter, part in zip(parameters, parts, strict=True):
                parameter.sub_(part.view_as(parameter), alpha=_RATE)
    return _Run(weights, _flat(parameters))


def _compare(found: _Run, expected: _Run, tolerance: float) -> Finding:
    pairs = [*zip(found.weights, expected.weights, strict=True)]
    pairs.append((found.parameters, expected.parameters))
    error = max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)
    return Finding(error, tolerance, same=_digest([*found.weights, found.parameters]))


def _digest(tensors: Sequence[Tensor]) -> str:
    """The same for tensors that are equal bit by bit."""
    digest = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _train(
    ranks: Ranks, wrapper: Wrapper, step: Callable[[nn.Module, Tensor, Tensor], Tensor | None]
) -> _Run:
    model = wrapper.model
    x, y = (parts[ranks.rank].to(wrapper.dtype) for parts in _data(ranks))
    weights = []
    for _ in range(_STEPS):
        found = step(model, x, y)
        if found is not None:
            weights.append(found)
        wrapper.update()
    return _Run(weights, _flat(wrapper.parameters()))


def _per_sample(ranks: Ranks, wrapper: Wrapper) -> Finding:
    wrapper.wrap(_network(ranks.device, wrapper.dtype), _RATE)
    engine = Engine(wrapper.model, batch_dim=0)

    def step(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return engine.backward(_sample_losses(model(x), y), UPGradWeighting())

    expected = _reference(ranks, _sample_losses, UPGrad())
    return _compare(_train(ranks, wrapper, step), expected, wrapper.tolerance)


def _per_task(ranks: Ranks, wrapper: Wrapper) -> Finding:
    wrapper.wrap(_network(ranks.device, wrapper.dtype), _RATE)
    engine = Engine(wrapper.model, batch_dim=None)

    def step(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return engine.backward(_task_losses(model(x), y), UPGradWeighting(), count=len(x))

    expected = _reference(ranks, _task_losses, UPGrad())
    return _compare(_train(ranks, wrapper, step), expected, wrapper.tolerance)


def _by_rows(ranks: Ranks, wrapper: Wrapper) -> Finding:
    wrapper.wrap(_network(ranks.device, wrapper.dtype), _RATE)
    attach(wrapper.model)
    aggregator = MoCo()  # what it remembers is as large as J, and lies in column shards

    def step(model: nn.Module, x: Tensor, y: Tensor) -> None:
        output = model(x)
        mtl_backward(list(_task_losses(output, y)), features=output, count=len(x))
        jac_to_grad(model.parameters(), aggregator)

    expected = _reference(ranks, _task_losses, MoCo())
    return _compare(_train(ranks, wrapper, step), expected, wrapper.tolerance)


def _errors_reach_all(ranks: Ranks) -> Finding:
    wrapper = WRAPPERS["ddp"](ranks)
    wrapper.wrap(_network(ranks.device), _RATE)
    engine = Engine(wrapper.model, batch_dim=0)
    x = torch.ones(2, _FEATURES, dtype=torch.float64, device=ranks.device)
    if ranks.rank == ranks.size - 1:
        x[1] = float("nan")
    losses = wrapper.model(x).sum(dim=1)
    try:
        engine.backward(losses, UPGradWeighting())
    except NonFiniteObjectiveError as error:
        named = f"rank {ranks.size - 1}" in str(error) or ranks.size == 1
        written = any(p.grad is not None for p in wrapper.parameters())
        return Finding(error=float(written or not named))
    return Finding(error=float("inf"))
