"""Mathematical properties of the methods, by name."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from jddist.aggregation import (
    IMTLG,
    MGDA,
    PCD,
    Aggregator,
    AlignedMTL,
    ConFIG,
    Constant,
    ConstantWeighting,
    DualProj,
    DualProjWeighting,
    FairGrad,
    GradVac,
    GradVacWeighting,
    Mean,
    MeanWeighting,
    MGDAWeighting,
    PCGrad,
    PCGradWeighting,
    Random,
    RandomWeighting,
    Sum,
    SumWeighting,
    UPGrad,
    UPGradWeighting,
    Weighting,
)
from jddist.linalg import QuadprogProjector
from tests.unit.aggregation._matrices import KINDS, make_matrix, small_matrices

quick = settings(max_examples=40, deadline=None, derandomize=True)
REG_EPS = 1e-4


def _projector() -> QuadprogProjector:
    return QuadprogProjector(norm_eps=0.0, reg_eps=REG_EPS)


@pytest.mark.parametrize("weighting_type", [UPGradWeighting, DualProjWeighting])
@quick
@given(matrix=small_matrices())
def test_projections_are_non_conflicting(
    weighting_type: type[UPGradWeighting | DualProjWeighting], matrix: Tensor
) -> None:
    gramian = matrix @ matrix.T
    weights = weighting_type(projector=_projector())(gramian)
    # Optimality reads (G / trace + reg_eps I) w >= 0, so conflict up to reg_eps * trace * w is the
    # price of the regularization; the rest is rounding.
    trace = gramian.trace()
    allowed = REG_EPS * trace * weights + 1e-9 * trace * (1.0 + weights.abs().max())
    assert (gramian @ weights >= -allowed).all()


@quick
@given(matrix=small_matrices())
def test_mgda_is_non_conflicting(matrix: Tensor) -> None:
    epsilon = 1e-3
    gramian = matrix @ matrix.T
    weights = MGDAWeighting(epsilon=epsilon, max_iters=100_000)(gramian)
    # The last step is a gap over |row - result|^2 and below epsilon: gap <= 4 epsilon max|row|^2;
    # and taking that step moves J x by 2 epsilon max|row|^2 at most.
    assert (gramian @ weights >= -6.0 * epsilon * gramian.diagonal().max()).all()


@pytest.mark.parametrize("kind", KINDS)
def test_mgda_finds_the_shortest_vector(kind: str) -> None:
    matrix = make_matrix(kind, 4, seed=2)
    weights = MGDAWeighting(epsilon=1e-6, max_iters=100_000)(matrix @ matrix.T)
    length = (weights @ matrix).square().sum()
    others = torch.rand(2_000, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    others = others / others.sum(dim=1, keepdim=True)
    scale = matrix.square().sum(dim=1).max()
    # Twice the greatest gap at which a step of 1e-6 ends the search, as above.
    assert length <= (others @ matrix).square().sum(dim=1).min() + 8e-6 * scale


@pytest.mark.parametrize(
    "aggregator",
    [UPGrad(projector=_projector()), DualProj(projector=_projector()), Mean(), Sum()],
    ids=str,
)
@quick
@given(matrix=small_matrices(), seed=st.integers(0, 1000))
def test_permutation_equivariance(aggregator: Aggregator, matrix: Tensor, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(matrix.shape[0], generator=generator)
    # Weights grow to 1 / reg_eps = 1e4 with an error of 1e-16 / reg_eps each: 1e-9 covers both.
    assert_close(aggregator(matrix[order]), aggregator(matrix), atol=1e-9, rtol=1e-9)


@quick
@given(matrix=small_matrices(), seed=st.integers(0, 1000))
def test_permutation_equivariance_of_mgda(matrix: Tensor, seed: int) -> None:
    order = torch.randperm(matrix.shape[0], generator=torch.Generator().manual_seed(seed))
    mgda = MGDA(epsilon=1e-3, max_iters=100_000)
    lengths = [mgda(m).square().sum() for m in (matrix, matrix[order])]
    # Ties are broken by position, but both searches end within a gap of 4 epsilon max|row|^2.
    scale = float(matrix.square().sum(dim=1).max())
    assert_close(lengths[0], lengths[1], rtol=0.0, atol=8e-3 * scale)


@pytest.mark.parametrize("m", [1, 2, 4, 7])
@pytest.mark.parametrize("seed", range(5))
def test_upgrad_is_linear_under_scaling(m: int, seed: int) -> None:
    # Without regularization the property is exact; J has full rank, so none is needed.
    aggregator = UPGrad(projector=QuadprogProjector(norm_eps=0.0, reg_eps=0.0))
    matrix = make_matrix("conflicting", m, seed, n=4 * m + 4)
    generator = torch.Generator().manual_seed(seed)
    c, d = torch.rand(2, m, 1, generator=generator, dtype=torch.float64) + 0.1
    combined = aggregator((2.0 * c + 0.5 * d) * matrix)
    expected = 2.0 * aggregator(c * matrix) + 0.5 * aggregator(d * matrix)
    # Condition numbers here stay below 1e4.
    assert_close(combined, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(
    "weighting",
    [MGDAWeighting(), RandomWeighting(), MeanWeighting()],
    ids=lambda w: type(w).__name__,
)
@quick
@given(matrix=small_matrices(), exponent=st.integers(-6, 6))
def test_weights_on_the_simplex(weighting: Weighting, matrix: Tensor, exponent: int) -> None:
    for dtype in (torch.float64, torch.float32):
        gramian = (10.0**exponent * matrix @ matrix.T).to(dtype)
        weights = weighting(gramian)
        assert (weights >= 0.0).all()
        # 100 Frank-Wolfe steps, each rounding the sum by m ulp at most.
        assert abs(float(weights.sum()) - 1.0) <= 500 * torch.finfo(dtype).eps


@pytest.mark.filterwarnings("ignore:The Gramian's trace")
@pytest.mark.parametrize(
    "weighting_type",
    [
        DualProjWeighting,
        GradVacWeighting,
        MGDAWeighting,
        MeanWeighting,
        PCGradWeighting,
        RandomWeighting,
        SumWeighting,
        UPGradWeighting,
    ],
)
@quick
@given(matrix=small_matrices(), exponent=st.integers(-12, 12))
def test_finite_on_finite_gramians(
    weighting_type: type[Weighting], matrix: Tensor, exponent: int
) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        gramian = (10.0**exponent * matrix @ matrix.T).to(torch.float32).to(dtype)
        if dtype == torch.bfloat16 and weighting_type in (UPGradWeighting, DualProjWeighting):
            continue  # Rounded to 8 bits, the Gramian is indefinite beyond reg_eps: an error.
        weighting = weighting_type()
        for _ in range(2):
            weights = weighting(gramian)
            assert weights.shape == (matrix.shape[0],)
            assert weights.dtype == dtype
            assert weights.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pcgrad_does_not_project_on_rows_too_short_for_a_square(dtype: torch.dtype) -> None:
    rows = torch.tensor([[1e10, 0.0], [-1e-25, 0.0], [0.0, 1.0]])
    gramian = (rows @ rows.T).to(dtype)
    assert gramian[1, 1] == 0.0 and gramian[0, 1] < 0.0
    # The second row is projected on the first, which leaves nothing of it, but not the reverse.
    expected = torch.tensor([1.0 + 1e-35, 1.0, 1.0], dtype=dtype)
    assert torch.equal(PCGradWeighting()(gramian), expected)


AGGREGATORS = [
    AlignedMTL(),
    ConFIG(),
    FairGrad(0.0),
    IMTLG(),
    PCD(),
    MGDA(),
    PCGrad(),
    GradVac(),
    Mean(),
    Sum(),
    Random(),
    UPGrad(),
    DualProj(),
]


@pytest.mark.parametrize("aggregator", AGGREGATORS, ids=str)
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0), (1, 1)])
def test_empty_and_smallest_jacobians(aggregator: Aggregator, shape: tuple[int, int]) -> None:
    vector = aggregator(torch.ones(shape))
    assert vector.shape == shape[1:]
    assert vector.isfinite().all()


@pytest.mark.parametrize("aggregator", AGGREGATORS, ids=str)
def test_one_objective_points_along_its_gradient(aggregator: Aggregator) -> None:
    row = torch.tensor([[1.0, -2.0, 3.0]], dtype=torch.float64)
    assert_close(aggregator(row), row[0])


def test_rows_in_agreement_are_only_averaged_or_summed() -> None:
    matrix = torch.tensor([[1.0, 0.5], [0.5, 1.0], [1.0, 1.0]], dtype=torch.float64)
    for aggregator in (UPGrad(), DualProj()):
        assert torch.equal(aggregator(matrix), Mean()(matrix))
    assert torch.equal(PCGrad()(matrix), Sum()(matrix))
    assert torch.equal(GradVac()(matrix), Sum()(matrix))
    weights = torch.ones(3, dtype=torch.float64)
    assert torch.equal(Constant(weights)(matrix), Sum()(matrix))
    assert torch.equal(ConstantWeighting(weights)(matrix), weights)
