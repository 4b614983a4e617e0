"""Base classes: checks, hooks, composition, flattening, differentiation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from jddist.aggregation import (
    IMTLG,
    MGDA,
    PCD,
    Aggregator,
    AlignedMTL,
    CAGrad,
    ConFIG,
    Constant,
    DualProj,
    FairGrad,
    Flattening,
    GradVac,
    GramianWeightedAggregator,
    Krum,
    Mean,
    MeanWeighting,
    MoCo,
    NashMTL,
    PCGrad,
    Random,
    RandomWeighting,
    Sum,
    UPGrad,
    UPGradWeighting,
    WeightedAggregator,
    Weighting,
)
from jddist.linalg.gramian import compute_gramian
from tests.unit.aggregation._matrices import make_matrix

OFF_AUTOGRAD = [
    UPGrad(),
    DualProj(),
    MGDA(),
    PCGrad(),
    GradVac(),
    CAGrad(0.5),
    ConFIG(),
    FairGrad(1.0),
    IMTLG(),
    NashMTL(3),
    PCD(),
]


@pytest.mark.parametrize("shape", [(), (3,), (1, 2, 3), (1, 2, 3, 4)])
def test_a_jacobian_has_two_dimensions(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="shape"):
        Mean()(torch.ones(shape))


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 3, 3, 2)])
def test_a_gramian_is_square(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="Flattening"):
        UPGradWeighting()(torch.ones(shape))


@pytest.mark.parametrize("aggregator", [*OFF_AUTOGRAD, AlignedMTL(), Krum(0)], ids=lambda a: str(a))
def test_hooks_of_every_level_run(aggregator: GramianWeightedAggregator) -> None:
    seen: list[str] = []

    def note(name: str) -> None:
        module = dict(aggregator.named_modules(remove_duplicate=False))[name]
        module.register_forward_pre_hook(lambda *_: seen.append(f"before {name}"))
        module.register_forward_hook(lambda *_: seen.append(f"after {name}"))

    for name in ("", "weighting", "gramian_weighting"):
        note(name)
    aggregator(make_matrix("conflicting", 3, seed=0))
    assert seen == [
        "before ",
        "before weighting",
        "before gramian_weighting",
        "after gramian_weighting",
        "after weighting",
        "after ",
    ]


def test_a_hook_may_replace_the_weights() -> None:
    matrix = make_matrix("conflicting", 3, seed=0)
    aggregator = UPGrad()
    aggregator.gramian_weighting.register_forward_hook(lambda *_: torch.ones(3).double())
    assert_close(aggregator(matrix), matrix.sum(dim=0))


def test_combination_is_the_weighted_sum_of_rows() -> None:
    matrix = make_matrix("random", 3, seed=0)
    aggregator = UPGrad()
    weights = aggregator.gramian_weighting(matrix @ matrix.T)
    assert torch.equal(aggregator.weighting(matrix), weights)
    assert_close(aggregator(matrix), weights @ matrix)


def test_composition() -> None:
    matrix = make_matrix("conflicting", 3, seed=0)
    weighting = UPGradWeighting() << compute_gramian
    assert isinstance(weighting, Weighting)
    assert_close(WeightedAggregator(weighting)(matrix), UPGrad()(matrix))
    assert_close((weighting << torch.t)(matrix.T), weighting(matrix))


@pytest.mark.parametrize("half_shape", [(), (4,), (2, 3), (3, 2), (2, 3, 2)])
def test_flattening(half_shape: tuple[int, ...]) -> None:
    m = int(torch.Size(half_shape).numel())
    jacobian = make_matrix("conflicting", m, seed=0)
    generalized = compute_gramian(jacobian.reshape(*half_shape, -1), 1)
    weights = Flattening(UPGradWeighting())(generalized)
    assert weights.shape == half_shape
    assert_close(weights.flatten(), UPGradWeighting()(jacobian @ jacobian.T))


def test_flattening_refuses_a_second_half_in_forward_order() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3, 2, 3\)"):
        Flattening(UPGradWeighting())(torch.ones(2, 3, 2, 3))


def test_flattening_runs_hooks() -> None:
    calls: list[int] = []
    weighting = UPGradWeighting()
    flattening = Flattening(weighting)
    for module in (weighting, flattening):
        module.register_forward_hook(lambda *_: calls.append(1))
    flattening(torch.eye(2))
    assert len(calls) == 2


@pytest.mark.parametrize("aggregator", OFF_AUTOGRAD, ids=lambda a: str(a))
def test_methods_that_leave_autograd_build_no_graph(aggregator: Aggregator) -> None:
    matrix = make_matrix("random", 3, seed=0).requires_grad_()
    assert not aggregator(matrix).requires_grad
    assert torch.is_grad_enabled()


def test_a_weighting_may_leave_autograd() -> None:
    class RowSums(Weighting):
        differentiable = False

        def forward(self, gramian: Tensor, /) -> Tensor:
            return gramian.sum(dim=1)

    assert not RowSums()(torch.eye(2, requires_grad=True)).requires_grad
    assert not GramianWeightedAggregator(RowSums())(torch.eye(2, requires_grad=True)).requires_grad


@pytest.mark.parametrize("aggregator", [Mean(), Sum(), Random(), Constant(torch.ones(3))], ids=str)
def test_methods_that_combine_rows_are_differentiable(aggregator: Aggregator) -> None:
    matrix = make_matrix("random", 3, seed=0).requires_grad_()
    assert aggregator(matrix).requires_grad
    with torch.no_grad():
        assert not aggregator(matrix).requires_grad


@pytest.mark.parametrize("mode", ["min", "median", "rmse"])
def test_alignedmtl_is_differentiable(mode: Any) -> None:
    matrix = make_matrix("random", 3, seed=0).requires_grad_()
    assert torch.autograd.gradcheck(AlignedMTL(scale_mode=mode), matrix)


def test_krum_is_differentiable_for_a_constant_selection() -> None:
    matrix = make_matrix("random", 4, seed=0).requires_grad_()
    assert torch.autograd.gradcheck(Krum(1, 2), matrix)


@pytest.mark.parametrize("weighting", [MeanWeighting(), RandomWeighting()])
def test_row_counts_may_be_read_off_anything(weighting: Weighting) -> None:
    matrix = make_matrix("random", 3, seed=0)
    results = []
    for statistic in (matrix, matrix[:, :2], matrix[:, :0], matrix @ matrix.T):
        torch.manual_seed(0)
        results.append(weighting(statistic))
    assert all(torch.equal(result, results[0]) for result in results)


def test_a_new_method_is_short() -> None:
    class Steepest(GramianWeightedAggregator):
        def __init__(self) -> None:
            super().__init__(SteepestWeighting())

    class SteepestWeighting(Weighting):
        def forward(self, gramian: Tensor, /) -> Tensor:
            longest = gramian.diagonal().argmax()
            return nn.functional.one_hot(longest, gramian.shape[0]).to(gramian)

    matrix = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    assert torch.equal(Steepest()(matrix), matrix[1])
    assert repr(Steepest()) == "Steepest()"
    assert Steepest.columnwise is False


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", [UPGrad, DualProj, MoCo])
def test_jacobians_of_half_precision(method: type[Aggregator], dtype: torch.dtype) -> None:
    # Rounded to 8 bits, the Gramian of more rows than columns is indefinite beyond what UPGrad
    # regularizes; squared in float16, these rows overflow.
    matrix = (100.0 * make_matrix("random", 6, 0, n=3)).to(dtype)
    found, expected = method()(matrix), method()(matrix.float())
    assert found.dtype == dtype
    # The weights, all below 1, and each of the m sums are rounded to the dtype.
    bound = 7 * torch.finfo(dtype).eps * float(matrix.float().abs().sum())
    assert float((found - expected).abs().max()) <= bound
