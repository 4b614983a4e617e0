"""Every aggregator on column shards: the result of the whole Jacobian, and little sent for it."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from jddist import aggregation, attach
from jddist.aggregation import (
    Aggregator,
    MoDoWeighting,
    SDMGradWeighting,
    WeightedAggregator,
    _graddrop,
)
from jddist.autogram import Engine
from jddist.autojac import jac_to_grad_groups
from jddist.distribution.columns import RankColumns
from tests._ranks import run_ranks
from tests.distributed._methods import METHODS, M, state_losses
from tests.distributed._spy import spying
from tests.distributed._training import local_part, wrap
from tests.unit.aggregation._matrices import make_matrix

FLOAT = 8
CALLS = 3
SIZES = (2, 3, 4)
# Columns by number of ranks: shards that are full but the last; some that are empty.
UNEVEN = 11
EMPTY = {2: 1, 3: 4, 4: 6}
PLACEMENTS: dict[str, Placement] = {
    "columns": Shard(1),
    "rows": Shard(0),
    "replicated": Replicate(),
    "sum": Partial("sum"),
    "average": Partial("avg"),
}
# One method of each kind takes all placements and widths, the others empty shards alone.
EVERYWHERE = ("UPGrad", "ExcessMTL", "GradDrop", "Mean")
# The sums over columns run in another order: some roundings of G, which the best conditioned of the
# methods pass on and the worst, on these matrices of full rank, multiply by less than 1e4.
LIMIT = 1e-10


def jacobian_of(n: int, call: int) -> Tensor:
    return make_matrix("conflicting", M, seed=call, n=n)


def losses_of(call: int) -> Tensor:
    return torch.arange(1.0, M + 1.0, dtype=torch.float64) / (call + 1)


def _distance(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual - expected).norm() / max(float(expected.norm()), 1e-300))


def whole(aggregator: Aggregator, n: int) -> tuple[list[Tensor], Tensor]:
    """The results in one process, and the position of the random stream afterwards."""
    torch.manual_seed(1)
    results = []
    for call in range(CALLS):
        state_losses(aggregator, losses_of(call))
        results.append(aggregator(jacobian_of(n, call)))
    return results, torch.get_rng_state()


class Noted:
    """The weights that an aggregator used, whichever way they came."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, aggregator: Aggregator | None = None
    ) -> None:
        self.weights: list[Tensor] = []
        original = RankColumns.weigh

        def noting(columns: RankColumns, *args: Any) -> Tensor:
            weights = original(columns, *args)
            self.weights.append(weights)
            return weights

        monkeypatch.setattr(RankColumns, "weigh", noting)
        if isinstance(aggregator, WeightedAggregator):
            aggregator.weighting.register_forward_hook(lambda *args: self.weights.append(args[-1]))


def _as_dtensor(matrix: Tensor, placement: Placement, rank: int, world_size: int) -> DTensor:
    mesh = init_device_mesh("cpu", (world_size,))
    shape, stride = matrix.shape, matrix.stride()
    if isinstance(placement, Shard):
        parts = list(matrix.chunk(world_size, dim=placement.dim))
        parts += [parts[0].narrow(placement.dim, 0, 0)] * (world_size - len(parts))
        local = parts[rank].contiguous()
    elif isinstance(placement, Partial):
        # Powers of two, so that on one column, where methods are ill-posed, nothing is rounded.
        shares = {2: [2, -1], 3: [2, -2, 1], 4: [4, -2, -2, 1]}[world_size]
        local = matrix * shares[rank] * (world_size if placement.reduce_op == "avg" else 1)
    else:
        local = matrix.clone()
    return DTensor.from_local(local, mesh, [placement], run_check=False, shape=shape, stride=stride)


def _dtensors(rank: int, world_size: int) -> dict[str, Any]:
    """For each method, width and placement: the error, the placement, what was sent and used."""
    found: dict[str, Any] = {}
    for name, method in METHODS.items():
        torch.manual_seed(0)
        fresh = method.make()
        for n in (EMPTY[world_size], UNEVEN) if name in EVERYWHERE else (EMPTY[world_size],):
            expected, position = whole(deepcopy(fresh), n)
            for place in PLACEMENTS if name in EVERYWHERE else ("columns",):
                placement = PLACEMENTS[place]
                aggregator = deepcopy(fresh)
                with pytest.MonkeyPatch.context() as monkeypatch:
                    monkeypatch.setattr(_graddrop, "CHUNK", 3)
                    noted = Noted(monkeypatch, aggregator)
                    torch.manual_seed(1)
                    error, logs = 0.0, []
                    for call in range(CALLS):
                        state_losses(aggregator, losses_of(call))
                        jacobian = _as_dtensor(jacobian_of(n, call), placement, rank, world_size)
                        with spying(rank, world_size) as log:
                            result = aggregator(jacobian)
                        logs.append(list(log))
                        assert isinstance(result, DTensor) and result.shape == (n,)
                        assert result.device_mesh == jacobian.device_mesh
                        same_position = torch.get_rng_state()
                        error = max(error, _distance(result.full_tensor(), expected[call]))
                found[f"{name} | {n} | {place}"] = {
                    "error": error,
                    "placement": repr(result.placements[0]),
                    "log": logs[-1],
                    "weights": noted.weights,
                    "position": torch.equal(same_position, position),
                }
    return found


