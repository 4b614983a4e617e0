"""The loops of the documents that the project grew from: in one process, and over ranks.

In one process they run as written. Over ranks the engine's loop slices the weights with
``engine.local_weights``, and the grouping loops run after ``attach``, unchanged.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from jddist import attach
from jddist.aggregation import Aggregator, GradVac, PCGrad, Random, UPGrad, UPGradWeighting
from jddist.autogram import Engine
from jddist.autojac import jac_to_grad, jac_to_grad_groups, mtl_backward
from jddist.grouping import per_layer, per_network, per_tensor, together
from tests._oracle import relative_error
from tests._ranks import run_ranks, split_sizes
from tests.distributed._training import parameters_of, wrap

BOUND = 1e-10
BATCHES, BATCH = 4, 12


class MultiTask(nn.Module):
    """An encoder in two parts and four heads."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(10, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU())
        self.decoder = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
        self.heads = nn.ModuleList([nn.Linear(5, 1) for _ in range(4)])

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        features = self.decoder(self.encoder(x))
        return features, [head(features) for head in self.heads]


def _network() -> MultiTask:
    torch.manual_seed(3)
    return MultiTask().double()


def _batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(4)
    kwargs = {"generator": generator, "dtype": torch.float64}
    return [
        (torch.randn(BATCH, 10, **kwargs), torch.randn(4, BATCH, 1, **kwargs))
        for _ in range(BATCHES)
    ]


def _groups(model: MultiTask, grouping: str) -> list[list[nn.Parameter]]:
    """The four groupings, of the parameters that get Jacobians."""
    shared = [*model.encoder.parameters(), *model.decoder.parameters()]
    layers = [m for m in (*model.encoder, *model.decoder) if list(m.parameters())]
    return {
        "together": [shared],
        "per network": [list(model.encoder.parameters()), list(model.decoder.parameters())],
        "per layer": [list(layer.parameters()) for layer in layers],
        "per tensor": [[p] for p in shared],
    }[grouping]


METHODS: dict[str, type[Aggregator]] = {
    "UPGrad": UPGrad,
    "PCGrad": PCGrad,
    "GradVac": GradVac,
    "Random": Random,
}
GROUPINGS = ("together", "per network", "per layer", "per tensor")


def _train(
    rank: int, sizes: list[int], model: nn.Module, inner: MultiTask, grouping: str, method: str
) -> Tensor:
    torch.manual_seed(5)  # the random aggregators draw from torch's default generator
    groups = _groups(inner, grouping)
    aggregators = [METHODS[method]() for _ in groups]
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.1)
    start = sum(sizes[:rank])
    part = slice(start, start + sizes[rank])
    for inputs, targets in _batches():
        features, outputs = model(inputs[part])
        losses = [
            nn.functional.mse_loss(out, target[part])
            for out, target in zip(outputs, targets, strict=True)
        ]
        count = None if len(sizes) == 1 else sizes[rank]
        mtl_backward(losses, features=features, count=count)
        for group, aggregator in zip(groups, aggregators, strict=True):
            jac_to_grad(group, aggregator)
        optimizer.step()
        optimizer.zero_grad()
    return parameters_of(inner)


def _one_process(grouping: str, method: str) -> Tensor:
    model = _network()
    return _train(0, [BATCH], model, model, grouping, method)


def _on_ranks(rank: int, world_size: int, kind: str) -> dict[str, Tensor]:
    found = {}
    for grouping in GROUPINGS:
        for method in METHODS:
            model = _network()
            ddp = wrap(model)
            distribution = attach(ddp)
            sizes = split_sizes(BATCH, world_size, kind)
            found[f"{grouping}/{method}"] = _train(rank, sizes, ddp, model, grouping, method)
            distribution.detach()
    return found


@pytest.mark.parametrize(
    ("world_size", "kind"), [(2, "even"), (2, "uneven"), (3, "uneven"), (3, "empty"), (4, "even")]
)
@pytest.mark.filterwarnings("ignore:.*empty.*")
def test_grouping_loops_over_ranks_equal_one_process(world_size: int, kind: str) -> None:
    ranks = run_ranks(_on_ranks, world_size, kind)
    for grouping in GROUPINGS:
        for method in METHODS:
            expected = _one_process(grouping, method)
            for found in ranks:
                key = f"{grouping}/{method}"
                assert relative_error(found[key], expected) <= BOUND, key
                assert torch.equal(found[key], ranks[0][key]), key


