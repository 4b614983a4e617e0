"""SDMGrad: weights between a preference and the least conflict of two batches' gradients."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from jddist._checked import Checked
from jddist.linalg.matrix import Matrix

from ._memory import Remembers
from ._preference import HasPreference
from ._simplex import project, uniform
from ._two_batches import check_two_batches
from ._weightings import Weighting


class SDMGradWeighting(HasPreference, Weighting[Matrix], Remembers):
    """Several projected momentum steps per call towards the least conflict, pulled to a preference.

    "Direction-oriented Multi-objective Learning: Simple and Provable Stochastic Algorithms"
    (arXiv:2305.18409). The input is A = J1 J2^T, [m, m], of two batches drawn independently
    (`Engine.cross_gramian`); it is not symmetric. With v the preference, A divided by the squared
    mean of the square roots of its diagonal (negative entries count as 0), and the weights w of the
    call before,

        repeat n_iter times:  u <- momentum u + A (w + lambda_ v)
                              w <- projection onto the simplex of w - lr u

    and the result is (w + lambda_ v) / (1 + lambda_). w starts from 1/m, again after `reset` and
    when m or the dtype changes.

    Args:
        lr: Step size (> 0).
        momentum: Share of the step before (from 0 to below 1).
        n_iter: Number of steps per call (>= 1).
        lambda_: Strength of the pull (>= 0).
        pref_vector: The preference v of shape [m]; None means 1/m each.

    Raises:
        ValueError: A parameter is out of its range, or at call time the input is not [m, m] or the
            preference has another length.
    """

    differentiable: ClassVar[bool] = False  # The steps before are not part of the graph.

    lr = Checked[float](lambda value: value > 0.0, "positive")
    momentum = Checked[float](lambda value: 0.0 <= value < 1.0, "from 0 to below 1")
    n_iter = Checked[int](lambda value: value >= 1, "at least 1")
    lambda_ = Checked[float](lambda value: value >= 0.0, "non-negative")

    def __init__(
        self,
        lr: float = 10.0,
        momentum: float = 0.5,
        n_iter: int = 20,
        lambda_: float = 0.3,
        pref_vector: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.lr = lr
        self.momentum = momentum
        self.n_iter = n_iter
        self.lambda_ = lambda_
        self.pref_vector = pref_vector
        self.reset()

    def forward(self, matrix: Matrix, /) -> Tensor:
        m = check_two_batches(matrix, self)
        weights = self._recall("weights", matrix, m)
        if weights is None:
            weights = uniform(matrix, m)
        pull = self.lambda_ * self.weighting(matrix)
        scale = matrix.diagonal().clamp(min=0.0).sqrt().mean()
        # In float16, 1e-8 is 0.
        scaled = matrix / (scale.square() + 1e-8).clamp(min=torch.finfo(matrix.dtype).tiny)
        step = weights.new_zeros(m)
        for _ in range(self.n_iter):
            step = self.momentum * step + scaled @ (weights + pull)
            weights = project(weights - self.lr * step)
        self._memory["weights"] = weights
        return (weights + pull) / (1.0 + self.lambda_)

    def __repr__(self) -> str:
        return (
            f"SDMGradWeighting(lr={self.lr!r}, momentum={self.momentum!r}, n_iter={self.n_iter!r}, "
            f"lambda_={self.lambda_!r}, pref_vector={self.pref_vector!r})"
        )
