"""``jac_to_grad_groups``: all or nothing, every tensor once, every state for itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from jddist.aggregation import (
    Aggregator,
    AlignedMTL,
    Constant,
    GradVac,
    GramianWeightedAggregator,
    PCGrad,
    UPGrad,
)
from jddist.autojac import backward, jac_to_grad, jac_to_grad_groups
from jddist.errors import NonFiniteObjectiveError
from jddist.grouping import per_layer, per_network

BOUND = 1e-9  # the quadratic programs of UPGrad amplify rounding


def _parameter(*shape: int, rows: int = 3, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    parameter = nn.Parameter(torch.zeros(shape, dtype=dtype))
    parameter.jac = torch.randn((rows, *shape), dtype=dtype)
    return parameter


def test_a_bad_group_leaves_every_grad_untouched() -> None:
    good, bad = _parameter(2), _parameter(3)
    bad.jac[1, 0] = float("nan")
    with pytest.raises(NonFiniteObjectiveError, match="objective 1"):
        jac_to_grad_groups([[good], [bad]], [UPGrad(), UPGrad()])
    assert good.grad is None and bad.grad is None
    assert good.jac.shape == (3, 2)


class _Failing(Aggregator):
    def forward(self, matrix: Tensor, /) -> Tensor:
        raise ArithmeticError("no")


def test_a_failing_aggregator_leaves_every_grad_untouched() -> None:
    first, second = _parameter(2), _parameter(3)
    with pytest.raises(ArithmeticError):
        jac_to_grad_groups([[first], [second]], [UPGrad(), _Failing()])
    assert first.grad is None and second.grad is None


def test_every_tensor_is_aggregated_once() -> None:
    p, q = _parameter(2), _parameter(3)
    with pytest.raises(ValueError, match="more than once in group 0"):
        jac_to_grad([p, q, p], UPGrad())
    with pytest.raises(ValueError, match="more than once in the groups 0 and 1"):
        jac_to_grad_groups([[p], [q, p]], [UPGrad(), UPGrad()])
    assert p.grad is None and q.grad is None


def test_state_is_not_shared_through_the_weighting_either() -> None:
    p, q = _parameter(2), _parameter(3)
    weighting = GradVac().gramian_weighting
    pair = [GramianWeightedAggregator(weighting), GramianWeightedAggregator(weighting)]
    with pytest.raises(ValueError, match="GradVacWeighting for several groups"):
        jac_to_grad_groups([[p], [q]], pair)


def test_a_stateless_aggregator_may_serve_all_groups() -> None:
    p, q = _parameter(2), _parameter(3)
    expected = [UPGrad()(p.jac.clone()), UPGrad()(q.jac.clone())]
    shared = UPGrad()
    weights = jac_to_grad_groups([[p], [q]], [shared, shared], retain_jac=True)
    assert torch.equal(p.grad, expected[0]) and torch.equal(q.grad, expected[1])
    assert torch.equal(weights[0] @ p.jac, p.grad)
    assert hasattr(p, "jac") and hasattr(q, "jac")


def test_many_groups_equal_one_call_for_each() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    jacs = [torch.randn(3, *p.shape, dtype=p.dtype) for p in model.parameters()]
    results = []
    for at_once in (True, False):
        groups = per_layer(model)
        for p, j in zip(model.parameters(), jacs, strict=True):
            p.grad, p.jac = None, j.clone()
        aggregators = [PCGrad() for _ in groups]
        torch.manual_seed(3)
        if at_once:
            weights = jac_to_grad_groups(groups, aggregators)
        else:
            weights = [jac_to_grad(g, a) for g, a in zip(groups, aggregators, strict=True)]
        results.append([*weights, *(p.grad for p in model.parameters())])
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


def test_complex_tensors_are_refused() -> None:
    """J J^T without a conjugate is no Gramian, and its real part none of anything."""
    x = torch.randn(2, 3, dtype=torch.complex128)
    weight = torch.randn(3, dtype=torch.complex128, requires_grad=True)
    backward((x @ weight).abs())
    with pytest.raises(ValueError, match=r"tensor 0 of shape \(3,\) in group 0.*complex"):
        jac_to_grad([weight], UPGrad())
    assert weight.grad is None


def test_tensors_without_jac_are_named_with_index_and_shape() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    for p in model[0].parameters():
        p.jac = torch.ones(2, *p.shape)
    model[1].weight.jac = torch.ones(2, 2, 4)
    with pytest.raises(ValueError, match=r"in group 1: 1 of shape \(2,\)"):
        jac_to_grad_groups(per_network(model), [UPGrad(), UPGrad()])
    assert model[0].weight.grad is None


@pytest.mark.parametrize("optimize", [False, True])
def test_empty_and_scalar_and_mixed_parameters(optimize: bool) -> None:
    parameters = [_parameter(0), _parameter(), _parameter(2, 2), _parameter(3, dtype=torch.float32)]
    rows = torch.cat([p.jac.reshape(3, p.numel()).double() for p in parameters], dim=1)
    expected = UPGrad()(rows)
    jac_to_grad(parameters, UPGrad(), optimize_gramian_computation=optimize)
    assert [p.grad.dtype for p in parameters] == [p.dtype for p in parameters]
    found = torch.cat([p.grad.reshape(-1).double() for p in parameters])
    # One tensor is float32: so are its gradient and its share of the Gramian.
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stage", ["aggregator", "weighting"])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_the_gramian_route_refuses_what_needs_the_jacobian(stage: str, kind: str) -> None:
    p = _parameter(2)
    aggregator = UPGrad()
    hooked = aggregator if stage == "aggregator" else aggregator.weighting
    handle = getattr(hooked, kind)(lambda *_: None)
    with pytest.raises(ValueError, match="without forward hooks"):
        jac_to_grad([p], aggregator, optimize_gramian_computation=True)
    assert hasattr(p, "jac") and p.grad is None
    handle.remove()
    jac_to_grad([p], aggregator, optimize_gramian_computation=True)


def test_hooks_of_the_gramian_weighting_run_on_the_gramian_route() -> None:
    p = _parameter(2)
    aggregator = UPGrad()
    plain = aggregator.weighting(p.jac)
    aggregator.gramian_weighting.register_forward_hook(lambda m, i, out: 3 * out)
    rows = p.jac
    weights = jac_to_grad([p], aggregator, optimize_gramian_computation=True)
    assert torch.allclose(weights, 3 * plain, rtol=BOUND)
    assert torch.allclose(p.grad, weights @ rows, rtol=BOUND)


@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize("method", [Constant, AlignedMTL])
def test_weights_that_require_a_gradient_leave_no_graph(
    method: type[Constant | AlignedMTL], optimize: bool
) -> None:
    if method is Constant and optimize:
        pytest.skip("Constant has no Gramian to optimize")
    aggregator = method(torch.ones(3, requires_grad=True))
    parameter = _parameter(2)
    for _ in range(2):  # accumulating into a gradient with a graph is an error
        parameter.jac = torch.randn((3, 2), dtype=torch.float64)
        weights = jac_to_grad([parameter], aggregator, optimize_gramian_computation=optimize)
        assert not parameter.grad.requires_grad
        assert weights is not None and not weights.requires_grad
