"""``jddist.autojac`` against torchjd on the same graphs: a changed import changes no number."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from jddist import aggregation, autojac
from jddist.grouping import per_layer, per_network, per_tensor, together
from tests._oracle import jacobian, relative_error

peer = pytest.importorskip("torchjd.autojac")
peer_aggregation = pytest.importorskip("torchjd.aggregation")

BOUND = 1e-12  # the same float64 operations, batched differently
CHUNKS = [None, 1, 2, 7]
# After eight steps: rounding, amplified by the quadratic programs of UPGrad and by the thresholds
# of GradVac and PCGrad.
TRAINED_BOUND = 1e-9


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(4, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0][:, -1]


class _Tied(nn.Module):
    """A table that is looked up and multiplied with, and a parameter that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 4)
        self.norm = nn.LayerNorm(4)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x.sum(-1).abs() * 10).long() % 6
        return self.norm(self.table(tokens)).mean(dim=1) @ self.table.weight.T


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(nn.Flatten(), nn.Linear(20, 6), nn.Tanh(), nn.Linear(6, 3)),
    "convolution": lambda: nn.Sequential(
        nn.Conv1d(5, 4, 2), nn.GELU(), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(4, 3)
    ),
    "attention": lambda: nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True),
    "recurrent": _Recurrent,
    "tied": _Tied,
}


def _run(library: ModuleType, name: str, case: str, chunk: int | None) -> list[Tensor]:
    """Rows of one kind of call, by one of the libraries, for all parameters."""
    torch.manual_seed(0)
    model = MODELS[name]().double()
    y = model(torch.randn(3, 5, 4, dtype=torch.float64)).reshape(3, -1)
    parameters = list(model.parameters())
    scalars = list(y.pow(2).mean(dim=1))
    if case == "scalars":
        library.backward(scalars, inputs=parameters, parallel_chunk_size=chunk)
    elif case == "shapes":
        tensors = [scalars[0], y[1, :3], y[:2, :2]]
        library.backward(tensors, inputs=parameters, parallel_chunk_size=chunk)
    elif case == "jac_tensors":
        given = [torch.randn(4, *s, dtype=y.dtype) for s in ((), (2, 3))]
        library.backward(
            [scalars[0], y[:2, :3]],
            jac_tensors=given,
            inputs=parameters,
            parallel_chunk_size=chunk,
        )
    else:
        return list(library.jac(scalars, parameters, parallel_chunk_size=chunk))
    return [p.jac for p in parameters]


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("case", ["scalars", "shapes", "jac_tensors", "jac"])
@pytest.mark.parametrize("name", list(MODELS))
# The peer's vmap loops over some operators and says so.
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_rows_are_those_of_the_peer(name: str, case: str, chunk: int | None) -> None:
    found, expected = _run(autojac, name, case, chunk), _run(peer, name, case, chunk)
    assert len(found) == len(expected) > 0
    for mine, theirs in zip(found, expected, strict=True):
        assert relative_error(mine, theirs) <= BOUND


@pytest.mark.parametrize("name", list(MODELS))
def test_rows_are_those_of_one_gradient_at_a_time(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().double()
    y = model(torch.randn(3, 5, 4, dtype=torch.float64)).reshape(3, -1)
    expected = jacobian(y, model.parameters())
    for chunk in CHUNKS:
        rows = autojac.jac(
            y, list(model.parameters()), retain_graph=True, parallel_chunk_size=chunk
        )
        found = torch.cat([r.reshape(len(r), -1) for r in rows], dim=1)
        assert relative_error(found, expected) <= BOUND


class _TwoStage(nn.Module):
    """Two stages that three tasks share, and a head for each task."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.ModuleDict(
            {
                "lower": nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)),
                "upper": nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5)),
            }
        )
        self.heads = nn.ModuleList(nn.Linear(5, 2) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        features = self.shared["upper"](torch.tanh(self.shared["lower"](x)))
        return features, [head(features) for head in self.heads]


GROUPINGS = {"together": together, "network": per_network, "layer": per_layer, "tensor": per_tensor}
STEPS = 8


def _train(library: ModuleType, methods: ModuleType, grouping: str, method: str) -> Tensor:
    """The parameters after eight steps, aggregated group by group."""
    torch.manual_seed(5)
    model = _TwoStage().double()
    groups = GROUPINGS[grouping](model.shared)
    aggregators = [getattr(methods, method)() for _ in groups]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(STEPS):
        x = torch.randn(7, 6, dtype=torch.float64)
        targets = torch.randn(3, 7, 2, dtype=torch.float64)
        features, predictions = model(x)
        losses = [(p - t).pow(2).mean() for p, t in zip(predictions, targets, strict=True)]
        library.mtl_backward(losses, features=features)
        for group, aggregator in zip(groups, aggregators, strict=True):
            library.jac_to_grad(group, aggregator)
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@pytest.mark.parametrize("method", ["GradVac", "PCGrad", "UPGrad", "Mean", "Random"])
@pytest.mark.parametrize("grouping", list(GROUPINGS))
def test_training_by_groups_ends_where_the_peer_ends(grouping: str, method: str) -> None:
    mine = _train(autojac, aggregation, grouping, method)
    theirs = _train(peer, peer_aggregation, grouping, method)
    assert relative_error(mine, theirs) <= TRAINED_BOUND


def test_groupings_of_the_training_test_differ() -> None:
    # Otherwise the test above would compare one loop four times.
    ends = [_train(autojac, aggregation, grouping, "GradVac") for grouping in GROUPINGS]
    for i, end in enumerate(ends):
        assert all(relative_error(end, other) > 1e-6 for other in ends[:i])


@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize("method", ["UPGrad", "PCGrad", "MGDA", "DualProj"])
def test_weights_after_hooks_are_those_of_the_peer(method: str, optimize: bool) -> None:
    jacs = [torch.randn(3, *shape, dtype=torch.float64) for shape in ((2, 2), (), (5,))]
    results = []
    for library, methods in ((autojac, aggregation), (peer, peer_aggregation)):
        parameters = [nn.Parameter(torch.zeros_like(j[0])) for j in jacs]
        for p, j in zip(parameters, jacs, strict=True):
            p.jac = j.clone()
        aggregator = getattr(methods, method)()
        aggregator.gramian_weighting.register_forward_hook(lambda m, i, out: out * 2)
        if not optimize:
            aggregator.weighting.register_forward_hook(lambda m, i, out: out + 1)
            aggregator.register_forward_hook(lambda m, i, out: out * 3)
        torch.manual_seed(2)
        weights = library.jac_to_grad(parameters, aggregator, optimize_gramian_computation=optimize)
        results.append([weights, *(p.grad for p in parameters)])
    for mine, theirs in zip(*results, strict=True):
        assert relative_error(mine, theirs) <= TRAINED_BOUND