class Rows(nn.Module):
    """Parameters with n elements together."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.zeros(n - n // 3, dtype=torch.float64))
        self.second = nn.Parameter(torch.zeros(n // 3, 1, dtype=torch.float64))


def set_jacs(parameters: list[nn.Parameter], rows: Tensor) -> None:
    widths = [p.numel() for p in parameters]
    for p, part in zip(parameters, rows.split(widths, dim=1), strict=True):
        p.jac = part.reshape(len(rows), *p.shape).clone()  # type: ignore[attr-defined]


def _autojac(rank: int, world_size: int) -> dict[str, Any]:
    """All methods in one `jac_to_grad_groups`, each on its own parameters; one rank is empty."""
    torch.manual_seed(0)
    aggregators = [method.make() for method in METHODS.values()]
    model = nn.ModuleList(Rows(UNEVEN) for _ in aggregators)
    attach(wrap(model), objectives=Shard(0))
    groups = [list(rows.parameters()) for rows in model]
    kind = "even" if world_size == 1 else "empty"
    torch.manual_seed(1)
    vectors, weights = [], []
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(_graddrop, "CHUNK", 3)
        noted = Noted(monkeypatch)
        for call in range(CALLS):
            for group, aggregator in zip(groups, aggregators, strict=True):
                state_losses(aggregator, losses_of(call))
                set_jacs(group, local_part(jacobian_of(UNEVEN, call), rank, world_size, kind))
            model.zero_grad()
            weights += [w for w in jac_to_grad_groups(groups, aggregators) if w is not None]
            vectors += [
                torch.cat([p.grad.reshape(-1) for p in g if p.grad is not None]) for g in groups
            ]
    return {
        "vectors": torch.stack(vectors),
        "weights": weights + noted.weights,
        "position": torch.get_rng_state(),
    }


def _two_batches(rank: int, world_size: int) -> dict[str, list[Tensor]]:
    """Weights from the products of two Jacobians whose columns are spread over the ranks."""
    engine = Engine(wrap(nn.Linear(1, 1).double()), batch_dim=0)
    found = {}
    for weighting in (MoDoWeighting(), SDMGradWeighting()):
        weights = []
        for call in range(CALLS):
            first, second = (
                _as_dtensor(jacobian_of(UNEVEN, call + k), Shard(1), rank, world_size)
                for k in range(2)
            )
            products = (first @ second.T).full_tensor()
            weights.append(engine.compute_weights(products, weighting))
        found[type(weighting).__name__] = [*weights, *weighting.get_extra_state().values()]
    return found


def _everything(rank: int, world_size: int) -> dict[str, Any]:
    found: dict[str, Any] = {"autojac": _autojac(rank, world_size)}
    if world_size > 1:
        found["dtensors"] = _dtensors(rank, world_size)
        found["two batches"] = _two_batches(rank, world_size)
    return found


@pytest.fixture(scope="module")
def one_process() -> dict[str, Any]:
    found: dict[str, Any] = run_ranks(_everything, 1)[0]["autojac"]
    return found


@pytest.fixture(scope="module", params=SIZES)
def ranks(request: pytest.FixtureRequest) -> Iterator[list[dict[str, Any]]]:
    """What every rank found; one launch for each number of ranks."""
    yield run_ranks(_everything, request.param)


def test_every_aggregator_is_among_the_methods() -> None:
    exported = {getattr(aggregation, name) for name in aggregation.__all__}
    aggregators = {cls for cls in exported if issubclass(cls, Aggregator)}
    made = {cls for method in METHODS.values() for cls in type(method.make()).__mro__}
    assert aggregators - made == set()


def test_a_dtensor_gives_the_result_of_the_whole(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        others = len(METHODS) - len(EVERYWHERE)
        assert len(found["dtensors"]) == others + 2 * len(EVERYWHERE) * len(PLACEMENTS)
        errors = {name: case["error"] for name, case in found["dtensors"].items()}
        assert {name: e for name, e in errors.items() if not e <= LIMIT} == {}


def test_the_result_is_where_the_columns_were(ranks: list[dict[str, Any]]) -> None:
    for name, case in ranks[0]["dtensors"].items():
        replicated = name.endswith("replicated")
        assert case["placement"] == repr(Replicate() if replicated else Shard(0)), name


def test_weights_are_the_same_bits_on_all_ranks(ranks: list[dict[str, Any]]) -> None:
    for name, case in ranks[0]["dtensors"].items():
        method = METHODS[name.split(" | ")[0]]
        used = case["weights"]
        assert bool(used) == (method.shares > 0 or name.startswith(("Mean", "Sum", "Constant")))
        for other in ranks[1:]:
            theirs = other["dtensors"][name]["weights"]
            assert len(theirs) == len(used), name
            assert all(torch.equal(a, b) for a, b in zip(used, theirs, strict=True)), name


def test_all_ranks_draw_as_much_as_one_process(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert [name for name, case in found["dtensors"].items() if not case["position"]] == []


def test_only_statistics_of_the_objectives_are_sent(ranks: list[dict[str, Any]]) -> None:
    world_size = len(ranks)
    numbers = {"gramian": M * M, "vector": M, "nothing": 0}
    for rank, found in enumerate(ranks):
        for name, case in found["dtensors"].items():
            method_name, n, place = name.split(" | ")
            method, log = METHODS[method_name], case["log"]
            summed = [sent for operation, sent in log if operation == "all_reduce"]
            ring = 2 * (world_size - 1) / world_size * FLOAT
            expected = numbers[method.sums] * ring
            assert summed == ([expected] if expected else []), name
            shared = [sent for operation, sent in log if operation == "broadcast"]
            weights = (2 + M) * FLOAT if rank == 0 else 0
            assert shared.count(weights) >= method.shares, name
            assert len(shared) == method.shares + method.follows, name
            others = sorted(op for op, _ in log if op not in ("all_reduce", "broadcast"))
            # Rows and parts become columns once; the result of replicated columns is gathered.
            assert (
                others
                == {
                    "columns": [],
                    "rows": ["all_to_all_single"],
                    "replicated": ["all_gather"],
                    "sum": ["reduce_scatter"],
                    "average": ["reduce_scatter"],
                }[place]
            ), name
            gathered = [sent for op, sent in log if op == "all_gather"]
            width = -(-int(n) // world_size)
            assert gathered in ([], [(world_size - 1) * width * FLOAT]), name


def test_jac_to_grad_of_all_methods_is_that_of_one_process(
    ranks: list[dict[str, Any]], one_process: dict[str, Any]
) -> None:
    names = list(METHODS) * CALLS
    for found in (rank["autojac"] for rank in ranks):
        errors = map(_distance, found["vectors"], one_process["vectors"])
        assert [(n, e) for n, e in zip(names, errors, strict=True) if not e <= LIMIT] == []
        assert torch.equal(found["position"], one_process["position"])


def test_jac_to_grad_uses_the_same_bits_on_all_ranks(ranks: list[dict[str, Any]]) -> None:
    first = ranks[0]["autojac"]
    for other in (rank["autojac"] for rank in ranks[1:]):
        assert torch.equal(other["vectors"], first["vectors"])
        assert len(other["weights"]) == len(first["weights"]) > CALLS * len(METHODS) / 2
        pairs = zip(other["weights"], first["weights"], strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_weights_of_two_batches(ranks: list[dict[str, Any]]) -> None:
    jacobians = [jacobian_of(UNEVEN, call) for call in range(CALLS + 1)]
    for weighting in (MoDoWeighting(), SDMGradWeighting()):
        expected = [weighting(a @ b.T) for a, b in zip(jacobians, jacobians[1:], strict=False)]
        expected += weighting.get_extra_state().values()
        for found in ranks:
            weights = found["two batches"][type(weighting).__name__]
            # The state of rank 0 is on every rank, and the weights are its bits.
            first = ranks[0]["two batches"][type(weighting).__name__]
            assert all(torch.equal(a, b) for a, b in zip(weights, first, strict=True))
            # SDMGrad multiplies a rounding of the products by 1e2 or so.
            pairs = zip(weights, expected, strict=True)
            assert max(float((a - b).abs().max()) for a, b in pairs) <= LIMIT


def test_one_process_is_the_methods_themselves(one_process: dict[str, Any]) -> None:
    """Those that draw nothing; the draws of the others depend on who came before."""
    for i, (name, method) in enumerate(METHODS.items()):
        if name.startswith(("GradDrop", "Random", "CRMOGM(Random)", "PCGrad", "GradVac")):
            continue
        expected, _ = whole(method.make(), UNEVEN)
        for call in range(CALLS):
            got = one_process["vectors"][call * len(METHODS) + i]
            assert _distance(got, expected[call]) <= LIMIT, name
