"""GradVac: every row is turned until its angles to the other rows reach moving targets."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from jddist._checked import Checked
from jddist._seeded import Seeded
from jddist._stateful import Stateful
from jddist.linalg.matrix import PSDMatrix

from ._bases import Forwarded, GramianWeightedAggregator
from ._host import Array, Indices, from_host, to_host
from ._weightings import GramianWeighting


class GradVacWeighting(GramianWeighting, Seeded, Stateful):
    """Weights of `GradVac`, from the Gramian [m, m] to [m].

    It remembers the targets, a moving average [m, m] of the rows' cosine similarities, across calls
    and in its `state_dict`. They start from zero again after `reset` and when m or the precision
    changes. Each call draws m times `torch.randperm(m - 1)`.

    Args:
        beta: Share of the new similarities in the moving average (between 0 and 1).
        eps: Added to denominators (>= 0).
        generator: What to draw from; None for torch's default generator of the CPU. Its state is
            part of `state_dict`.

    Raises:
        ValueError: A parameter is out of its range.
    """

    differentiable: ClassVar[bool] = False  # The loop runs on numpy arrays.

    beta = Checked[float](lambda value: 0.0 <= value <= 1.0, "between 0 and 1")
    eps = Checked[float](lambda value: value >= 0.0, "non-negative")

    def __init__(
        self,
        beta: float = 0.5,
        eps: float = 1e-8,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.beta = beta
        self.eps = eps
        self.generator = generator
        self._targets: Array = np.zeros((0, 0))

    def reset(self) -> None:
        """Forgets the targets, so that the next call starts from zero."""
        self._targets = np.zeros((0, 0))

    def get_extra_state(self) -> Tensor:
        """The targets [m, m], or [0, 0] before the first call."""
        return torch.from_numpy(self._targets.copy())

    def set_extra_state(self, state: Tensor) -> None:
        """Takes over the targets of another instance."""
        self._targets = state.detach().to(device="cpu", copy=True).numpy()

    def forward(self, gramian: PSDMatrix, /) -> Tensor:
        matrix = to_host(gramian)
        m = matrix.shape[0]
        if self._targets.shape != matrix.shape or self._targets.dtype != matrix.dtype:
            self._targets = np.zeros_like(matrix)
        orders = self._draw_orders(m)
        coefficients = np.eye(m, dtype=matrix.dtype)  # Row i is the turned row i in terms of J.
        products = matrix.copy()  # coefficients @ matrix, kept up to date.
        rows = np.arange(m)
        # The rows do not depend on each other: step k serves all of them at once.
        with np.errstate(all="ignore"):
            for k in range(m - 1):
                self._turn(rows, orders[:, k], matrix, coefficients, products)
        return from_host(coefficients.sum(axis=0), gramian)

    def _draw_orders(self, m: int) -> Indices:
        """For each row a random order of the other rows, [m, m - 1]."""
        draws = [self.permutation(max(m - 1, 0)).numpy() for _ in range(m)]
        return np.array([draw + (draw >= i) for i, draw in enumerate(draws)])

    def _turn(
        self, rows: Indices, others: Indices, matrix: Array, coefficients: Array, products: Array
    ) -> None:
        """Turns row i towards row others[i] for all i, where their cosine is below its target."""
        lengths = _root((products * coefficients).sum(axis=1))
        other_lengths = _root(matrix[others, others])
        cosines = products[rows, others] / (lengths * other_lengths + self.eps)
        targets = self._targets[rows, others]
        self._targets[rows, others] = (1.0 - self.beta) * targets + self.beta * cosines
        chosen = np.flatnonzero(cosines < targets)
        if chosen.size == 0:
            return
        others, targets, cosines = others[chosen], targets[chosen], cosines[chosen]
        sines, target_sines = _root(1.0 - cosines**2), _root(1.0 - targets**2)
        steps = lengths[chosen] * (targets * sines - cosines * target_sines)
        steps /= other_lengths[chosen] * target_sines + self.eps
        coefficients[chosen, others] += steps
        products[chosen] += steps[:, None] * matrix[others]


def _root(values: Array) -> Array:
    return np.sqrt(np.maximum(values, 0.0))


class GradVac(GramianWeightedAggregator, Stateful):
    """Turns each row of the Jacobian towards the others until their angles reach moving targets.

    "Gradient Vaccine: Investigating and Improving Multi-task Optimization in Massively Multilingual
    Models" (arXiv:2010.05874). For each row i, the other rows j are visited in random order; where
    the cosine of the turned row i and row j is below its target, a multiple of row j is added that
    lifts it to the target, and the target moves to (1 - beta) target + beta cosine. The result is
    the sum of the turned rows. One instance serves one group of parameters, since it remembers the
    targets.

    Args:
        beta: Share of the new similarities in the moving average (between 0 and 1).
        eps: Added to denominators (>= 0).
        generator: See `GradVacWeighting`.

    Raises:
        ValueError: A parameter is out of its range.
    """

    gramian_weighting: GradVacWeighting
    beta = Forwarded[float, float]()
    eps = Forwarded[float, float]()

    def __init__(
        self,
        beta: float = 0.5,
        eps: float = 1e-8,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(GradVacWeighting(beta, eps, generator=generator))

    def reset(self) -> None:
        """Forgets the targets, so that the next call starts from zero."""
        self.gramian_weighting.reset()
