"""Where torchjd falls short of a method's paper, and what this package does instead.

Each is documented in the method's docstring. A test that no longer fails torchjd calls for that
sentence to go.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import jddist.aggregation as ours
from tests.unit.aggregation._matrices import make_matrix

peer = pytest.importorskip("torchjd.aggregation")


def run(aggregator: Any, matrix: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return aggregator(matrix)


def imbalance(weights: Tensor, matrix: Tensor) -> float:
    """How far from Nash's condition G a = 1 / a, up to clipping."""
    products = weights * (matrix @ matrix.T @ weights)
    return float((products / products.mean() - 1.0).abs().max())


def test_nashmtl_with_a_row_of_zeros() -> None:
    """torchjd's solver fails, and the weights of the call before are kept without a word."""
    matrix = make_matrix("random", 4, seed=0)
    with_zeros = matrix.clone()
    with_zeros[0] = 0.0
    theirs = peer.NashMTL(4)
    run(theirs, matrix)
    stale = run(theirs, with_zeros)
    assert (run(peer.NashMTL(4), with_zeros) - stale).norm() > 0.01 * stale.norm()
    # Ours is the solution for the other rows.
    expected = ours.NashMTL(3)(matrix[1:])
    mine = ours.NashMTL(4)
    for rows in (matrix, with_zeros):
        result = mine(rows)
    assert_close(result, expected)


def test_nashmtl_with_one_row() -> None:
    matrix = make_matrix("random", 1, seed=0)
    with pytest.raises(ValueError):
        run(peer.NashMTL(1), matrix)
    assert_close(ours.NashMTL(1)(matrix), matrix[0] / matrix.norm())


def test_nashmtl_on_rows_of_very_different_lengths() -> None:
    worst = 0.0
    for seed in range(3):
        matrix = make_matrix("badly scaled", 7, seed)
        worst = max(worst, imbalance(run(peer.NashMTL(7).weighting, matrix), matrix))
        weights = ours.NashMTL(7).weighting(matrix)
        # Relative to 1; G a is small beside its terms, by 1e-4 at least.
        assert imbalance(weights, matrix) < 1e-10
    assert worst > 1e-2


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_fairgrad_on_rows_of_very_different_lengths(alpha: float) -> None:
    worst = 0.0
    for seed in range(2):
        matrix = make_matrix("badly scaled", 7, seed)
        gramian = matrix @ matrix.T

        def error(weights: Tensor, gramian: Tensor = gramian) -> float:
            return float(((gramian @ weights).clamp(min=0.0) ** alpha * weights - 1.0).abs().max())

        worst = max(worst, error(peer.FairGradWeighting(alpha)(gramian)))
        assert error(ours.FairGradWeighting(alpha)(gramian)) < 1e-8
    assert worst > 1e-3


def test_cagrad_is_optimal_where_torchjd_is_nearly_so() -> None:
    c, worst = 2.0, 0.0
    for seed in range(3):
        matrix = make_matrix("conflicting", 4, seed)
        mean, rows = matrix.mean(dim=0), matrix / matrix.norm()

        def least_product(vector: Tensor, rows: Tensor = rows) -> float:
            return float((rows @ vector).min())

        mine, theirs = ours.CAGrad(c)(matrix), peer.CAGrad(c)(matrix)
        for vector in (mine, theirs):
            assert_close((vector - mean).norm(), c * mean.norm(), rtol=1e-9, atol=0.0)
        assert least_product(mine) >= least_product(theirs) - 1e-14
        worst = max(worst, float((mine - theirs).norm() / mine.norm()))
    assert worst > 1e-6


def test_cagrad_of_opposite_rows_is_the_same_in_float32() -> None:
    """They may be Pareto stationary, g = 0, which the roots of torchjd's float32 Gramian hide."""
    zeros, worst = 0, 0.0
    for seed in range(16):
        matrix = make_matrix("random", 5, seed, n=8)
        matrix[1] = -matrix[0]
        mine, theirs = (lib.CAGrad(0.5)(matrix) for lib in (ours, peer))
        assert_close(mine, theirs, rtol=0.0, atol=1e-4)
        assert_close(ours.CAGrad(0.5)(matrix.float()).double(), mine, rtol=0.0, atol=1e-4)
        zeros += int(not mine.any())
        worst = max(worst, float((peer.CAGrad(0.5)(matrix.float()) - theirs).norm()))
    assert zeros > 0 and worst > 0.1


def test_cagrad_with_radius_0_is_the_mean() -> None:
    matrix = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    assert (peer.CAGrad(0.0)(matrix) == 0.0).all()
    assert_close(ours.CAGrad(0.0)(matrix), matrix.mean(dim=0))


def test_imtlg_with_long_rows() -> None:
    matrix = make_matrix("random", 3, seed=0)
    assert (peer.IMTLG()(1e13 * matrix) == 0.0).all()
    assert_close(ours.IMTLG()(1e13 * matrix), 1e13 * ours.IMTLG()(matrix))


def test_config_on_rows_that_cancel() -> None:
    """There is no direction: torchjd's is rounding error, and depends on the order of columns."""
    matrix = make_matrix("rank 1", 2, seed=0)
    results = [peer.ConFIG()(matrix), peer.ConFIG()(matrix.flip(1)).flip(0)]
    assert (results[0] - results[1]).norm() > 0.1 * results[0].norm()
    assert (ours.ConFIG()(matrix) == 0.0).all()


def test_config_cannot_tell_nearly_parallel_rows_apart() -> None:
    """Here ours falls short: the Gramian squares what the Jacobian holds."""
    matrix = torch.tensor([[1.0, 0.0], [1.0, 1e-9]], dtype=torch.float64)
    preference = torch.tensor([1.0, 2.0], dtype=torch.float64)
    parallel = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    mine, theirs = ours.ConFIG(preference)(matrix), peer.ConFIG(preference)(matrix)
    assert_close(mine, ours.ConFIG(preference)(parallel))
    assert (mine - theirs).norm() > 0.1
