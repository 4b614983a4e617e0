"""Random combinations of model, layout and ranks against the brute-force oracle."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Shard
from torch.nn.parallel import DistributedDataParallel

from jddist.aggregation import Flattening, UPGradWeighting
from jddist.autogram import Engine
from tests._oracle import jacobian, relative_error
from tests._ranks import run_ranks
from tests.distributed._sharded import make_mesh

BOUND = 1e-10
FEATURES, TASKS, LENGTH = 4, 3, 3
BLOCKS = ("linear", "tied", "conv", "norm", "attention", "embedding", "own", "frozen", "branch")


class Block(nn.Module):
    """One kind of layer, from [b, LENGTH, FEATURES] to the same."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first = nn.Linear(FEATURES, FEATURES)
        if kind == "conv":
            self.first = nn.Conv1d(LENGTH, LENGTH, 3, padding=1)
        elif kind == "norm":
            self.first = nn.LayerNorm(FEATURES)
        elif kind == "attention":
            self.first = nn.MultiheadAttention(FEATURES, 2, batch_first=True)
        elif kind == "embedding":
            self.first = nn.Embedding(5, FEATURES)
        elif kind == "own":
            self.scale = nn.Parameter(torch.randn(FEATURES))
        elif kind == "frozen":
            self.second = nn.Linear(FEATURES, FEATURES, bias=False)
            self.first.requires_grad_(False)
        elif kind == "branch":
            self.second = nn.Linear(FEATURES, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "attention":
            return x + self.first(x, x, x, need_weights=False)[0]
        if self.kind == "embedding":
            return x + self.first((x.detach().abs().sum(-1) * 7).long() % 5)
        if self.kind == "tied":
            return self.first(torch.tanh(self.first(x)))
        if self.kind == "own":
            return self.first(x) * self.scale
        if self.kind == "frozen":
            return self.second(torch.tanh(self.first(x)))
        if self.kind == "branch":
            return torch.tanh(self.first(x)) + self.second(x)
        return torch.tanh(self.first(x))


class Model(nn.Module):
    def __init__(self, kinds: list[str], number: int) -> None:
        super().__init__()
        torch.manual_seed(number)
        self.blocks = nn.ModuleList(Block(kind) for kind in kinds)
        self.last = nn.Linear(LENGTH * FEATURES, TASKS)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.last(x.flatten(1))


@dataclass
class Case:
    """What is drawn.

    Attributes:
        kinds: The model's layers.
        number: The seed of its parameters and data.
        sizes: The samples of each rank.
        wrapper: "ddp" or "fully_shard".
        objectives: "sample", "sample x task", "task avg", "task counted" or "task sum".
        batched: Whether the engine is told of the batch dimension.
        form: Whether ``engine.backward`` is called, or the steps that it consists of.
        options: Of DDP.
    """

    kinds: list[str]
    number: int
    sizes: list[int]
    wrapper: str
    objectives: str
    batched: bool
    form: str
    options: dict[str, bool] = field(default_factory=dict)


def cases(world_size: int) -> st.SearchStrategy[dict[str, Any]]:
    sizes = st.lists(st.integers(0, 4), min_size=world_size, max_size=world_size)
    return st.fixed_dictionaries(
        {
            "kinds": st.lists(st.sampled_from(BLOCKS), min_size=0, max_size=3),
            "number": st.integers(0, 10_000),
            "sizes": sizes.filter(lambda s: sum(s) > 0),
            "wrapper": st.sampled_from(["ddp", "ddp", "fully_shard"]),
            "objectives": st.sampled_from(
                ["sample", "sample x task", "task avg", "task counted", "task sum"]
            ),
            "batched": st.booleans(),
            "form": st.sampled_from(["backward", "steps"]),
            "options": st.fixed_dictionaries(
                {
                    "gradient_as_bucket_view": st.booleans(),
                    "find_unused_parameters": st.booleans(),
                }
            ),
        }
    )


def _draw(world_size: int, count: int) -> list[dict[str, Any]]:
    """The same combinations at every run."""
    found: list[dict[str, Any]] = []

    @seed(world_size)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases(world_size))
    def collect(case: dict[str, Any]) -> None:
        found.append(case)

    collect()
    return found


def _losses(out: Tensor, y: Tensor, objectives: str) -> Tensor:
    errors = (out - y).square()
    if objectives == "sample":
        return errors.sum(dim=1)
    if objectives == "sample x task":
        return errors
    if objectives == "task sum":
        return errors.sum(dim=0)
    return errors.sum(dim=0) / max(1, len(errors))  # the mean; 0 of no samples


