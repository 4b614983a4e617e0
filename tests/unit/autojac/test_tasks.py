"""``mtl_backward`` and ``jac_to_grad`` against one gradient at a time, and against the peer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from jddist import Stateful, attach
from jddist.aggregation import MGDA, Aggregator, GradVac, Mean, PCGrad, Random, Sum, UPGrad
from jddist.autojac import jac_to_grad, jac_to_grad_groups, mtl_backward
from jddist.errors import NonFiniteObjectiveError
from tests._oracle import jacobian, relative_error

BOUND = 1e-12
TASKS = 4


class _MultiTask(nn.Module):
    """A trunk, four heads, and a layer that the last two heads share."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))
        self.heads = nn.ModuleList([nn.Linear(4, 1) for _ in range(TASKS)])
        self.common = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        features = self.trunk(x)
        common = torch.tanh(self.common(features))
        inputs = [features, features, common, common]
        pairs = zip(self.heads, inputs, strict=True)
        return features, [head(h).pow(2).mean() for head, h in pairs]


def _model() -> tuple[_MultiTask, Tensor]:
    torch.manual_seed(0)
    return _MultiTask().double(), torch.randn(7, 5, dtype=torch.float64)


@pytest.mark.parametrize("chunk_size", [None, 1, 3])
def test_tasks_get_gradients_and_the_trunk_gets_rows(chunk_size: int | None) -> None:
    model, x = _model()
    features, losses = model(x)
    trunk = list(model.trunk.parameters())
    own = [*model.heads.parameters(), *model.common.parameters()]
    rows = jacobian(torch.stack(losses), trunk)
    expected = jacobian(torch.stack(losses).sum(), own)[0]
    mtl_backward(losses, features=features, parallel_chunk_size=chunk_size)
    found = torch.cat([p.jac.reshape(TASKS, -1) for p in trunk], dim=1)
    assert relative_error(found, rows) <= BOUND
    assert relative_error(torch.cat([p.grad.reshape(-1) for p in own]), expected) <= BOUND
    weights = jac_to_grad(trunk, UPGrad())
    grad = torch.cat([p.grad.reshape(-1) for p in trunk])
    assert relative_error(grad, UPGrad()(rows)) <= BOUND
    assert relative_error(weights @ rows, grad) <= BOUND
    assert not any(hasattr(p, "jac") for p in trunk)


def test_given_parameters_and_starting_gradients() -> None:
    model, x = _model()
    features = model.trunk(x)
    outputs = [head(features).squeeze(1) for head in model.heads]
    starts = [torch.randn(7, dtype=torch.float64) for _ in outputs]
    losses = torch.stack([(o * s).sum() for o, s in zip(outputs, starts, strict=True)])
    weight = model.trunk[0].weight
    rows = jacobian(losses, [weight])
    expected = jacobian(losses.sum(), model.heads[1].parameters())[0]
    mtl_backward(
        outputs,
        features=[features],
        grad_tensors=starts,
        tasks_params=[head.parameters() for head in model.heads],
        shared_params=[weight],
        retain_graph=True,
    )
    assert relative_error(weight.jac.reshape(TASKS, -1), rows) <= BOUND
    assert model.trunk[2].weight.grad is None
    found = torch.cat([p.grad.reshape(-1) for p in model.heads[1].parameters()])
    assert relative_error(found, expected) <= BOUND
    with pytest.raises(ValueError, match="expected scalars"):
        mtl_backward(outputs, features=features)


