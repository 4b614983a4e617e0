"""The projection onto the dual cone: optimality, precision, the cliff and failures."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import quadprog
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from jddist.linalg import QuadprogProjector
from tests.unit.aggregation._matrices import KINDS, make_matrix, small_matrices


def one_by_one(U: Tensor, G: Tensor, norm_eps: float = 1e-4, reg_eps: float = 1e-4) -> Tensor:
    """The slow reference: quadprog on the plain matrix, one problem after the other."""
    m = G.shape[0]
    gramian = G.double().numpy()
    trace = np.trace(gramian)
    gramian = np.zeros((m, m)) if trace < norm_eps else gramian / trace
    gramian = gramian + reg_eps * np.eye(m)
    solve = [quadprog.solve_qp(gramian, np.zeros(m), np.eye(m), u.double().numpy())[0] for u in U]
    return torch.tensor(np.array(solve))


@pytest.mark.parametrize("m", [1, 2, 4, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_matches_plain_quadprog(kind: str, m: int) -> None:
    for seed in range(5):
        matrix = make_matrix(kind, m, seed)
        gramian = matrix @ matrix.T
        u = torch.diag(torch.rand(m, dtype=torch.float64) + 0.01)
        # Two exact solvers of one strictly convex problem of condition <= 1e4: 1e-9 is generous.
        expected = one_by_one(u, gramian)
        assert_close(QuadprogProjector()(u, gramian), expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m", [1, 2, 4, 7])
def test_matches_the_peer(kind: str, m: int) -> None:
    peer = pytest.importorskip("torchjd.linalg")
    pytest.importorskip("qpsolvers")
    matrix = make_matrix(kind, m, seed=3)
    gramian = matrix @ matrix.T
    u = torch.eye(m, dtype=torch.float64) / m
    expected = peer.QuadprogProjector()(u, gramian)
    assert_close(QuadprogProjector()(u, gramian), expected, atol=1e-9, rtol=1e-9)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(matrix=small_matrices(), seed=st.integers(0, 100))
def test_kkt_conditions(matrix: Tensor, seed: int) -> None:
    m = matrix.shape[0]
    gramian = matrix @ matrix.T
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(3, m, generator=generator, dtype=torch.float64)
    v = QuadprogProjector(norm_eps=0.0, reg_eps=1e-4)(u, gramian)
    trace = gramian.trace()
    problem = gramian / trace if trace > 0 else gramian
    gradient = v @ (problem + 1e-4 * torch.eye(m, dtype=torch.float64))
    # v reaches |u| / reg_eps, about 1e5, so float64 rounding comes to some 1e-11.
    slack = 1e-9 * (1.0 + v.abs().max())
    assert (v >= u - slack).all(), "primal feasibility"
    assert (gradient >= -slack).all(), "dual feasibility"
    assert ((v - u) * gradient).abs().max() <= slack, "complementary slackness"


def test_vectors_of_any_shape() -> None:
    matrix = make_matrix("conflicting", 4, seed=0)
    gramian = matrix @ matrix.T
    u = torch.rand(2, 3, 4, dtype=torch.float64)
    projector = QuadprogProjector()
    assert_close(projector(u, gramian).reshape(6, 4), projector(u.reshape(6, 4), gramian))
    assert_close(projector(u[0, 0], gramian), projector(u, gramian)[0, 0])


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 2)])
def test_empty(shape: tuple[int, ...]) -> None:
    m = shape[-1]
    assert QuadprogProjector()(torch.ones(shape), torch.eye(m)).shape == shape


def test_computes_in_float64_and_keeps_the_dtype() -> None:
    matrix = make_matrix("rank 2", 4, seed=1)
    u = torch.eye(4, dtype=torch.float64) / 4
    for dtype in (torch.float32, torch.bfloat16):
        gramian = (matrix @ matrix.T).to(dtype)
        weights = QuadprogProjector()(u, gramian)
        assert weights.dtype == dtype
        # The numbers of that Gramian exactly, rounded once at the end.
        assert torch.equal(weights, QuadprogProjector()(u, gramian.double()).to(dtype))


def test_negative_entries_are_raised() -> None:
    u = torch.tensor([-1.0, 0.5])
    assert_close(QuadprogProjector()(u, torch.zeros(2, 2)), torch.tensor([0.0, 0.5]))


@pytest.mark.parametrize("size", [1e-200, 1e-60, 1e-30, 1e-12, 1e30, 1e200])
def test_vectors_of_any_size(size: float) -> None:
    matrix = make_matrix("random", 12, 0)[:, :5]
    gramian = matrix @ matrix.T
    u = torch.eye(12, dtype=torch.float64) / 12
    expected = QuadprogProjector()(u, gramian)
    # The problems are homogeneous: only the rounding of size * u and of the quotient remains, times
    # a condition of at most 12e4.
    error = (QuadprogProjector()(size * u, gramian) / size - expected).abs().max()
    assert float(error) <= 1e-11 * float(expected.abs().max())


def test_inputs_stay_as_they_are() -> None:
    matrix = make_matrix("conflicting", 4, seed=0)
    gramian, u = matrix @ matrix.T, torch.eye(4, dtype=torch.float64)
    before = gramian.clone(), u.clone()
    weights = QuadprogProjector()(u, gramian)
    weights.add_(1.0)
    assert torch.equal(gramian, before[0])
    assert torch.equal(u, before[1])


@pytest.mark.parametrize(
    ("u_shape", "g_shape"), [((3,), (2, 2)), ((2, 3), (2, 2)), ((), (1, 1)), ((2,), (2, 3))]
)
def test_shapes_must_agree(u_shape: tuple[int, ...], g_shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="shape"):
        QuadprogProjector()(torch.ones(u_shape), torch.ones(g_shape))


def test_below_norm_eps_warns_once_and_counts() -> None:
    projector = QuadprogProjector()
    tiny = 1e-8 * torch.tensor([[1.0, -1.0], [-1.0, 2.0]])
    u = torch.eye(2) / 2
    with pytest.warns(UserWarning, match=r"trace 3e-08.*norm_eps=0\.0001.*norm_eps=0\)"):
        weights = projector(u, tiny)
    assert_close(weights, u)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        projector(u, tiny)
        projector(u, torch.zeros(2, 2))
        projector(u, torch.eye(2))
    assert projector.below_norm_eps == 2
    with pytest.warns(UserWarning, match="norm_eps"):
        QuadprogProjector()(u, tiny)


def test_norm_eps_zero_has_no_cliff() -> None:
    projector = QuadprogProjector(norm_eps=0)
    gramian = torch.tensor([[1.0, -1.0], [-1.0, 2.0]], dtype=torch.float64)
    u = torch.eye(2, dtype=torch.float64) / 2
    # Scaling by a power of two is exact.
    assert torch.equal(projector(u, gramian * 2.0**-60), projector(u, gramian))
    assert torch.equal(projector(u, torch.zeros(2, 2)), u.float())
    assert projector.below_norm_eps == 0


def test_failure_says_what_to_do() -> None:
    indefinite = torch.tensor([[1.0, -3.0], [-3.0, 1.0]])
    with pytest.raises(ValueError, match=r"2 objectives.*trace 2: .*larger reg_eps than 0\.0001"):
        QuadprogProjector()(torch.ones(2), indefinite)
    with pytest.raises(ValueError, match="NaN or infinite"):
        QuadprogProjector()(torch.ones(2), torch.full((2, 2), float("nan")))


@pytest.mark.parametrize("name", ["norm_eps", "reg_eps"])
def test_parameters(name: str) -> None:
    projector = QuadprogProjector()
    assert getattr(projector, name) == 1e-4
    setattr(projector, name, 0.25)
    assert getattr(projector, name) == 0.25
    with pytest.raises(ValueError, match=name):
        setattr(projector, name, -1e-9)
    with pytest.raises(ValueError, match=name):
        QuadprogProjector(**{name: -1.0})
    assert (
        repr(QuadprogProjector(norm_eps=0.1)) == "QuadprogProjector(norm_eps=0.1, reg_eps=0.0001)"
    )