def _placement(objectives: str) -> Placement:
    if objectives.startswith("sample"):
        return Shard(0)
    return Partial("sum" if objectives == "task sum" else "avg")


def _data(case: Case) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(case.number)
    total = sum(case.sizes)
    x = torch.randn(total, LENGTH, FEATURES, generator=generator, dtype=torch.float64)
    y = torch.randn(total, TASKS, generator=generator, dtype=torch.float64)
    return x, y


def _expected(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Gramian, weights and gradient of one process that has all samples, by brute force."""
    model = Model(case.kinds, case.number)
    x, y = _data(case)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if case.objectives == "task avg":  # the mean over ranks of their means
        parts = zip(x.split(case.sizes), y.split(case.sizes), strict=True)
        rows = [jacobian(_losses(model(a), b, case.objectives), parameters) for a, b in parts]
        joined = torch.stack(rows).mean(dim=0)
    else:
        joined = jacobian(_losses(model(x), y, case.objectives), parameters)
    gramian = joined @ joined.T
    weights = UPGradWeighting()(gramian)
    return gramian, weights, weights @ joined


def _found(case: Case, rank: int, world_size: int) -> tuple[Tensor, Tensor, Tensor]:
    model = Model(case.kinds, case.number)
    wrapped: nn.Module = model
    if case.wrapper == "ddp":
        wrapped = DistributedDataParallel(model, **case.options)
    else:
        mesh = make_mesh()
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    x, y = (t.split(case.sizes)[rank] for t in _data(case))
    sharded = case.objectives.startswith("sample")
    batched = case.batched and sharded
    placement = _placement(case.objectives)
    engine = Engine(wrapped, batch_dim=0 if batched else None, objectives=placement)
    count = case.sizes[rank] if case.objectives == "task counted" else None
    weighting = Flattening(UPGradWeighting())
    losses = _losses(wrapped(x), y, case.objectives)
    if case.form == "steps":
        gramian = engine.compute_gramian(losses, count=count)
        weights = engine.compute_weights(gramian, weighting)
        losses.backward(engine.local_weights(weights))
    else:
        seen: list[Tensor] = []

        def weigh(gramian: Tensor) -> Tensor:
            seen.append(gramian.clone())
            return weighting(gramian)

        weights = engine.backward(losses, weigh, count=count)
        gramian = seen[0] if seen else torch.empty(0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradient = []
    for p in parameters:
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        gradient.append((grad.full_tensor() if isinstance(grad, DTensor) else grad).reshape(-1))
    m = weights.numel()
    half = gramian.ndim // 2
    if gramian.numel():
        forward = [*range(half), *reversed(range(half, 2 * half))]
        gramian = gramian.permute(forward).reshape(m, m)
    return gramian, weights.reshape(-1), torch.cat(gradient)


def _run(rank: int, world_size: int, drawn: list[dict[str, Any]]) -> list[list[Tensor]]:
    results = []
    for content in drawn:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # slow ways, uneven batches, unused parameters
            results.append([t.detach().clone() for t in _found(Case(**content), rank, world_size)])
    return results


def _check(world_size: int, count: int) -> None:
    drawn = _draw(world_size, count)
    assert len(drawn) == count
    ranks = run_ranks(_run, world_size, drawn, timeout=60 + 2 * count)
    for i, content in enumerate(drawn):
        expected = _expected(Case(**content))
        for rank, results in enumerate(ranks):
            for name, found, wanted in zip(
                ("gramian", "weights", "gradient"), results[i], expected, strict=True
            ):
                if name == "gramian" and not found.numel():
                    continue  # seen on rank 0 alone
                error = relative_error(found, wanted)
                assert error <= BOUND, (name, error, rank, content)
            assert torch.equal(results[i][1], ranks[0][i][1]), content


SHARES = {1: 0.1, 2: 0.4, 3: 0.3, 4: 0.2}


@pytest.mark.parametrize("world_size", SHARES)
def test_combinations(world_size: int) -> None:
    _check(world_size, int(40 * SHARES[world_size]))


@pytest.mark.slow
@pytest.mark.parametrize("world_size", SHARES)
def test_five_hundred_combinations(world_size: int) -> None:
    _check(world_size, int(500 * SHARES[world_size]))