@pytest.mark.parametrize(
    "aggregator", [UPGrad(), PCGrad(), GradVac(), Mean(), Sum(), Random(), MGDA()], ids=str
)
def test_jac_to_grad_is_the_aggregator_on_the_concatenated_rows(aggregator: Aggregator) -> None:
    model, _ = _model()
    trunk = list(model.trunk.parameters())
    for p in trunk:
        p.jac = torch.randn(TASKS, *p.shape, dtype=p.dtype)
        p.grad = torch.ones_like(p)
    rows = torch.cat([p.jac.reshape(TASKS, -1) for p in trunk], dim=1)
    torch.manual_seed(1)
    expected = aggregator(rows) + 1
    if isinstance(aggregator, Stateful):
        aggregator.reset()
    torch.manual_seed(1)
    jac_to_grad(trunk, aggregator, retain_jac=True)
    assert relative_error(torch.cat([p.grad.reshape(-1) for p in trunk]), expected) <= BOUND
    assert all(hasattr(p, "jac") for p in trunk)


def test_gramian_route_equals_concatenation_and_needs_no_hooks() -> None:
    model, _ = _model()
    trunk = list(model.trunk.parameters())
    for p in trunk:
        p.jac = torch.randn(TASKS, *p.shape, dtype=p.dtype)
    first = jac_to_grad(trunk, UPGrad(), retain_jac=True)
    grads = torch.cat([p.grad.reshape(-1) for p in trunk])
    second = jac_to_grad(trunk, UPGrad(), retain_jac=True, optimize_gramian_computation=True)
    assert relative_error(second, first) <= 1e-9  # the quadratic program amplifies rounding
    both = torch.cat([p.grad.reshape(-1) for p in trunk])
    assert relative_error(both, 2 * grads) <= 1e-9
    hooked = UPGrad()
    hooked.register_forward_hook(lambda *_: None)
    for aggregator in (hooked, Mean()):
        with pytest.raises(ValueError, match="optimize_gramian_computation=False"):
            jac_to_grad(trunk, aggregator, optimize_gramian_computation=True)


def test_hooks_of_aggregator_and_weightings_run() -> None:
    p = torch.zeros(3, requires_grad=True)
    p.jac = torch.randn(2, 3)
    aggregator = UPGrad()
    calls = []
    aggregator.gramian_weighting.register_forward_hook(lambda *_: calls.append("gramian"))
    aggregator.weighting.register_forward_hook(lambda m, i, out: calls.append("rows") or 2 * out)
    aggregator.register_forward_hook(lambda m, i, out: calls.append("aggregator") or out + 1)
    rows = p.jac.clone()
    weights = jac_to_grad([p], aggregator)
    assert calls == ["gramian", "rows", "aggregator"]
    assert torch.allclose(p.grad, weights @ rows + 1)
    assert torch.allclose(weights, 2 * UPGrad().weighting(rows))


def test_groups_are_aggregated_each_by_its_own() -> None:
    model, x = _model()
    features, losses = model(x)
    mtl_backward(losses, features=features)
    groups = [list(model.trunk[0].parameters()), list(model.trunk[2].parameters())]
    expected = [
        UPGrad()(torch.cat([p.jac.reshape(TASKS, -1) for p in group], dim=1)) for group in groups
    ]
    weights = jac_to_grad_groups(groups, [UPGrad(), UPGrad()])
    assert len(weights) == 2
    for group, vector in zip(groups, expected, strict=True):
        assert relative_error(torch.cat([p.grad.reshape(-1) for p in group]), vector) <= BOUND
    stateful = GradVac()
    with pytest.raises(ValueError, match="an instance for each"):
        jac_to_grad_groups(groups, [stateful, stateful])
    with pytest.raises(ValueError, match="1 aggregators for 2 groups"):
        jac_to_grad_groups(groups, [UPGrad()])
    stateless = UPGrad()
    with pytest.raises(ValueError, match=r"group 0: .*\(6, 5\)"):
        jac_to_grad_groups(groups, [stateless, stateless])


