"""MoDo: weights that follow the conflict between the gradients of two batches."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from jddist._checked import Checked
from jddist.linalg.matrix import Matrix

from ._memory import Remembers
from ._simplex import project, uniform
from ._two_batches import check_two_batches
from ._weightings import Weighting


class MoDoWeighting(Weighting[Matrix], Remembers):
    """One projected gradient step per call on the weights of a stochastic MGDA.

    "Three-Way Trade-Off in Multi-Objective Learning: Optimization, Generalization and
    Conflict-Avoidance" (arXiv:2305.20057), Equation 2.9a. The input is A = J1 J2^T, [m, m], of two
    batches drawn independently (`Engine.cross_gramian`); it is not symmetric. The weights move to

        lambda <- projection onto the simplex of lambda - gamma (A lambda + rho lambda)

    and start from 1/m, again after `reset` and when m or the dtype changes. With the Gramian of one
    batch the step is biased, and the paper's guarantee is lost.

    Args:
        gamma: Step size (> 0).
        rho: Regularization towards equal weights (>= 0).

    Raises:
        ValueError: A parameter is out of its range, or at call time the input is not [m, m].
    """

    differentiable: ClassVar[bool] = False  # The steps before are not part of the graph.

    gamma = Checked[float](lambda value: value > 0.0, "positive")
    rho = Checked[float](lambda value: value >= 0.0, "non-negative")

    def __init__(self, gamma: float = 0.1, rho: float = 0.1) -> None:
        super().__init__()
        self.gamma = gamma
        self.rho = rho
        self.reset()

    def forward(self, matrix: Matrix, /) -> Tensor:
        m = check_two_batches(matrix, self)
        weights = self._recall("weights", matrix, m)
        if weights is None:
            weights = uniform(matrix, m)
        slope = matrix @ weights + self.rho * weights
        weights = project(weights - self.gamma * slope)
        self._memory["weights"] = weights
        return weights

    def __repr__(self) -> str:
        return f"MoDoWeighting(gamma={self.gamma!r}, rho={self.rho!r})"