def test_grouping_loops_equal_the_peer_in_one_process() -> None:
    """Same seed, same draws, same numbers as the single-device library."""
    pytest.importorskip("torchjd")
    from torchjd.aggregation import GradVac as PeerGradVac
    from torchjd.autojac import jac_to_grad as peer_jac_to_grad
    from torchjd.autojac import mtl_backward as peer_mtl_backward

    for grouping in GROUPINGS:
        torch.manual_seed(5)
        model = _network()
        torch.manual_seed(5)
        groups = _groups(model, grouping)
        aggregators = [PeerGradVac() for _ in groups]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for inputs, targets in _batches():
            features, outputs = model(inputs)
            losses = [nn.functional.mse_loss(o, t) for o, t in zip(outputs, targets, strict=True)]
            peer_mtl_backward(losses, features=features)
            for group, aggregator in zip(groups, aggregators, strict=True):
                peer_jac_to_grad(group, aggregator)
            optimizer.step()
            optimizer.zero_grad()
        assert relative_error(_one_process(grouping, "GradVac"), parameters_of(model)) <= BOUND


def _many_groups(rank: int, world_size: int) -> dict[str, Tensor]:
    found = {}
    for name, grouping in (
        ("together", together),
        ("per network", per_network),
        ("per layer", per_layer),
        ("per tensor", per_tensor),
    ):
        model = _network()
        ddp = wrap(model)
        attach(ddp)
        inputs, targets = _batches()[0]
        part = slice(rank * BATCH // world_size, (rank + 1) * BATCH // world_size)
        _, outputs = ddp(inputs[part])
        out = torch.cat(outputs, dim=1)
        losses = [(out[:, i] - targets[i, part, 0]).pow(2).mean() for i in range(4)]
        mtl_backward(losses, features=out)
        groups = grouping(ddp)
        jac_to_grad_groups(groups, [GradVac() for _ in groups])
        found[name] = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    return found


def test_many_groups_in_one_call_over_ranks() -> None:
    one = run_ranks(_many_groups, 1)[0]
    for found in run_ranks(_many_groups, 2):
        for name, expected in one.items():
            assert relative_error(found[name], expected) <= BOUND, name


def _engine_loop(model: nn.Module, engine: Engine, rank: int, sizes: list[int]) -> Tensor:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    criterion = nn.MSELoss(reduction="none")
    weighting = UPGradWeighting()
    start = sum(sizes[:rank])
    part = slice(start, start + sizes[rank])
    for inputs, targets in _batches():
        output = model(inputs[part]).squeeze(dim=1)
        losses = criterion(output, targets[0, part, 0])
        optimizer.zero_grad()
        gramian = engine.compute_gramian(losses)
        if len(sizes) == 1:
            weights = weighting(gramian)
            losses.backward(weights)
        else:
            weights = engine.compute_weights(gramian, weighting)
            losses.backward(engine.local_weights(weights))
        optimizer.step()
    return parameters_of(model)


def _regressor() -> nn.Module:
    torch.manual_seed(6)
    return nn.Sequential(nn.Linear(10, 4), nn.ReLU(), nn.Linear(4, 1)).double()


def _engine_loop_on_ranks(rank: int, world_size: int) -> Tensor:
    ddp = wrap(_regressor())
    sizes = split_sizes(BATCH, world_size, "uneven")
    return _engine_loop(ddp, Engine(ddp.modules(), batch_dim=0), rank, sizes)


@pytest.mark.parametrize("world_size", [2, 3])
def test_engine_loop_over_ranks_equals_one_process(world_size: int) -> None:
    model = _regressor()
    expected = _engine_loop(model, Engine(model.modules(), batch_dim=0), 0, [BATCH])
    for found in run_ranks(_engine_loop_on_ranks, world_size):
        assert relative_error(found, expected) <= BOUND
