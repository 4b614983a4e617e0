"""The same numbers and the same random draws as torchjd, on every kind of matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import jddist.aggregation as ours
from tests.unit.aggregation._matrices import KINDS, make_matrix
from tests.unit.linalg.test_dual_cone import one_by_one

peer = pytest.importorskip("torchjd.aggregation")

SIZES = [1, 2, 4, 7]
DTYPES = [torch.float64, torch.float32]
NAMES = ["Mean", "Sum", "Random", "UPGrad", "DualProj", "MGDA", "PCGrad", "GradVac"]


class PlainProjector:
    """Stands in for torchjd's projector, whose solver package may be missing."""

    def __call__(self, U: Tensor, G: Tensor) -> Tensor:
        return one_by_one(U.reshape(-1, U.shape[-1]), G).reshape(U.shape).to(G)


def make_peer(name: str) -> Any:
    if name in ("UPGrad", "DualProj"):
        return getattr(peer, name)(projector=PlainProjector())
    return getattr(peer, name)()


def assert_same_vector(actual: Tensor, expected: Tensor, matrix: Tensor) -> None:
    # Some ten roundings on numbers of the size of J (times m at most): 1e-12 and 1e-6 of it. For
    # UPGrad and DualProj in float32, reg_eps = 1e-4 amplifies the rounding of the last one only.
    limit = 1e-12 if matrix.dtype == torch.float64 else 1e-6
    scale = float(matrix.norm() + expected.norm())
    assert actual.dtype == matrix.dtype
    assert float((actual - expected).norm()) <= limit * scale


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", SIZES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_aggregators(name: str, kind: str, m: int, dtype: torch.dtype) -> None:
    for seed in range(3):
        matrix = make_matrix(kind, m, seed).to(dtype)
        mine, theirs = getattr(ours, name)(), make_peer(name)
        # From the second call on GradVac is ill-posed on low-rank matrices (see the last test).
        for call in range(1 if name == "GradVac" and kind.startswith("rank") else 3):
            torch.manual_seed(10 * seed + call)
            expected = theirs(matrix)
            position = torch.random.get_rng_state()
            torch.manual_seed(10 * seed + call)
            actual = mine(matrix)
            assert torch.equal(torch.random.get_rng_state(), position)
            if name == "MGDA":
                # Of several optimal weights, rounding picks one; the vector's length is unique.
                actual, expected = actual.norm()[None], expected.norm()[None]
            assert_same_vector(actual, expected, matrix)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_weightings(name: str, m: int, dtype: torch.dtype) -> None:
    matrix = make_matrix("conflicting", m, seed=5)
    gramian = (matrix @ matrix.T).to(dtype)
    torch.manual_seed(0)
    expected = make_peer(name).weighting(matrix.to(dtype))
    torch.manual_seed(0)
    actual = getattr(ours, name + "Weighting")()(gramian)
    # The peer squares the rounded J, not J: one more rounding, amplified by 1 / reg_eps at most.
    limit = 1e-10 if dtype == torch.float64 else 1e-3
    assert actual.dtype == dtype
    assert_close(actual, expected, atol=limit, rtol=limit)


@pytest.mark.parametrize("name", ["UPGrad", "DualProj"])
def test_preference_vector(name: str) -> None:
    matrix = make_matrix("conflicting", 4, seed=1)
    preference = torch.tensor([0.1, 2.0, 0.0, 1.0], dtype=torch.float64)
    expected = getattr(peer, name)(preference, projector=PlainProjector())(matrix)
    assert_same_vector(getattr(ours, name)(preference)(matrix), expected, matrix)


def test_hyperparameters() -> None:
    matrix = make_matrix("conflicting", 4, seed=1)
    for name, parameters in [
        ("MGDA", {"epsilon": 0.2, "max_iters": 3}),
        ("MGDA", {"epsilon": 1e-9, "max_iters": 1000}),
        ("GradVac", {"beta": 0.9, "eps": 1e-3}),
    ]:
        mine, theirs = getattr(ours, name)(**parameters), getattr(peer, name)(**parameters)
        for seed in range(3):
            torch.manual_seed(seed)
            expected = theirs(matrix)
            torch.manual_seed(seed)
            assert_same_vector(mine(matrix), expected, matrix)


@pytest.mark.parametrize("kind", ["rank 1", "rank 2"])
def test_gradvac_is_ill_posed_on_low_rank(kind: str) -> None:
    """Why parity stops after one call there: the order of the columns changes torchjd's result.

    A turned row falls into the line of another one: cosines reach +-1, where the sine and the
    comparison with the target are rounding noise.
    """
    disagreement = 0.0
    for seed in range(40):
        matrix = make_matrix(kind, 7, seed).float()
        lengths = []
        for columns in (matrix, matrix.flip(1)):
            theirs = peer.GradVac()
            for call in range(3):
                torch.manual_seed(call)
                result = theirs(columns)
            lengths.append(result.norm())
        disagreement = max(disagreement, float((lengths[0] - lengths[1]).abs() / lengths[0]))
    assert disagreement > 1e-4
