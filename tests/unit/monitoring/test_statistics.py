"""The statistics against brute force: every number from the rows of the Jacobian themselves."""

from __future__ import annotations

import math
from itertools import combinations, product

import numpy as np
import pytest
import torch
from numpy.linalg import norm

from jddist.monitoring import QUANTILES, Statistics, Summary, statistics_of
from jddist.monitoring.record import BINS
from jddist.monitoring.statistics import MOST_COMPARED, Array, matrix_of, of_tasks


def _jacobian(m: int, n: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=(m, n))


def _check(found: Statistics, rows: Array, update: Array) -> None:
    """One row, or one pair of rows, at a time."""
    m = len(rows)
    cosine = lambda a, b: float(a @ b / (norm(a) * norm(b)))  # noqa: E731
    lengths = [norm(row) for row in rows]
    np.testing.assert_allclose(found.norms, lengths, rtol=1e-12)
    for i, j in product(range(m), repeat=2):
        assert found.cosines[i, j] == pytest.approx(cosine(rows[i], rows[j]), abs=1e-12)
    pairs = list(combinations(range(m), 2))
    in_conflict = sum(float(rows[i] @ rows[j]) < 0 for i, j in pairs)
    assert found.conflict_rate == in_conflict / len(pairs)
    assert found.imbalance == pytest.approx(max(lengths) / min(lengths), rel=1e-12)
    mean = sum(rows) / m
    assert found.mean_norm == pytest.approx(norm(mean), rel=1e-12)
    assert found.update_norm == pytest.approx(norm(update), rel=1e-12)
    assert found.update_cosines is not None
    for i in range(m):
        assert found.update_cosines[i] == pytest.approx(cosine(update, rows[i]), abs=1e-12)
    assert found.update_conflict_rate == sum(float(update @ row) < 0 for row in rows) / m
    assert found.update_mean_cosine == pytest.approx(cosine(update, mean), abs=1e-12)


@pytest.mark.parametrize("m, n", [(4, 3), (5, 40), (7, 7)])
def test_a_weighted_sum_of_rows(m: int, n: int) -> None:
    rows = _jacobian(m, n, seed=m)
    weights = np.random.default_rng(1).normal(size=m)
    found = statistics_of(rows @ rows.T, weights)
    assert 0 < found.conflict_rate < 1 and 0 < found.update_conflict_rate < 1
    _check(found, rows, weights @ rows)
    assert found.weights is weights


def test_an_update_that_is_no_combination_of_rows() -> None:
    rows, update = _jacobian(5, 12), _jacobian(1, 12, seed=9)[0]
    found = statistics_of(rows @ rows.T, None, rows @ update, float(norm(update)))
    _check(found, rows, update)


def test_without_an_update_its_numbers_are_unknown() -> None:
    rows = _jacobian(4, 6)
    found = statistics_of(rows @ rows.T, None)
    assert found.update_cosines is None
    assert math.isnan(found.update_mean_cosine) and math.isnan(found.update_conflict_rate)
    assert found.conflict_rate > 0


def test_rounding_is_no_conflict() -> None:
    rows = np.eye(4)
    gramian = rows @ rows.T
    gramian[0, 1] = gramian[1, 0] = -1e-7
    assert statistics_of(gramian, np.ones(4)).conflict_rate == 0.0
    gramian[0, 1] = gramian[1, 0] = -1e-3
    assert statistics_of(gramian, np.ones(4)).conflict_rate == 1 / 6


def test_a_gradient_of_length_zero() -> None:
    rows = np.array([[1.0, 0.0], [0.0, 0.0], [-1.0, 0.5], [0.0, 1.0]])
    with np.errstate(all="raise"):
        found = statistics_of(rows @ rows.T, np.full(4, 0.25))
    assert np.isnan(found.cosines[1]).all() and np.isnan(found.cosines[:, 1]).all()
    assert found.conflict_rate == 1 / 6  # a zero row conflicts with none
    assert found.imbalance == math.inf
    assert "imbalance" not in Summary.of("", found, each=True).as_json()