def test_wrong_arguments_are_refused() -> None:
    model, x = _model()
    features, losses = model(x)
    with pytest.raises(ValueError, match="Found no `tensors`"):
        mtl_backward([], features=features)
    with pytest.raises(ValueError, match="Found no `features`"):
        mtl_backward(losses, features=[])
    with pytest.raises(ValueError, match="3 `tasks_params` for 4"):
        mtl_backward(losses, features=features, tasks_params=[[], [], []])
    with pytest.raises(ValueError, match="both in"):
        everything = list(model.parameters())
        mtl_backward(losses, features=features, tasks_params=[everything] * 4)
    with pytest.raises(ValueError, match="count=-1"):
        mtl_backward(losses, features=features, count=-1)
    with pytest.raises(ValueError, match="one for each of the 4"):
        mtl_backward(losses, features=features, count=[1, 2])
    with pytest.raises(ValueError, match="Found no tensors in group 0"):
        jac_to_grad([], UPGrad())
    a, b = torch.zeros(1, requires_grad=True), torch.zeros(2, requires_grad=True)
    a.jac, b.jac = torch.ones(2, 1), torch.ones(3, 2)
    with pytest.raises(ValueError, match="same number of rows"):
        jac_to_grad([a, b], UPGrad())
    frozen = torch.zeros(1)
    frozen.jac = torch.ones(2, 1)
    with pytest.raises(ValueError, match="requires_grad=False"):
        jac_to_grad([frozen], UPGrad())
    assert all(p.grad is None and not hasattr(p, "jac") for p in model.parameters())


def test_nonfinite_losses_and_rows_write_nothing() -> None:
    model, x = _model()
    features, losses = model(x)
    losses[2] = losses[2] * float("nan")
    with pytest.raises(NonFiniteObjectiveError, match="task 2"):
        mtl_backward(losses, features=features)
    assert all(p.grad is None and not hasattr(p, "jac") for p in model.parameters())
    p = torch.zeros(3, requires_grad=True)
    p.jac = torch.tensor([[0.0, 1.0, 2.0], [0.0, float("inf"), 2.0]])
    with pytest.raises(NonFiniteObjectiveError, match="objective 1"):
        jac_to_grad([p], UPGrad())
    assert p.grad is None


def test_a_task_without_samples_counts_nothing() -> None:
    model, x = _model()
    features, losses = model(x)
    rows = jacobian(torch.stack(losses), model.trunk.parameters())
    losses[1] = losses[1] * float("nan")
    mtl_backward(losses, features=features, count=[7, 0, 7, 7])
    found = torch.cat([p.jac.reshape(TASKS, -1) for p in model.trunk.parameters()], dim=1)
    rows[1] = 0
    assert relative_error(found, rows) <= BOUND
    assert not model.heads[1].weight.grad.any()


def test_attach_in_one_process_changes_nothing_and_can_be_undone() -> None:
    model, x = _model()
    distribution = attach(model)
    features, losses = model(x)
    mtl_backward(losses, features=features)
    with_attach = [p.jac.clone() for p in model.trunk.parameters()]
    for p in model.trunk.parameters():
        del p.jac
    distribution.detach()
    features, losses = model(x)
    mtl_backward(losses, features=features)
    for p, jac in zip(model.trunk.parameters(), with_attach, strict=True):
        assert torch.equal(p.jac, jac)


def test_parity_with_the_peer() -> None:
    pytest.importorskip("torchjd")
    from torchjd.autojac import jac_to_grad as peer_jac_to_grad
    from torchjd.autojac import mtl_backward as peer_mtl_backward

    (mine, x), (theirs, _) = _model(), _model()
    features, losses = mine(x)
    mtl_backward(losses, features=features)
    jac_to_grad(mine.trunk.parameters(), UPGrad())
    features, losses = theirs(x)
    # The peer frees nodes that heads share with the first of them.
    peer_mtl_backward(losses, features=features, retain_graph=True)
    from torchjd.aggregation import UPGrad as PeerUPGrad

    peer_jac_to_grad(theirs.trunk.parameters(), PeerUPGrad())
    for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert relative_error(p.grad, q.grad) <= 1e-9
