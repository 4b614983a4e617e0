"""Objectives that are whole ranks: the hook takes the step of the oracle's rows, one per rank."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from jddist.aggregation import (
    IMTLG,
    Aggregator,
    ExcessMTL,
    GradDrop,
    Krum,
    Mean,
    MoCo,
    TrimmedMean,
    UPGrad,
)
from jddist.autogram import Engine
from jddist.errors import (
    LayoutMismatchError,
    NonFiniteObjectiveError,
    RankError,
    UnsupportedModelError,
)
from jddist.integrations.comm_hook import RankObjectives, rank_objectives_hook
from tests._oracle import relative_error
from tests._ranks import run_ranks
from tests.distributed._training import FEATURES, TASKS, flatten, parameters_of

BOUND = 1e-10
STEPS = 5
SIZES = (4, 1, 3, 2)  # samples of each rank


class Forked(nn.Module):
    """The ranks of odd number leave out a layer, and no rank uses the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, 6)
        self.branch = nn.Linear(6, 6)
        self.last = nn.Linear(6, TASKS)
        self.never = nn.Linear(2, 2)
        self.skip = False

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        return self.last(hidden if self.skip else torch.tanh(self.branch(hidden)))


def _model(skip: bool = False) -> Forked:
    torch.manual_seed(0)
    model = Forked().double()
    model.skip = skip
    return model


