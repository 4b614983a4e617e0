"""PCGrad and GradVac against their papers' algorithms, on the vectors and with 60 digits.

They add multiples of rows one after the other, and what is left of a row may be far shorter than
the row was: its square, taken from the Gramian, would be rounding alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Context, Decimal, localcontext

import pytest
import torch
from torch import Tensor

import jddist.aggregation as ours
from tests.unit.aggregation._matrices import KINDS, make_matrix

peer = pytest.importorskip("torchjd.aggregation")

Vector = list[Decimal]
BOUNDS = {torch.float64: 2e-14, torch.float32: 1e-6}
# Of a row in another one's line GradVac's eps leaves 1e-8, to be turned the next time.
BOUNDS_IN_A_LINE = {torch.float64: 1e-11, torch.float32: 1e-5}
EPS = Decimal("1e-8")


@contextmanager
def _many_digits() -> Iterator[None]:
    with localcontext(Context(prec=60)):
        yield


def _exact(matrix: Tensor) -> list[Vector]:
    return [[Decimal(value) for value in row] for row in matrix.tolist()]


def _dot(first: Vector, second: Vector) -> Decimal:
    return sum((a * b for a, b in zip(first, second, strict=True)), Decimal(0))


def _plus(first: Vector, factor: Decimal, second: Vector) -> Vector:
    return [a + factor * b for a, b in zip(first, second, strict=True)]


def _sine(cosine: Decimal) -> Decimal:
    return max(1 - cosine * cosine, Decimal(0)).sqrt()


class _PCGrad:
    def __call__(self, matrix: Tensor) -> Vector:
        rows = _exact(matrix)
        total = [Decimal(0)] * matrix.shape[1]
        for i, row in enumerate(rows):
            for j in torch.randperm(len(rows)).tolist():
                product = _dot(row, rows[j])
                if j != i and product < 0:
                    row = _plus(row, -product / _dot(rows[j], rows[j]), rows[j])
            total = _plus(total, Decimal(1), row)
        return total


class _GradVac:
    def __init__(self) -> None:
        self.targets: dict[tuple[int, int], Decimal] = {}

    def __call__(self, matrix: Tensor) -> Vector:
        rows = _exact(matrix)
        total = [Decimal(0)] * matrix.shape[1]
        for i, row in enumerate(rows):
            others = [j for j in range(len(rows)) if j != i]
            for j in (others[k] for k in torch.randperm(len(others)).tolist()):
                length, other = _dot(row, row).sqrt(), _dot(rows[j], rows[j]).sqrt()
                cosine = _dot(row, rows[j]) / (length * other + EPS)
                target = self.targets.get((i, j), Decimal(0))
                if cosine < target:
                    step = length * (target * _sine(cosine) - cosine * _sine(target))
                    row = _plus(row, step / (other * _sine(target) + EPS), rows[j])
                self.targets[i, j] = (target + cosine) / 2
            total = _plus(total, Decimal(1), row)
        return total


PAPERS: dict[str, Callable[[], Callable[[Tensor], Vector]]] = {
    "PCGrad": _PCGrad,
    "GradVac": _GradVac,
}


def _errors(
    name: str, matrix: Tensor, calls: int, *methods: Callable[[Tensor], Tensor]
) -> list[float]:
    """The largest error of each method, relative to the Jacobian, with the same random draws."""
    paper = PAPERS[name]()
    largest = [0.0] * len(methods)
    for call in range(calls):
        torch.manual_seed(call)
        with _many_digits():
            expected = torch.tensor([float(v) for v in paper(matrix)], dtype=torch.float64)
        for i, method in enumerate(methods):
            torch.manual_seed(call)
            error = float((method(matrix).double() - expected).norm() / matrix.double().norm())
            largest[i] = max(largest[i], error) if error == error else float("nan")
    return largest


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PAPERS)
def test_vectors_of_the_paper(name: str, kind: str, dtype: torch.dtype) -> None:
    bound = (BOUNDS_IN_A_LINE if (name, kind) == ("GradVac", "rank 1") else BOUNDS)[dtype]
    for m in (2, 4, 7):
        for seed in range(3):
            matrix = make_matrix(kind, m, seed, n=5).to(dtype)
            (error,) = _errors(name, matrix, 4, getattr(ours, name)())
            assert error <= bound, (m, seed)


@pytest.mark.parametrize("name", PAPERS)
def test_many_rows_in_a_plane(name: str) -> None:
    """Of some rows 1e-11 is left, or 1e-16 as PCGrad projects them on others."""
    matrix = make_matrix("random", 64, seed=0, n=2)
    (error,) = _errors(name, matrix, 3, getattr(ours, name)())
    assert error <= BOUNDS[torch.float64]


def test_gradvac_where_torchjd_leaves_all_bounds() -> None:
    """It takes the length of a turned row from the Gramian, and remembers cosines beyond 1."""
    matrix = make_matrix("rank 2", 17, seed=0, n=5)
    for dtype, bound in BOUNDS.items():
        mine, theirs = _errors("GradVac", matrix.to(dtype), 3, ours.GradVac(), peer.GradVac())
        assert mine <= bound
        assert not theirs <= 100 * bound


def test_gradvac_remembers_cosines() -> None:
    for dtype in BOUNDS:
        for kind in KINDS:
            gradvac = ours.GradVac()
            for call in range(5):
                torch.manual_seed(call)
                assert gradvac(make_matrix(kind, 17, call).to(dtype)).isfinite().all()
            targets = gradvac.gramian_weighting.get_extra_state()
            assert float(targets.abs().max()) <= 1.0 + 4.0 * torch.finfo(dtype).eps


def test_gradvac_of_opposite_rows() -> None:
    """Nothing is left of the first that is turned by the other, and that has no direction."""
    row = torch.tensor([[0.1, 0.7, -0.3]], dtype=torch.float64)
    matrix = torch.cat([row, -row, row.flip(1)])
    cosine = float(torch.cosine_similarity(matrix[0], matrix[2], dim=0))
    seen = set()
    for seed in range(8):
        torch.manual_seed(seed)
        weighting = ours.GradVacWeighting(eps=0.0)
        assert weighting(matrix @ matrix.T).isfinite().all()
        seen.add(round(float(weighting.get_extra_state()[0, 2]), 12))
    assert seen == {0.0, round(cosine / 2, 12)}


def test_gradvac_of_a_gramian_that_is_not_finite() -> None:
    gramian = torch.tensor([[1.0, float("nan")], [float("nan"), 1.0]])
    assert ours.GradVacWeighting()(gramian).isnan().all()


@pytest.mark.parametrize("target", [1.0, 3e6, -3e6])
def test_gradvac_with_remembered_cosines_beyond_1(target: float) -> None:
    """Earlier versions could remember them: they count as 1."""
    weighting = ours.GradVacWeighting(eps=0.0)
    weighting.set_extra_state(torch.full((3, 3), target, dtype=torch.float64))
    matrix = make_matrix("random", 3, seed=0)
    assert weighting(matrix @ matrix.T).isfinite().all()
    remembered = weighting.get_extra_state()
    assert float((remembered - remembered.diag().diag()).abs().max()) <= 1.0
