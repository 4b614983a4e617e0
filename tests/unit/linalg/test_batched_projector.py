"""All quadratic programs at once: exact, certified, and honest where they are not."""

from __future__ import annotations

import io
import warnings
from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from jddist.aggregation import DualProj, DualProjWeighting, UPGrad, UPGradWeighting
from jddist.linalg import (
    AutomaticProjector,
    BatchedProjector,
    QuadprogProjector,
    _complementarity,
    batched_projector,
)
from jddist.linalg._complementarity import certificate, guess, polish, unit_diagonal
from jddist.linalg.gramian import normalize, regularize
from tests.unit.aggregation._matrices import small_matrices
from tests.unit.linalg._gramians import KINDS, make_gramian


def largest(tensor: Tensor) -> float:
    return float(tensor.abs().max())


def random_vectors(k: int, m: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(k, m, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("m", [1, 2, 5, 24, 120])
@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_quadprog(kind: str, m: int) -> None:
    gramian = make_gramian(kind, m, seed=m)
    u = torch.eye(m, dtype=torch.float64) / m
    exact = QuadprogProjector(norm_eps=0)(u, gramian)
    projector = BatchedProjector(norm_eps=0)
    batched = projector(u, gramian)
    assert projector.fallbacks == 0
    # The condition is at most 1e4 m (reg_eps): some 1e-12 of both solvers' rounding remains.
    assert largest(batched - exact) <= 1e-11 * largest(exact)
    assert largest((batched - exact).sum(dim=0)) <= 1e-11 * largest(exact.sum(dim=0))


@pytest.mark.parametrize("k", [1, 3, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_any_vectors(kind: str, k: int) -> None:
    m = 40
    gramian = make_gramian(kind, m)
    u = random_vectors(k, m) - 0.3  # some entries are negative, and
    u[:, 5:8] = 0.0  # some are zero
    exact = QuadprogProjector()(u, gramian)
    assert largest(BatchedProjector()(u, gramian) - exact) <= 1e-11 * largest(exact)


@pytest.mark.parametrize("size", [1e-200, 1e-60, 1e-30, 1e30, 1e200])
@pytest.mark.parametrize("m", [20, 120])  # in float64 alone, and in float32 first
def test_vectors_of_any_size(m: int, size: float) -> None:
    gramian = make_gramian("low rank", m)
    u = torch.eye(m, dtype=torch.float64) / m
    expected = QuadprogProjector()(u, gramian)
    projector = BatchedProjector()
    for _ in range(2):  # the second time from the solutions of the first
        solutions = projector(size * u, gramian)
        assert largest(solutions / size - expected) <= 1e-11 * largest(expected)
        assert bool((solutions >= size * u).all())
    assert projector.fallbacks == 0


@pytest.mark.parametrize("kind", KINDS)
def test_certificate_of_many_objectives(kind: str) -> None:
    m = 256
    gramian = make_gramian(kind, m)
    u = torch.eye(m, dtype=torch.float64) / m
    projector = BatchedProjector(norm_eps=0)
    v = projector(u, gramian)
    problem = regularize(normalize(gramian, 0.0), 1e-4)
    assert projector.fallbacks == 0
    # Ten thousand times better than what is certified: the polish leaves rounding alone.
    assert float(certificate(problem, u.T, v.T).max()) <= 1e-12 * max(1.0, 1e4 / m)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(matrix=small_matrices(), seed=st.integers(0, 100))
def test_agrees_with_quadprog_on_small_ties(matrix: Tensor, seed: int) -> None:
    gramian = matrix @ matrix.T
    u = random_vectors(3, len(gramian), seed) - 0.5
    exact = QuadprogProjector(norm_eps=0)(u, gramian)
    batched = BatchedProjector(norm_eps=0)(u, gramian)
    assert largest(batched - exact) <= 1e-10 * (1.0 + largest(exact))


def test_certificate_sees_every_condition() -> None:
    gramian = torch.tensor([[2.0, -1.0], [-1.0, 2.0]], dtype=torch.float64)
    u = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    right = torch.tensor([[1.0], [0.5]], dtype=torch.float64)
    assert float(certificate(gramian, u, right)) == 0.0
    # v < u; a negative slope of the second coordinate; neither v = u nor a zero slope.
    for wrong in ([0.9, 0.45], [1.0, 0.0], [1.0, 0.7], [1.3, 0.65]):
        v = torch.tensor(wrong, dtype=torch.float64)[:, None]
        assert float(certificate(gramian, u, v)) >= 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_polish_corrects_any_guess(dtype: torch.dtype) -> None:
    m = 60
    gramian, scale = unit_diagonal(regularize(normalize(make_gramian("conflicting", m), 0.0), 1e-4))
    lower = torch.eye(m, dtype=torch.float64) / scale
    free, near = guess(gramian, lower, dtype)
    right, done = polish(gramian, lower, free, near, dtype)
    assert done.all()
    flipped = free.clone()
    flipped[::7] ^= True
    for wrong in (flipped, torch.ones_like(free), torch.zeros_like(free)):
        solution, done = polish(gramian, lower, wrong, lower, dtype)
        assert done.all()
        assert largest(solution - right) <= 1e-11 * largest(right)


@pytest.mark.parametrize("kind", KINDS)
def test_warm_start_changes_rounding_alone(kind: str) -> None:
    m = 110
    u = torch.eye(m, dtype=torch.float64) / m
    gramian = make_gramian(kind, m)
    cold = BatchedProjector(norm_eps=0, warm_start=False)(u, gramian)
    drift = make_gramian("square", m, seed=1)
    drift *= 0.02 * gramian.trace() / drift.trace()
    for before in (gramian, gramian + drift, make_gramian("conflicting", m, seed=2)):
        projector = BatchedProjector(norm_eps=0)
        projector(u, before)
        warm = projector(u, gramian)
        assert projector.fallbacks == 0
        assert largest((warm - cold).sum(dim=0)) <= 1e-12 * largest(cold.sum(dim=0))


def test_warm_start_is_used_and_survives_other_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    starts = []

    def spy(gramian: Tensor, lower: Tensor, dtype: torch.dtype, start: Tensor | None) -> object:
        starts.append(start)
        return guess(gramian, lower, dtype, start)

    monkeypatch.setattr(batched_projector, "guess", spy)
    projector = BatchedProjector()
    for m in (30, 30, 20):
        gramian = make_gramian("conflicting", m)
        projector(torch.eye(m, dtype=torch.float64), gramian)
    assert [start is None for start in starts] == [True, False, True]
    projector.warm_start = False
    projector(torch.eye(20, dtype=torch.float64), make_gramian("conflicting", 20))
    assert starts[-1] is None


def test_what_is_not_certified_goes_to_quadprog(monkeypatch: pytest.MonkeyPatch) -> None:
    def lazy(gramian: Tensor, lower: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        done = torch.ones(lower.shape[1], dtype=torch.bool)
        done[3] = False
        right, _ = polish(gramian, lower, *guess(gramian, lower, torch.float64), torch.float64)
        right[:, 5] *= 1.001  # claims to be done
        return right, done

    monkeypatch.setattr(batched_projector, "polish", lazy)
    m = 30
    gramian, u = make_gramian("conflicting", m), torch.eye(m, dtype=torch.float64)
    projector = BatchedProjector()
    exact = QuadprogProjector()(u, gramian)
    assert largest(projector(u, gramian) - exact) <= 1e-11 * largest(exact)
    assert projector.fallbacks == 2


def test_ill_conditioned_problems_are_solved_after_all() -> None:
    """A tiny reg_eps makes the conditions too bad for float32, and for some even for float64."""
    m = 128
    u = torch.eye(m, dtype=torch.float64) / m
    for kind in ("rank 8", "opposite pairs", "near duplicates"):
        gramian = make_gramian(kind, m)
        projector = BatchedProjector(reg_eps=1e-8)
        exact = QuadprogProjector(reg_eps=1e-8)(u, gramian)
        # The condition is up to 1e8.
        assert largest(projector(u, gramian) - exact) <= 1e-7 * largest(exact)


def test_vectors_of_any_shape_and_empty() -> None:
    gramian = make_gramian("conflicting", 30)
    u = random_vectors(6, 30)
    projector = BatchedProjector(warm_start=False)
    flat = projector(u, gramian)
    assert_close(projector(u.reshape(2, 3, 30), gramian), flat.reshape(2, 3, 30))
    assert_close(projector(u[0], gramian), flat[0])
    assert projector(torch.ones(0, 30), gramian).shape == (0, 30)
    assert projector(torch.ones(3, 0), torch.eye(0)).shape == (3, 0)


def test_computes_in_float64_and_keeps_the_dtype() -> None:
    u = torch.eye(40, dtype=torch.float64) / 40
    for dtype in (torch.float32, torch.bfloat16):
        gramian = make_gramian("well-conditioned", 40).to(dtype)
        weights = BatchedProjector()(u, gramian)
        assert weights.dtype == dtype
        # The numbers of that Gramian exactly, rounded once at the end.
        assert torch.equal(weights, BatchedProjector()(u, gramian.double()).to(dtype))


def test_constraints_hold_exactly() -> None:
    u = random_vectors(50, 50) / 7
    assert (BatchedProjector()(u, make_gramian("conflicting", 50)) >= u).all()


def test_below_norm_eps_is_said_once() -> None:
    projector = BatchedProjector()
    u = torch.eye(40, dtype=torch.float64) / 40
    tiny = 1e-9 * make_gramian("conflicting", 40)
    with pytest.warns(UserWarning, match=r"BatchedProjector\(norm_eps=0\)"):
        assert torch.equal(projector(u, tiny), u)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        projector(u, tiny)
    assert projector.below_norm_eps == 2


def test_failures_say_what_to_do() -> None:
    indefinite = torch.eye(30)
    indefinite[0, 1] = indefinite[1, 0] = -300.0
    with pytest.raises(ValueError, match="larger reg_eps"):
        BatchedProjector()(torch.ones(30), indefinite)
    with pytest.raises(ValueError, match="NaN"):
        BatchedProjector()(torch.ones(30), torch.full((30, 30), float("nan")))
    with pytest.raises(ValueError, match="shape"):
        BatchedProjector()(torch.ones(3), torch.eye(2))


def test_a_gramian_that_rounding_makes_singular_goes_to_quadprog(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def singular(*args: object) -> None:
        raise torch.linalg.LinAlgError("not positive-definite")

    monkeypatch.setattr(batched_projector, "guess", singular)
    gramian, u = make_gramian("conflicting", 120), torch.eye(120, dtype=torch.float64)
    projector = BatchedProjector()
    assert torch.equal(projector(u, gramian), QuadprogProjector()(u, gramian))
    assert projector.fallbacks == 120


def test_without_conflict_a_singular_gramian_is_no_failure() -> None:
    for gramian in (torch.zeros(30, 30), torch.ones(30, 30)):
        u = random_vectors(3, 30).float()
        for projector_type in (BatchedProjector, QuadprogProjector):
            assert torch.equal(projector_type(reg_eps=0.0)(u, gramian), u)


def test_inputs_stay_as_they_are() -> None:
    gramian, u = make_gramian("conflicting", 60), random_vectors(60, 60)
    before = gramian.clone(), u.clone()
    BatchedProjector()(u, gramian).add_(1.0)
    assert torch.equal(gramian, before[0])
    assert torch.equal(u, before[1])


def test_repr_copies_and_pickles() -> None:
    projector = BatchedProjector(norm_eps=0.1, warm_start=False)
    assert repr(projector) == (
        "BatchedProjector(norm_eps=0.1, reg_eps=0.0001, warm_start=False, deal_from=1024)"
    )
    projector = BatchedProjector()
    gramian, u = make_gramian("conflicting", 30), torch.eye(30, dtype=torch.float64)
    expected = projector(u, gramian)
    torch.save(projector, io.BytesIO())
    assert largest(deepcopy(projector)(u, gramian) - expected) <= 1e-12 * largest(expected)


@pytest.mark.parametrize("method", [UPGrad, DualProj])
@pytest.mark.parametrize("m", [4, 60, 160])
def test_chosen_by_itself_where_it_pays(method: type, m: int) -> None:
    weighting = {UPGrad: UPGradWeighting, DualProj: DualProjWeighting}[method]()
    projector = weighting.projector
    assert isinstance(projector, AutomaticProjector)
    asked = []
    solve = projector._batched._solve
    projector._batched._solve = lambda u, g: asked.append(len(u)) or solve(u, g)
    gramian = make_gramian("conflicting", m)
    weights = weighting(gramian)
    expected = type(weighting)(projector=QuadprogProjector())(gramian)
    assert largest(weights - expected) <= 1e-11 * largest(expected)
    # One problem of 60 objectives is quicker alone.
    chosen = {(UPGrad, 60): [60], (UPGrad, 160): [160], (DualProj, 160): [1]}
    assert asked == chosen.get((method, m), [])
    assert projector.fallbacks == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 4])
def test_a_gramian_of_low_rank_takes_few_iterations(
    rank: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its regularised eigenvalues spread over orders of magnitude: 150 without knowing the rank."""
    monkeypatch.setattr(_complementarity, "_CG_MAX_ITERATIONS", 6)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(128, rank, generator=generator, dtype=torch.float64)
    gramian = (rows.to(dtype) @ rows.to(dtype).T).double()
    vectors = torch.eye(128, dtype=torch.float64)
    projector = BatchedProjector()
    found = projector(vectors, gramian)
    assert projector.fallbacks == 0
    expected = QuadprogProjector()(vectors, gramian)
    assert (found - expected).abs().max() <= 1e-9 * expected.abs().max()