def _data(rank: int, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    x = torch.randn(SIZES[rank], FEATURES, generator=generator, dtype=torch.float64)
    return x, torch.randn(SIZES[rank], TASKS, generator=generator, dtype=torch.float64)


def _loss(model: Callable[[Tensor], Tensor], rank: int, step: int) -> Tensor:
    x, y = _data(rank, step)
    return (1 + 3 * rank) * (model(x) - y).pow(2).mean()


AGGREGATORS: dict[str, Callable[[], Aggregator]] = {
    "mean": Mean,
    "krum": lambda: Krum(n_byzantine=1),
    "multi-krum": lambda: Krum(n_byzantine=1, n_selected=2),
    "trimmed mean": lambda: TrimmedMean(trim_number=1),
    "upgrad": UPGrad,
    "imtlg": IMTLG,
    "graddrop": GradDrop,
    "moco": MoCo,
    "excess mtl": ExcessMTL,
}
# A bucket for nearly every tensor: from the second step on, or always if some may be unused.
TINY = {"bucket_cap_mb": 2e-4}
CASES: dict[str, dict[str, Any]] = {
    **{name: {"aggregator": name, **TINY} for name in AGGREGATORS},
    "one bucket": {"aggregator": "upgrad"},
    "bucket views": {"aggregator": "upgrad", "gradient_as_bucket_view": True, **TINY},
    "static graph": {"aggregator": "krum", "static_graph": True, **TINY},
    "no_sync": {"aggregator": "upgrad", "accumulate": True, **TINY},
    "no_sync, views": {
        "aggregator": "upgrad",
        "accumulate": True,
        "gradient_as_bucket_view": True,
        **TINY,
    },
    "unused": {"aggregator": "upgrad", "skip": True, **TINY},
    "unused, graddrop": {"aggregator": "graddrop", "skip": True, **TINY},
    "per bucket": {"aggregator": "upgrad", "together": False, **TINY},
    "per bucket, trimmed mean": {"aggregator": "trimmed mean", "together": False, **TINY},
}


def _wrap(model: Forked, **options: Any) -> DistributedDataParallel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # DDP looks at deprecated types of its own buffers
        return DistributedDataParallel(model, **options)


def _train(rank: int, world_size: int, case: dict[str, Any]) -> dict[str, Any]:
    options = dict(case)
    aggregator = AGGREGATORS[options.pop("aggregator")]()
    together, accumulate = options.pop("together", True), options.pop("accumulate", False)
    skip = options.pop("skip", False)
    model = _model(skip and rank % 2 == 1)
    if skip:
        options["find_unused_parameters"] = True
    else:
        model.never.requires_grad_(False)
    ddp = _wrap(model, **options)
    names = {p: name for name, p in model.named_parameters()}
    state = RankObjectives(aggregator, together=together)
    buckets: list[list[str]] = []

    def hook(state, bucket):  # DDP reads annotations as types
        buckets.append([names[p] for p in bucket.parameters()])
        return rank_objectives_hook(state, bucket)

    ddp.register_comm_hook(state, hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    torch.manual_seed(5)
    result: dict[str, Any] = {"parameters": [], "weights": [], "buckets": []}
    for step in range(STEPS):
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        buckets.clear()
        for micro in range(2 if accumulate else 1):
            with ddp.no_sync() if accumulate and micro == 0 else nullcontext():
                _loss(ddp, rank, step + 50 * micro).backward()
        optimizer.step()
        assert skip is (model.never.weight.grad is None) or not skip
        result["parameters"].append(parameters_of(model))
        result["weights"].append(state.weights)
        result["buckets"].append([list(bucket) for bucket in buckets])
    return result


def _some_cases(rank: int, world_size: int, names: list[str]) -> dict[str, Any]:
    """In one set of processes: starting is slow."""
    return {name: _train(rank, world_size, CASES[name]) for name in names}


def _reference(case: dict[str, Any], world_size: int, buckets: list[Any]) -> list[Tensor]:
    """One process that forms the rows of all ranks."""
    skip, together = case.get("skip", False), case.get("together", True)
    model = _model()
    if not skip:
        model.never.requires_grad_(False)
    aggregator = AGGREGATORS[case["aggregator"]]()
    trained = [p for p in model.parameters() if p.requires_grad]
    named, position = dict(model.named_parameters()), {p: i for i, p in enumerate(trained)}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    torch.manual_seed(5)
    result = []
    for step in range(STEPS):
        rows = []
        for rank in range(world_size):
            model.skip = skip and rank % 2 == 1
            losses = [
                _loss(model, rank, step + 50 * micro)
                for micro in range(2 if case.get("accumulate") else 1)
            ]
            found = torch.autograd.grad(sum(losses), trained, allow_unused=True)
            rows.append(
                [
                    torch.zeros_like(p) if g is None else g
                    for p, g in zip(trained, found, strict=True)
                ]
            )
        groups = [trained] if together else [[named[n] for n in b] for b in buckets[step]]
        for group in groups:
            index = [position[p] for p in group]
            matrix = torch.stack([torch.cat([row[i].flatten() for i in index]) for row in rows])
            pieces = aggregator(matrix).split([p.numel() for p in group])
            for parameter, piece in zip(group, pieces, strict=True):
                unused = skip and parameter.shape[0] == 2
                parameter.grad = None if unused else piece.view_as(parameter).clone()
        optimizer.step()
        result.append(parameters_of(model))
    return result


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_option_takes_the_step_of_one_process(world_size: int) -> None:
    names = [
        n for n, c in CASES.items() if world_size == 4 or c["aggregator"] in ("mean", "upgrad")
    ]
    ranks = run_ranks(_some_cases, world_size, names)
    for name in names:
        found = [rank[name] for rank in ranks]
        expected = _reference(CASES[name], world_size, found[0]["buckets"])
        for rank in found:
            for step, wanted in enumerate(expected):
                got = rank["parameters"][step]
                assert relative_error(got, wanted) <= BOUND, (name, step)
                assert torch.equal(got, found[0]["parameters"][step]), (name, step)
                for mine, first in zip(
                    rank["weights"][step], found[0]["weights"][step], strict=True
                ):
                    assert mine is first is None or torch.equal(mine, first)
    tiny = ranks[0][names[0]]["buckets"]
    assert len(tiny[0]) == 1 and len(tiny[1]) >= 3  # from the second step on, and in another order
    assert tiny[1][0][0] == "last.bias"
    assert all(len(step) >= 3 for step in ranks[0]["unused"]["buckets"])


HALF = (torch.bfloat16, torch.float16)


def _halves(rank: int, world_size: int) -> list[list[Tensor]]:
    return [_half(rank, dtype) for dtype in HALF]


def _half(rank: int, dtype: torch.dtype) -> list[Tensor]:
    """Rows of half precision that nearly cancel, where rounded weights would show."""
    model = nn.Linear(40, 1, bias=False).to(dtype)
    ddp = _wrap(model)
    state = RankObjectives(UPGrad())
    state.register(ddp)
    torch.manual_seed(0)
    common = torch.randn(40)
    torch.manual_seed(rank + 1)
    row = (common * (-1) ** rank + 0.3 * torch.randn(40)).to(dtype)
    ddp(row[None]).sum().backward()
    assert model.weight.grad is not None
    result = [row, model.weight.grad[0], *[w for w in state.weights if w is not None]]
    return [*result, _in_pairs(row, rank)]


def _in_pairs(row: Tensor, rank: int) -> Tensor:
    """The same by two wrappers, each over a process group of two ranks."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    model = nn.Linear(40, 1, bias=False).to(row.dtype)
    ddp = _wrap(model, process_group=groups[rank // 2])
    RankObjectives(UPGrad()).register(ddp)
    ddp(row[None]).sum().backward()
    assert model.weight.grad is not None
    return model.weight.grad[0]


def test_half_precision_is_aggregated_in_float32() -> None:
    results = run_ranks(_halves, 4)
    for i, dtype in enumerate(HALF):
        ranks = [result[i] for result in results]
        rows = torch.stack([row for row, *_ in ranks]).double()
        expected = UPGrad()(rows)
        for rank, (_, found, weights, in_pairs) in enumerate(ranks):
            pair = rows[rank // 2 * 2 :][:2]
            assert relative_error(in_pairs, UPGrad()(pair)) <= 5e-3
            assert found.dtype == dtype and weights.dtype == torch.float32
            # No further off than by rounding the result alone, plus a margin for ties.
            rounding = relative_error(expected.to(dtype), expected)
            assert relative_error(found, expected) <= 1.1 * rounding


def _message(fn: Callable[[], Any], kind: type[Exception]) -> str:
    try:
        fn()
    except kind as error:
        return str(error)
    raise AssertionError(f"expected {kind.__name__}")


# Options of DDP, and whether all buckets are aggregated together.
FAILING: list[tuple[dict[str, Any], bool]] = [
    ({"static_graph": True}, True),
    ({"gradient_as_bucket_view": True}, True),
    ({}, False),
]


def _all_failures(rank: int, world_size: int) -> list[dict[str, Any]]:
    return [_failures(rank, *case) for case in FAILING]


def _failures(rank: int, options: dict[str, Any], together: bool) -> dict[str, Any]:
    model = _model()
    model.never.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    ddp = _wrap(model, **options, **TINY)
    state = RankObjectives(TrimmedMean(trim_number=1), together=together)
    ddp.register_comm_hook(state, rank_objectives_hook)

    def backward(factor: float = 1.0) -> None:
        model.zero_grad()
        (_loss(ddp, rank, 0) * factor).backward()

    result: dict[str, Any] = {}
    bad = float("nan") if rank == 2 else 1.0
    result["nan at first"] = _message(lambda: backward(bad), NonFiniteObjectiveError)
    backward()
    first = flatten([p.grad for p in trained])
    result["nan"] = _message(lambda: backward(bad), NonFiniteObjectiveError)
    result["grads after nan"] = sum(p.grad is not None for p in trained)
    backward()
    result["recovers"] = torch.equal(flatten([p.grad for p in trained]), first)
    state.aggregator = TrimmedMean(trim_number=rank % 2)
    result["settings"] = _message(backward, LayoutMismatchError)
    result["grads after settings"] = sum(p.grad is not None for p in trained)
    state.aggregator = Krum(n_byzantine=3)
    result["weighting"] = _message(backward, RankError)
    state.aggregator = TrimmedMean(trim_number=3)
    result["aggregator"] = _message(backward, ValueError)
    state.aggregator = TrimmedMean(trim_number=1)
    state.nonfinite = "skip"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        backward(bad)
    result["warned"] = str(caught[0].message)
    result["skipped"] = float(flatten([p.grad for p in trained]).abs().sum())
    state.nonfinite = "propagate"
    backward(bad)
    result["propagated"] = bool(flatten([p.grad for p in trained]).isnan().all())
    backward()
    result["recovers again"] = torch.equal(flatten([p.grad for p in trained]), first)
    sparse = _wrap(nn.Embedding(3, 2, sparse=True))
    sparse.register_comm_hook(RankObjectives(Mean()), rank_objectives_hook)
    result["sparse"] = _message(
        lambda: sparse(torch.tensor([rank % 3])).sum().backward(), UnsupportedModelError
    )
    result["engine"] = _message(
        lambda: Engine(ddp, batch_dim=0).backward(ddp(_data(rank, 0)[0]).sum(1), _equal_weights),
        UnsupportedModelError,
    )
    return result


def _equal_weights(gramian: Tensor) -> Tensor:
    return gramian.new_full(gramian.shape[:1], 1 / len(gramian))


def test_failures_reach_every_rank_and_training_may_go_on() -> None:
    for found in (case for rank in run_ranks(_all_failures, 4) for case in rank):
        assert "(rank 2)" in found["nan at first"] and found["propagated"]
        assert "(rank 2)" in found["nan"] and "NaN" in found["nan"]
        assert found["grads after nan"] == found["grads after settings"] == 0
        assert found["recovers"] and found["recovers again"]
        assert "settings of the aggregators" in found["settings"]
        assert "Krum" in found["weighting"] and "rank 0" in found["weighting"]
        assert "Trimming 3" in found["aggregator"]
        assert "(rank 2)" in found["warned"] and found["skipped"] == 0.0
        assert "communication hook" in found["engine"] and "sparse=False" in found["sparse"]


def _joined(rank: int, world_size: int) -> Tensor:
    model = _model()
    model.never.requires_grad_(False)
    ddp = _wrap(model, **TINY)
    RankObjectives(UPGrad()).register(ddp)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    with ddp.join():
        for step in range(2 + rank):
            optimizer.zero_grad()
            _loss(ddp, rank, step).backward()
            optimizer.step()
    return parameters_of(model)


def test_ranks_that_ran_out_of_data_have_gradients_of_zero() -> None:
    ranks = run_ranks(_joined, 3)
    model = _model()
    model.never.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.02)
    for step in range(4):
        rows = [
            flatten(list(torch.autograd.grad(_loss(model, rank, step), trained)))
            if step < 2 + rank
            else torch.zeros(sum(p.numel() for p in trained), dtype=torch.float64)
            for rank in range(3)
        ]
        pieces = UPGrad()(torch.stack(rows)).split([p.numel() for p in trained])
        for parameter, piece in zip(trained, pieces, strict=True):
            parameter.grad = piece.view_as(parameter).clone()
        optimizer.step()
    for found in ranks:
        assert relative_error(found, parameters_of(model)) <= BOUND


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: RankObjectives(nn.Identity()), "aggregator"),  # type: ignore[arg-type]
        (lambda: RankObjectives(MoCo(), together=False), "together=True"),
        (lambda: RankObjectives(Mean(), nonfinite="drop"), "drop"),  # type: ignore[arg-type]
    ],
)
def test_what_is_not_possible_is_refused(make: Callable[[], Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()
