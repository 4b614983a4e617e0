"""CAGrad: near the mean, the direction that serves the worst-served objective best."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from torch import Tensor

from jddist._checked import Checked
from jddist.linalg.matrix import PSDMatrix

from ._bases import Forwarded, GramianWeightedAggregator
from ._cosines import split_lengths
from ._host import Array, from_double, relative_rounding, to_host_in_double
from ._maximin import maximin
from ._weightings import GramianWeighting

ROUNDING = 1e-14  # Of a vector's length, when J has the Frobenius norm 1.


class CAGradWeighting(GramianWeighting):
    """Weights of `CAGrad`, from the Gramian [m, m] to [m].

    Args:
        c: Radius of the ball around the mean, relative to the mean's length (>= 0).
        norm_eps: Trace of G below which it counts as 0, and length below which the sought convex
            combination of the rows does, when J has the Frobenius norm 1 (>= 0).

    Raises:
        ValueError: A parameter is negative.
    """

    pure: ClassVar[bool] = True

    differentiable: ClassVar[bool] = False  # The solver runs on numpy arrays.

    c = Checked[float](lambda value: value >= 0.0, "non-negative")
    norm_eps = Checked[float](lambda value: value >= 0.0, "non-negative")

    def __init__(self, c: float, norm_eps: float = 1e-4) -> None:
        super().__init__()
        self.c = c
        self.norm_eps = norm_eps

    def forward(self, gramian: PSDMatrix, /) -> Tensor:
        matrix = to_host_in_double(gramian)
        m = matrix.shape[0]
        nothing = gramian.new_zeros(m)
        lengths, cosines = split_lengths(matrix)
        longest = float(lengths.max(initial=0.0))
        if longest == 0.0:
            return nothing
        lengths /= longest  # So that nothing overflows.
        norm = float(np.linalg.norm(lengths))
        if (longest * norm) * (longest * norm) < self.norm_eps:
            return nothing
        rows = (lengths / norm)[:, None] * _square_root(cosines, relative_rounding(gramian))
        mean = rows.mean(axis=0)
        radius = self.c * float(np.linalg.norm(mean))
        if radius == 0.0:
            return gramian.new_full([m], 1.0 / m)
        with np.errstate(all="ignore"):
            chosen = maximin(rows, rows @ (mean / radius))
        length = float(np.linalg.norm(chosen @ rows))
        if length < self.norm_eps or length <= ROUNDING:
            return nothing
        return from_double(1.0 / m + chosen * (radius / length), gramian)


def _square_root(cosines: Array, rounding: float) -> Array:
    """Unit rows [m, r] with these cosines; the r columns are independent, not just rounding."""
    values, vectors = np.linalg.eigh(cosines)
    kept = values > rounding * values[-1]
    return vectors[:, kept] * np.sqrt(values[kept])


class CAGrad(GramianWeightedAggregator):
    """In a ball around the mean of the rows, finds the vector that helps the worst-served most.

    "Conflict-Averse Gradient Descent for Multi-task Learning" (arXiv:2110.14048), Algorithm 1: with
    the mean g0 of the rows, the result maximizes the least product with a row over the ball of
    radius c |g0| around g0. It is g0 + c |g0| g / |g|, where g = Jᵀw minimizes g0ᵀg + c |g0| |g|
    over the simplex of weights w. For c >= 1 it conflicts with no row; for c = 0 it is g0.

    Where g is shorter than `norm_eps` (J scaled to the Frobenius norm 1), the point is Pareto
    stationary or nearly so: g has no reliable direction, and all weights are 0. So they are where
    the trace of G is below `norm_eps`, as happens near convergence; `norm_eps=0` turns that off.
    For one row the result is 1 + c times that row.

    The weights are optimal to rounding error. torchjd's, from an interior-point solver of tolerance
    1e-8, are about 1e-4 off where w is ill-conditioned; and it gives zeros for c = 0 where the row
    that agrees least with g0 is almost 0.

    Args:
        c: Radius of the ball around the mean, relative to the mean's length (>= 0).
        norm_eps: Trace of G below which it counts as 0, and length below which g does (>= 0).

    Raises:
        ValueError: A parameter is negative.
    """

    gramian_weighting: CAGradWeighting
    c = Forwarded[float, float]()
    norm_eps = Forwarded[float, float]()

    def __init__(self, c: float, norm_eps: float = 1e-4) -> None:
        super().__init__(CAGradWeighting(c, norm_eps))

    def __str__(self) -> str:
        return type(self).__name__ + str(self.c).removesuffix(".0")
