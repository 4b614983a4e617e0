"""Mathematical properties, by name, of the methods with a memory, a mask or two batches."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from jddist.aggregation import (
    DBMTL,
    Aggregator,
    CRMOGMWeighting,
    ExcessMTL,
    ExcessMTLWeighting,
    GradDrop,
    GradNorm,
    GradNormWeighting,
    GramianWeightedAggregator,
    MeanWeighting,
    MoCo,
    MoDoWeighting,
    RandomWeighting,
    SDMGradWeighting,
    TrimmedMean,
    UPGradWeighting,
    Weighting,
)
from jddist.aggregation._losses import NeedsLosses
from tests.unit.aggregation._matrices import KINDS, make_matrix, small_matrices

quick = settings(max_examples=40, deadline=None, derandomize=True)
seeds = st.integers(0, 1000)

AGGREGATORS: dict[str, Callable[[], Aggregator]] = {
    "CRMOGM(UPGrad)": lambda: GramianWeightedAggregator(CRMOGMWeighting(UPGradWeighting())),
    "DBMTL": DBMTL,
    "ExcessMTL": lambda: ExcessMTL(n_warmup_steps=1),
    "GradDrop": GradDrop,
    "GradNorm": GradNorm,
    "MoCo": MoCo,
    "TrimmedMean": lambda: TrimmedMean(0),
}
every_aggregator = pytest.mark.parametrize("name", AGGREGATORS)


def _state_losses(method: nn.Module, losses: Tensor) -> None:
    for module in method.modules():
        if isinstance(module, NeedsLosses):
            module.set_losses(losses)
            return


@pytest.mark.parametrize(
    "make",
    [
        MoDoWeighting,
        lambda: SDMGradWeighting(lambda_=0.5),
        lambda: CRMOGMWeighting(RandomWeighting()),
        lambda: CRMOGMWeighting(MeanWeighting(), initial_weights=None),
    ],
    ids=["MoDo", "SDMGrad", "CRMOGM(Random)", "CRMOGM(Mean)"],
)
@quick
@given(first=small_matrices(), second=small_matrices(), exponent=st.integers(-6, 6))
def test_weights_on_the_simplex(
    make: Callable[[], Weighting], first: Tensor, second: Tensor, exponent: int
) -> None:
    m, n = min(len(first), len(second)), min(first.shape[1], second.shape[1])
    products = 10.0**exponent * first[:m, :n] @ second[:m, :n].T
    for dtype in (torch.float64, torch.float32):
        weighting = make()
        for _ in range(3):
            weights = weighting(products.to(dtype))
            assert (weights >= 0.0).all()
            # Some roundings of m weights, however large the products.
            assert abs(float(weights.sum()) - 1.0) <= 4 * m * torch.finfo(dtype).eps


@quick
@given(matrix=small_matrices(), exponent=st.integers(-6, 6))
def test_excess_mtl_weighs_on_the_simplex(matrix: Tensor, exponent: int) -> None:
    for dtype in (torch.float64, torch.float32):
        weighting = ExcessMTLWeighting()
        for _ in range(3):
            weights = weighting((10.0**exponent * matrix).to(dtype))
            assert (weights >= 0.0).all()
            assert abs(float(weights.sum()) - 1.0) <= 20 * torch.finfo(dtype).eps


@quick
@given(matrix=small_matrices(), exponent=st.integers(-6, 6))
def test_gradnorm_weights_are_positive_and_sum_to_m(matrix: Tensor, exponent: int) -> None:
    for dtype in (torch.float64, torch.float32):
        weighting = GradNormWeighting()
        for call in range(4):
            _state_losses(weighting, torch.arange(float(call), call + len(matrix)))
            weights = weighting((10.0**exponent * matrix @ matrix.T).to(dtype))
            assert (weights > 0.0).all()
            m = len(matrix)
            assert abs(float(weights.sum()) - m) <= 8 * m * torch.finfo(dtype).eps


@every_aggregator
@quick
@given(matrix=small_matrices(), seed=seeds)
def test_permutation_equivariance(name: str, matrix: Tensor, seed: int) -> None:
    """The order of the objectives does not matter, call after call."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(matrix), generator=generator)
    if name == "GradNorm":  # A length equal to the mean has a slope of either sign: no ties here.
        matrix = matrix + torch.rand(matrix.shape, generator=generator, dtype=torch.float64)
    some, other = AGGREGATORS[name](), AGGREGATORS[name]()
    for call in range(3):
        jacobian = matrix * (1.0 + call)
        losses = torch.arange(1.0, len(matrix) + 1.0, dtype=torch.float64) / (call + 1)
        _state_losses(some, losses)
        _state_losses(other, losses[order])
        torch.manual_seed(call)
        expected = some(jacobian)
        torch.manual_seed(call)
        actual = other(jacobian[order])
        # Entries below 100; weights up to 1 / reg_eps = 1e4 (UPGrad), ratios of lengths below 1e3
        # (DB-MTL), of a rounding error of 1e-16 each.
        assert_close(actual, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.filterwarnings("ignore:The Gramian's trace")
@every_aggregator
@quick
@given(matrix=small_matrices(), exponent=st.integers(-12, 12))
def test_finite_on_finite_jacobians(name: str, matrix: Tensor, exponent: int) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        if dtype == torch.bfloat16 and "UPGrad" in name:
            continue  # Rounded to 8 bits, the Gramian is indefinite beyond reg_eps: an error.
        jacobian = (10.0**exponent * matrix).to(torch.float32).to(dtype)
        aggregator = AGGREGATORS[name]()
        for _ in range(3):
            _state_losses(aggregator, torch.arange(float(len(matrix))))
            vector = aggregator(jacobian)
            assert vector.dtype == dtype
            assert vector.isfinite().all()


@pytest.mark.parametrize("make", [MoDoWeighting, SDMGradWeighting])
@quick
@given(matrix=small_matrices(), exponent=st.integers(-12, 12))
def test_finite_on_finite_products(
    make: Callable[[], Weighting], matrix: Tensor, exponent: int
) -> None:
    for dtype in (torch.float64, torch.float32):
        weighting = make()
        for _ in range(3):
            products = 10.0**exponent * matrix @ matrix.roll(1, 0).T
            assert weighting(products.to(dtype)).isfinite().all()


@every_aggregator
@pytest.mark.parametrize("shape", [(1, 0), (1, 1), (3, 0), (2, 1)])
def test_smallest_jacobians(name: str, shape: tuple[int, int]) -> None:
    aggregator = AGGREGATORS[name]()
    for _ in range(2):
        _state_losses(aggregator, torch.ones(shape[0]))
        vector = aggregator(torch.ones(shape))
        assert vector.shape == shape[1:]
        assert vector.isfinite().all()


@pytest.mark.parametrize("name", sorted(set(AGGREGATORS) - {"TrimmedMean"}))
def test_no_objectives(name: str) -> None:
    aggregator = AGGREGATORS[name]()
    for _ in range(2):
        _state_losses(aggregator, torch.ones(0))
        assert torch.equal(aggregator(torch.ones(0, 3)), torch.zeros(3))


@pytest.mark.parametrize("kind", KINDS)
@quick
@given(seed=seeds)
def test_graddrop_keeps_one_sign_of_each_column(kind: str, seed: int) -> None:
    matrix = make_matrix(kind, 4, seed)
    torch.manual_seed(seed)
    vector = GradDrop()(matrix)
    positive, negative = matrix.clamp(min=0).sum(dim=0), matrix.clamp(max=0).sum(dim=0)
    # Sums of four numbers, in another order.
    slack = 1e-12 * matrix.norm()
    assert (((vector - positive).abs() <= slack) | ((vector - negative).abs() <= slack)).all()


@quick
@given(matrix=small_matrices(), seed=seeds)
def test_graddrop_leaking_everything_is_the_sum(matrix: Tensor, seed: int) -> None:
    torch.manual_seed(seed)
    assert_close(GradDrop(leak=torch.ones(len(matrix)))(matrix), matrix.sum(dim=0))


@quick
@given(matrix=small_matrices(), trim=st.integers(0, 2), outlier=st.integers(-1000, 1000))
def test_trimmed_mean_stays_among_the_others(matrix: Tensor, trim: int, outlier: int) -> None:
    """Up to `trim_number` rows cannot pull it out of the range of the others."""
    if len(matrix) < 2 * trim + 1:
        return
    spoiled = matrix.clone()
    spoiled[:trim] = float(outlier)
    vector = TrimmedMean(trim)(spoiled)
    honest = matrix[trim:]
    slack = 1e-12 * (1.0 + matrix.abs().max())
    assert (vector <= honest.max(dim=0).values + slack).all()
    assert (vector >= honest.min(dim=0).values - slack).all()


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"zero row"}))
def test_db_mtl_gives_all_rows_the_length_of_the_longest(kind: str) -> None:
    matrix, aggregator = make_matrix(kind, 4, seed=0), DBMTL(beta=0.0)
    aggregator.set_losses(torch.ones(4))
    longest = matrix.norm(dim=1).max()
    expected = longest * nn.functional.normalize(matrix, dim=1).sum(dim=0)
    # The two EPS of 1e-8, over lengths of 1e-2 at least.
    assert_close(aggregator(matrix), expected, rtol=1e-5, atol=1e-5 * float(longest))


def test_moco_converges_to_the_least_conflict() -> None:
    """On a constant Jacobian: lambda^T J is the shortest convex combination of the rows."""
    jacobian = make_matrix("conflicting", 3, seed=2)
    jacobian = jacobian / jacobian.norm()
    aggregator = MoCo(beta=0.5, gamma=0.5)
    for _ in range(5000):
        vector = aggregator(jacobian)
    others = torch.rand(20_000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    others = others / others.sum(dim=1, keepdim=True)
    assert vector.norm() <= (others @ jacobian).norm(dim=1).min() + 1e-6
