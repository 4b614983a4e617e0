"""MoCo: the least conflict of tracked gradients."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from jddist._checked import Checked
from jddist._stateful import Stateful
from jddist.linalg.gramian import compute_gramian
from jddist.linalg.matrix import Matrix

from ._bases import Aggregator, Forwarded, combine
from ._columns import UsesSettings, current_columns, weigh
from ._memory import ColumnState
from ._modo import MoDoWeighting


class MoCo(Aggregator, UsesSettings, Stateful):
    """Combines moving averages of the rows, with weights that follow their conflict.

    "Mitigating Gradient Bias in Multi-objective Learning: A Provably Convergent Stochastic
    Approach" (arXiv:2210.12624). Each call tracks the gradients by Y [m, n], 0 at first, moves the
    weights lambda, 1/m at first, and returns lambda^T Y:

        Y      <- Y - beta (Y - J)
        lambda <- projection onto the simplex of lambda - gamma (Y Y^T + rho I) lambda

    Y and lambda are the new ones, as in the authors' code; the projection of Y onto a ball, which
    serves the paper's proofs, is left out, and so is that code's scaling of the gradients by their
    losses. The paper's theorems let beta and gamma decrease: set them between calls.

    It remembers Y, of which each shard keeps its columns, and lambda. Both start afresh after
    `reset` and when the Jacobian's shape or dtype changes.

    Args:
        beta: Step size of the tracking (above 0, at most 1).
        gamma: Step size of the weights (> 0).
        rho: Regularization towards equal weights (>= 0).

    Raises:
        ValueError: A parameter is out of its range.
    """

    differentiable = False  # The calls before are not part of the graph.
    acts_on_columns = True
    settings: ClassVar[tuple[str, ...]] = ("beta",)
    gamma = Forwarded[float, float]("weighting")
    rho = Forwarded[float, float]("weighting")

    beta = Checked[float](lambda value: 0.0 < value <= 1.0, "above 0 and at most 1")

    def __init__(self, beta: float = 0.5, gamma: float = 0.1, rho: float = 0.0) -> None:
        super().__init__()
        self.weighting = MoDoWeighting(gamma, rho)  # One step of the same recursion, on Y Y^T.
        self.tracked = ColumnState()
        self.beta = beta

    def reset(self) -> None:
        """Forgets the tracked gradients and the weights."""
        self.weighting.reset()
        self.tracked.reset()

    def forward(self, matrix: Matrix, /) -> Tensor:
        tracked = self.tracked.recall(matrix)
        if tracked is None:
            self.reset()
            tracked = torch.zeros_like(matrix)
        tracked.lerp_(matrix, self.beta)
        self.tracked.keep(tracked)
        gramian = current_columns().sum(compute_gramian(tracked))
        return combine(weigh(self.weighting, gramian), tracked)

    def __repr__(self) -> str:
        return f"MoCo(beta={self.beta!r}, gamma={self.gamma!r}, rho={self.rho!r})"
