"""Mathematical properties, by name, of the methods that solve a problem given by the Gramian."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from jddist.aggregation import (
    IMTLG,
    PCD,
    Aggregator,
    AlignedMTL,
    AlignedMTLWeighting,
    CAGrad,
    CAGradWeighting,
    ConFIG,
    ConFIGWeighting,
    FairGrad,
    FairGradWeighting,
    IMTLGWeighting,
    Krum,
    KrumWeighting,
    NashMTL,
    NashMTLWeighting,
    PCDWeighting,
    Weighting,
)
from tests.unit.aggregation._matrices import KINDS, make_matrix, small_matrices

quick = settings(max_examples=40, deadline=None, derandomize=True)
WELL_POSED = ["random", "duplicate row", "conflicting"]

Make = Callable[[int], Weighting]
WEIGHTINGS: dict[str, Make] = {
    "AlignedMTL": lambda m: AlignedMTLWeighting(),
    "AlignedMTL(median)": lambda m: AlignedMTLWeighting(scale_mode="median"),
    "AlignedMTL(rmse)": lambda m: AlignedMTLWeighting(scale_mode="rmse"),
    "CAGrad": lambda m: CAGradWeighting(c=0.5),
    "CAGrad(norm_eps=0)": lambda m: CAGradWeighting(c=2.0, norm_eps=0.0),
    "ConFIG": lambda m: ConFIGWeighting(),
    "FairGrad(0.1)": lambda m: FairGradWeighting(alpha=0.1),
    "FairGrad(1)": lambda m: FairGradWeighting(alpha=1.0),
    "FairGrad(10)": lambda m: FairGradWeighting(alpha=10.0),
    "FairGrad(1e-300)": lambda m: FairGradWeighting(alpha=1e-300, max_iters=5),
    "FairGrad(1e300)": lambda m: FairGradWeighting(alpha=1e300, max_iters=5),
    "IMTLG": lambda m: IMTLGWeighting(),
    "NashMTL": lambda m: NashMTLWeighting(m),
    "NashMTL(max_norm=0)": lambda m: NashMTLWeighting(m, max_norm=0.0),
    "PCD": lambda m: PCDWeighting(),
    "PCD(eps=0)": lambda m: PCDWeighting(tau=1.0, beta=0.0, eps=0.0),
}


def assert_finite(make: Make, gramian: Tensor) -> None:
    weighting = make(len(gramian))
    for _ in range(2):
        weights = weighting(gramian)
        assert weights.shape == gramian.shape[:1]
        assert weights.dtype == gramian.dtype
        assert weights.isfinite().all()


@pytest.mark.parametrize("name", WEIGHTINGS)
@quick
@given(
    matrix=small_matrices(),
    exponents=st.lists(st.integers(-10, 10), min_size=5, max_size=5),
    scale=st.integers(-20, 20),
)
def test_finite_on_finite_gramians(
    name: str, matrix: Tensor, exponents: list[int], scale: int
) -> None:
    lengths = 10.0 ** torch.tensor(exponents[: len(matrix)], dtype=torch.float64)
    for rows in (matrix, lengths[:, None] * matrix):
        gramian = 10.0**scale * (rows @ rows.T)
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            bound = torch.finfo(dtype).max
            assert_finite(WEIGHTINGS[name], gramian.clamp(-bound, bound).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_finite_at_the_ends_of_the_range(name: str, dtype: torch.dtype) -> None:
    largest, least = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    signs = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=dtype)
    subnormal = least * torch.finfo(dtype).eps
    for gramian in (
        torch.zeros(3, 3, dtype=dtype),
        *([] if name.startswith("NashMTL") else [torch.zeros(0, 0, dtype=dtype)]),
        largest * torch.eye(3, dtype=dtype),
        largest * torch.ones(3, 3, dtype=dtype),
        largest * signs,
        least * signs,
        subnormal * torch.ones(4, 4, dtype=dtype),
        torch.tensor([largest, least, 1.0, 0.0], dtype=dtype).diag(),
        # Beyond positive semi-definite by far more than rounding.
        torch.tensor([[1.0, 3.0], [3.0, 1.0]], dtype=dtype),
    ):
        assert_finite(WEIGHTINGS[name], gramian)


@pytest.mark.parametrize("m", [64])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "badly scaled"])
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_finite_on_many_objectives(name: str, kind: str, m: int) -> None:
    matrix = make_matrix(kind, m, seed=0)
    for dtype in (torch.float64, torch.float32):
        assert_finite(WEIGHTINGS[name], (matrix @ matrix.T).to(dtype))


@quick
@given(matrix=small_matrices(), c=st.sampled_from([1.0, 1.5, 4.0]))
def test_cagrad_is_non_conflicting_from_c_1_on(matrix: Tensor, c: float) -> None:
    gramian = matrix @ matrix.T
    weights = CAGradWeighting(c=c, norm_eps=0.0)(gramian)
    # The ball contains 0, so the best least product is not negative; the duality gap is rounding.
    terms = gramian.abs() @ weights.abs()
    assert (gramian @ weights >= -1e-9 * terms.max()).all()


@quick
@given(matrix=small_matrices(), c=st.sampled_from([0.2, 0.5, 2.0]))
def test_cagrad_stays_in_its_ball(matrix: Tensor, c: float) -> None:
    weights = CAGradWeighting(c=c, norm_eps=0.0)(matrix @ matrix.T)
    mean = matrix.mean(dim=0)
    if (weights != 0.0).any():
        assert_close((weights @ matrix - mean).norm(), c * mean.norm(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
@quick
@given(matrix=small_matrices())
def test_fairgrad_is_non_conflicting(alpha: float, matrix: Tensor) -> None:
    gramian = matrix @ matrix.T
    weights = FairGradWeighting(alpha)(gramian)
    # At Pareto stationary points the result is 0 up to the root of the floor, 1e-6.
    lengths = gramian.diagonal().sqrt()
    assert (gramian @ weights >= -1e-5 * lengths * (weights * lengths).sum()).all()


@quick
@given(matrix=small_matrices())
def test_nashmtl_is_non_conflicting_and_short(matrix: Tensor) -> None:
    gramian = matrix @ matrix.T
    weights = NashMTLWeighting(len(matrix), max_norm=0.75)(gramian)
    lengths = gramian.diagonal().sqrt()
    assert (gramian @ weights >= -1e-5 * lengths * (weights * lengths).sum()).all()
    assert (weights @ matrix).norm() <= 0.75 * (1.0 + 1e-9)


@pytest.mark.parametrize("m", [1, 2, 4, 7])
@pytest.mark.parametrize("kind", ["random", "conflicting", "badly scaled"])
def test_nashmtl_is_fairgrad_of_alpha_1(kind: str, m: int) -> None:
    matrix = make_matrix(kind, m, seed=0)
    gramian = matrix @ matrix.T
    nash = NashMTLWeighting(m, max_norm=0.0)(gramian)
    assert_close(nash, gramian.norm().sqrt() * FairGradWeighting(1.0)(gramian))


@pytest.mark.parametrize("m", [1, 2, 4, 7])
@pytest.mark.parametrize("kind", ["random", "conflicting", "badly scaled"])
def test_config_is_non_conflicting_at_full_rank(kind: str, m: int) -> None:
    matrix = make_matrix(kind, m, seed=0)
    preference = torch.linspace(0.5, 2.0, m, dtype=torch.float64)
    vector = ConFIG(preference)(matrix)
    cosines = matrix @ vector / (matrix.norm(dim=1) * vector.norm())
    # The condition number of the cosines stays below 1e4.
    assert_close(cosines / cosines[0], preference / preference[0], rtol=1e-10, atol=0.0)
    assert (cosines > 0.0).all()


@pytest.mark.parametrize("m", [1, 2, 4, 7])
@pytest.mark.parametrize("kind", ["random", "conflicting", "badly scaled"])
def test_imtlg_projects_equally_on_all_rows_at_full_rank(kind: str, m: int) -> None:
    matrix = make_matrix(kind, m, seed=0)
    gramian = matrix @ matrix.T
    weights = IMTLGWeighting()(gramian)
    projections = gramian @ weights / gramian.diagonal().sqrt()
    # Relative to the terms: long rows cancel where the scales differ.
    terms = gramian.abs() @ weights.abs() / gramian.diagonal().sqrt()
    assert ((projections - projections[-1]).abs() <= 1e-12 * terms).all()
    assert_close(weights.sum(), torch.ones([], dtype=torch.float64))


@pytest.mark.parametrize("mode", ["min", "median", "rmse"])
@pytest.mark.parametrize("kind", KINDS)
def test_alignedmtl_makes_components_equally_long(mode: str, kind: str) -> None:
    m = 4
    matrix = make_matrix(kind, m, seed=0)
    gramian = matrix @ matrix.T
    # The weights of the unit preferences are the columns of the transformation B.
    columns = [AlignedMTLWeighting(p, mode)(gramian) for p in torch.eye(m, dtype=torch.float64)]
    aligned = torch.stack(columns) @ matrix
    lengths = torch.linalg.svdvals(aligned)
    values = torch.linalg.svdvals(matrix) ** 2
    values = values[values > 1e-12 * values[0]]
    scale = {"min": values[-1], "median": values.median(), "rmse": values.mean()}[mode]
    # Eigenvalues of G are off by 1e-16 of the greatest, the least of them by up to 1e-8 of itself.
    assert_close(lengths[: len(values)] ** 2 / scale, torch.ones_like(values), rtol=1e-7, atol=0.0)
    assert (lengths[len(values) :] <= 1e-6 * scale.sqrt()).all()


@pytest.mark.parametrize("tau", [0.0, 0.02, 0.5])
@quick
@given(matrix=small_matrices())
def test_pcd_keeps_its_promises_where_they_can_be_kept(tau: float, matrix: Tensor) -> None:
    weights = PCDWeighting(tau=tau, eps=0.0)(matrix @ matrix.T)
    if (weights[1:] == 0.0).all():
        return  # Nothing was corrected: all is kept already, or contradictory.
    # At eps = 0 and in the first call every row is normalized by its own length.
    lengths = matrix.norm(dim=1)
    direction = (weights / weights[0] / lengths[0].reciprocal()) @ matrix
    units = torch.nan_to_num(matrix / lengths[:, None], 0.0)
    terms = (weights / weights[0] * lengths[0].reciprocal() * lengths).sum()
    kept = units[1:] @ direction / lengths[0] ** 2
    moving = lengths[1:] > 0.0
    assert (kept[moving] >= tau - 1e-8 * (1.0 + terms)).all()
    assert_close((weights @ matrix).norm(), lengths[0], rtol=1e-6, atol=0.0)


SYMMETRIC: dict[str, Callable[[int], Aggregator]] = {
    "AlignedMTL": lambda m: AlignedMTL(),
    "AlignedMTL(median)": lambda m: AlignedMTL(scale_mode="median"),
    "AlignedMTL(rmse)": lambda m: AlignedMTL(scale_mode="rmse"),
    "CAGrad": lambda m: CAGrad(c=0.5),
    "ConFIG": lambda m: ConFIG(),
    "FairGrad": lambda m: FairGrad(alpha=2.0),
    "IMTLG": lambda m: IMTLG(),
    "NashMTL": lambda m: NashMTL(m),
}


@pytest.mark.parametrize("m", [1, 2, 4, 7])
@pytest.mark.parametrize("kind", WELL_POSED)
@pytest.mark.parametrize("name", SYMMETRIC)
def test_permutation_equivariance(name: str, kind: str, m: int) -> None:
    for seed in range(3):
        matrix = make_matrix(kind, m, seed)
        order = torch.randperm(m, generator=torch.Generator().manual_seed(seed))
        results = [SYMMETRIC[name](m)(rows) for rows in (matrix, matrix[order])]
        # Rounding of G over its least eigenvalue that is not 0, which is above 1e-4 of the
        # greatest; the root of the duality gap for CAGrad.
        assert_close(results[0], results[1], rtol=1e-7, atol=1e-7)


@quick
@given(seed=st.integers(0, 1000))
def test_permutation_equivariance_of_krum(seed: int) -> None:
    # Seven rows in general position: no two scores are equal.
    matrix = make_matrix("random", 7, seed)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
    krum = Krum(n_byzantine=1, n_selected=2)
    assert_close(krum(matrix[order]), krum(matrix))


@quick
@given(seed=st.integers(0, 1000))
def test_permutation_equivariance_of_pcd_in_its_secondary_rows(seed: int) -> None:
    matrix = make_matrix("conflicting", 5, seed)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed)) + 1
    permuted = torch.cat([matrix[:1], matrix[order]])
    assert_close(PCD(tau=0.3)(permuted), PCD(tau=0.3)(matrix), rtol=1e-8, atol=1e-8)


@quick
@given(matrix=small_matrices(), seed=st.integers(0, 1000))
def test_config_is_linear_under_scaling(matrix: Tensor, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    c, d = torch.rand(2, len(matrix), 1, generator=generator, dtype=torch.float64) + 0.1
    aggregator = ConFIG()
    parts = [aggregator(c * matrix), aggregator(d * matrix)]
    combined = aggregator((2.0 * c + 0.5 * d) * matrix)
    # The direction depends on the rows' directions alone. Their cosines are off by 1e-16, and
    # eigenvalues of quarters below 16 stay above 1e-7 or are 0.
    assert_close(combined, 2.0 * parts[0] + 0.5 * parts[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["AlignedMTL", "IMTLG", "Krum"])
@pytest.mark.parametrize("exponent", [-20, 20])
def test_weights_do_not_depend_on_the_unit(name: str, exponent: int) -> None:
    weighting = {"AlignedMTL": AlignedMTLWeighting(), "IMTLG": IMTLGWeighting()}.get(
        name, KrumWeighting(1)
    )
    matrix = make_matrix("random", 4, seed=0)
    gramian = matrix @ matrix.T
    assert_close(weighting(10.0**exponent * gramian), weighting(gramian), rtol=1e-10, atol=1e-10)


@quick
@given(matrix=small_matrices(max_rows=8), n_selected=st.integers(1, 3))
def test_krum_weights_on_the_simplex(matrix: Tensor, n_selected: int) -> None:
    matrix = torch.cat([matrix, torch.eye(3, matrix.shape[1], dtype=torch.float64)])
    for dtype in (torch.float64, torch.float32):
        weights = KrumWeighting(1 if len(matrix) > 3 else 0, n_selected)(
            (matrix @ matrix.T).to(dtype)
        )
        assert int((weights > 0.0).sum()) == n_selected
        assert (weights >= 0.0).all()
        assert abs(float(weights.sum()) - 1.0) <= 3 * torch.finfo(dtype).eps


@quick
@given(matrix=small_matrices())
def test_imtlg_weights_sum_to_one_or_are_zero(matrix: Tensor) -> None:
    weights = IMTLGWeighting()(matrix @ matrix.T)
    # Weights of both signs may be large: their sum rounds like their magnitudes.
    error = abs(float(weights.sum()) - 1.0)
    assert error <= 1e-14 * float(weights.abs().sum()) or (weights == 0.0).all()


def test_krum_refuses_too_few_objectives() -> None:
    for n_byzantine, n_selected, m in [(1, 1, 3), (12, 4, 14), (12, 16, 15), (0, 1, 0)]:
        with pytest.raises(ValueError, match=f"Found {m}"):
            KrumWeighting(n_byzantine, n_selected)(torch.eye(m))
    for n_byzantine, n_selected, m in [(1, 1, 4), (1, 4, 4), (12, 15, 15)]:
        KrumWeighting(n_byzantine, n_selected)(torch.eye(m))