@pytest.mark.parametrize("m", [0, 1])
def test_few_objectives(m: int) -> None:
    rows = _jacobian(m, 3)
    found = statistics_of(rows @ rows.T, np.ones(m))
    assert math.isnan(found.conflict_rate)
    assert len(found.norms) == m
    Summary.of("", found, each=False).as_json()


def test_of_very_many_some_are_compared() -> None:
    m = MOST_COMPARED + 100
    rows = _jacobian(m, 4)
    found = statistics_of(rows @ rows.T, np.ones(m))
    assert found.cosines.shape == (MOST_COMPARED, MOST_COMPARED)
    assert len(found.norms) == m
    some = np.linspace(0, m - 1, MOST_COMPARED).round().astype(int)
    assert some[0] == 0 and some[-1] == m - 1
    unit = rows[some] / norm(rows[some], axis=1, keepdims=True)
    np.testing.assert_allclose(found.cosines, unit @ unit.T, atol=1e-12)


def test_a_generalized_gramian_as_a_matrix() -> None:
    rows = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    generalized = torch.einsum("ijp,lkp->ijkl", rows, rows)  # [i, j, k, l] = <J[i, j], J[l, k]>
    flat = rows.reshape(6, 5)
    np.testing.assert_allclose(matrix_of(generalized.numpy()), flat @ flat.T, atol=1e-12)


@pytest.mark.parametrize("sample_dim", [0, 1])
def test_tasks_are_means_over_samples(sample_dim: int) -> None:
    samples, tasks, n = 6, 4, 9
    shape = (samples, tasks) if sample_dim == 0 else (tasks, samples)
    rng = np.random.default_rng(3)
    rows, weights = rng.normal(size=(*shape, n)), rng.random(shape)
    gramian = np.einsum("ijp,lkp->ijkl", rows, rows)
    update = np.einsum("ij,ijp->p", weights, rows)
    matrix, of_task, progress = of_tasks(gramian, weights, rows @ update, sample_dim)
    means = rows.mean(axis=sample_dim)
    np.testing.assert_allclose(matrix, means @ means.T, atol=1e-12)
    np.testing.assert_allclose(of_task, weights.sum(axis=sample_dim), atol=1e-12)
    _check(statistics_of(matrix, of_task, progress, float(norm(update))), means, update)


def test_distributions_are_quantiles_and_a_histogram() -> None:
    rows = _jacobian(30, 5)
    weights = np.random.default_rng(2).random(30)
    found = Summary.of("", statistics_of(rows @ rows.T, weights), each=False)
    unit = rows / norm(rows, axis=1, keepdims=True)
    pairs = sorted(float(unit[i] @ unit[j]) for i, j in combinations(range(30), 2))
    np.testing.assert_allclose(found.cosines.quantiles, np.quantile(pairs, QUANTILES), atol=1e-12)
    counts = [0] * BINS
    for value in pairs:
        counts[min(BINS - 1, int((value + 1) / 2 * BINS))] += 1
    assert found.cosines.histogram.tolist() == counts
    np.testing.assert_allclose(found.weights.quantiles, np.quantile(weights, QUANTILES))
    lengths = norm(rows, axis=1)
    np.testing.assert_allclose(found.norms.quantiles, np.quantile(lengths, QUANTILES))


@pytest.mark.parametrize("each", [True, False])
def test_json_and_back(each: bool) -> None:
    rows = _jacobian(5, 4)
    rows[2] = 0.0
    summary = Summary.of("layer", statistics_of(rows @ rows.T, np.arange(5.0)), each=each)
    again = Summary.from_json(summary.as_json())
    assert again.as_json() == summary.as_json()
    if each:
        np.testing.assert_array_equal(again.weights, summary.weights)  # to the last bit
        np.testing.assert_array_equal(again.norms, summary.norms)
        others = [0, 1, 3, 4]
        np.testing.assert_allclose(
            again.cosines[np.ix_(others, others)],
            summary.cosines[np.ix_(others, others)],
            atol=1e-6,
        )
        assert np.isnan(again.cosines[2, 3])
