"""MGDA: the shortest vector in the convex hull of the rows."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from torch import Tensor

from jddist._checked import Checked
from jddist.linalg.matrix import PSDMatrix

from ._bases import Forwarded, GramianWeightedAggregator
from ._host import from_host, to_host
from ._weightings import GramianWeighting


class MGDAWeighting(GramianWeighting):
    """Weights of `MGDA`, from the Gramian [m, m] to [m] on the probability simplex.

    Args:
        epsilon: The optimization stops at a step size below this (> 0).
        max_iters: Greatest number of steps (> 0).

    Raises:
        ValueError: A parameter is not positive.
    """

    pure: ClassVar[bool] = True

    differentiable: ClassVar[bool] = False  # The loop runs on numpy arrays.

    epsilon = Checked[float](lambda value: value > 0.0, "positive")
    max_iters = Checked[int](lambda value: value > 0, "positive")

    def __init__(self, epsilon: float = 0.001, max_iters: int = 100) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.max_iters = max_iters

    def forward(self, gramian: PSDMatrix, /) -> Tensor:
        """Frank-Wolfe with exact line search, Algorithm 2 of arXiv:1810.04650."""
        matrix = to_host(gramian)
        m = matrix.shape[0]
        weights = np.full(m, 1.0 / max(m, 1), dtype=matrix.dtype)
        if m == 0:
            return from_host(weights, gramian)
        with np.errstate(all="ignore"):
            for _ in range(self.max_iters):
                slopes = matrix @ weights
                k = int(slopes.argmin())
                mixed, current, vertex = slopes[k], weights @ slopes, matrix[k, k]
                if vertex <= mixed:
                    step = 1.0
                elif current <= mixed:
                    step = 0.0
                else:
                    step = float((current - mixed) / (current + vertex - 2 * mixed))
                at_vertex = weights[k] == 1.0
                weights *= 1.0 - step
                weights[k] += step
                if step < self.epsilon or at_vertex:
                    break
        return from_host(weights, gramian)


class MGDA(GramianWeightedAggregator):
    """Finds the shortest vector among the convex combinations of the Jacobian's rows.

    "Multiple-gradient descent algorithm (MGDA) for multiobjective optimization" (Désidéri, 2012),
    solved as in Algorithm 2 of "Multi-Task Learning as Multi-Objective Optimization"
    (arXiv:1810.04650).

    Args:
        epsilon: The optimization stops at a step size below this (> 0).
        max_iters: Greatest number of steps (> 0).

    Raises:
        ValueError: A parameter is not positive.
    """

    gramian_weighting: MGDAWeighting
    epsilon = Forwarded[float, float]()
    max_iters = Forwarded[int, int]()

    def __init__(self, epsilon: float = 0.001, max_iters: int = 100) -> None:
        super().__init__(MGDAWeighting(epsilon, max_iters))
