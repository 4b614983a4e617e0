"""SDMGrad: weights between a preference and the least conflict of two batches' gradients."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

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

    @property
    def lr(self) -> float:
        """Step size."""
        return self._lr

    @lr.setter
    def lr(self, value: float) -> None:
        if value <= 0.0:
            raise ValueError(f"lr must be positive. Found lr={value!r}.")
        self._lr = value

    @property
    def momentum(self) -> float:
        """Share of the step before."""
        return self._momentum

    @momentum.setter
    def momentum(self, value: float) -> None:
        if not 0.0 <= value < 1.0:
            raise ValueError(f"momentum must be from 0 to below 1. Found momentum={value!r}.")
        self._momentum = value

    @property
    def n_iter(self) -> int:
        """Number of steps per call."""
        return self._n_iter

    @n_iter.setter
    def n_iter(self, value: int) -> None:
        if value < 1:
            raise ValueError(f"n_iter must be at least 1. Found n_iter={value!r}.")
        self._n_iter = value

    @property
    def lambda_(self) -> float:
        """Strength of the pull."""
        return self._lambda

    @lambda_.setter
    def lambda_(self, value: float) -> None:
        if value < 0.0:
            raise ValueError(f"lambda_ must be non-negative. Found lambda_={value!r}.")
        self._lambda = value

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
