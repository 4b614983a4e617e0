"""GradVac: every row is turned until its angles to the other rows reach moving targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from jddist._checked import Checked
from jddist._seeded import Seeded
from jddist._stateful import Stateful
from jddist.linalg.matrix import PSDMatrix

from ._bases import Forwarded, GramianWeightedAggregator
from ._cosines import split_lengths
from ._host import Array, Indices, from_double, to_host
from ._weightings import GramianWeighting

ROUNDING = 1e-15  # Of rows [m, m] with a given Gramian, relative to their lengths, over m^0.5.


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
        if not np.isfinite(matrix).all():
            return gramian.new_full([m], torch.nan)
        rows = _rows(matrix.astype(np.float64), torch.finfo(gramian.dtype).eps)
        turning = _Turning(rows, rows.copy(), np.eye(m), _lengths(rows), _lengths(rows))
        # The rows do not depend on each other: step k serves all of them at once.
        with np.errstate(all="ignore"):
            for k in range(m - 1):
                self._turn(orders[:, k], turning)
        return from_double(turning.coefficients.sum(axis=0), gramian)

    def _draw_orders(self, m: int) -> Indices:
        """For each row a random order of the other rows, [m, m - 1]."""
        draws = [self.permutation(max(m - 1, 0)).numpy() for _ in range(m)]
        return np.array([draw + (draw >= i) for i, draw in enumerate(draws)])

    def _turn(self, others: Indices, at: _Turning) -> None:
        """Turns row i towards row others[i] for all i, where their cosine is below its target."""
        m = len(others)
        rounding = np.finfo(self._targets.dtype).eps
        towards, other_lengths = at.rows[others], at.lengths[others]
        lengths = _lengths(at.turned)
        # Of a row of which nothing is left but rounding, the direction is noise.
        lengths[lengths <= max(rounding, ROUNDING * m**0.5) * at.added] = 0.0
        products = np.where(lengths > 0.0, np.einsum("ij,ij->i", at.turned, towards), 0.0)
        cosines = _divide(products, lengths * other_lengths + self.eps)
        # Nothing is turned all the way into a line, which takes an infinite step.
        targets = self._targets[np.arange(m), others].astype(np.float64)
        targets = np.minimum(np.maximum(targets, rounding - 1.0), 1.0 - rounding)
        self._targets[np.arange(m), others] = (1.0 - self.beta) * targets + self.beta * cosines
        below = cosines < targets - 2.0 * rounding
        chosen = np.flatnonzero(below & (lengths > 0.0) & (other_lengths > 0.0))
        if chosen.size == 0:
            return
        targets, cosines, towards = targets[chosen], cosines[chosen], towards[chosen]
        lengths, other_lengths = lengths[chosen], other_lengths[chosen]
        true_cosines = _divide(products[chosen], lengths * other_lengths)
        # The part across, since the root of 1 - cosine² has only half of the digits near 0.
        across = at.turned[chosen] - (lengths * true_cosines / other_lengths)[:, None] * towards
        squares = lengths**2 * (true_cosines - cosines) * (true_cosines + cosines)
        heights = np.sqrt(squares + np.einsum("ij,ij->i", across, across))
        target_sines = np.sqrt((1.0 - targets) * (1.0 + targets))
        steps = targets * heights - cosines * lengths * target_sines
        steps = _divide(steps, other_lengths * target_sines + self.eps)
        at.coefficients[chosen, others[chosen]] += steps
        at.turned[chosen] += steps[:, None] * towards
        at.added[chosen] += np.abs(steps) * other_lengths


@dataclass
class _Turning:
    """Rows on their way.

    Attributes:
        rows: The original rows [m, r].
        turned: The turned ones, coefficients @ rows.
        coefficients: Row i is the turned row i in terms of the original ones, [m, m].
        lengths: Of the original rows [m].
        added: Sum of the lengths of all that was added up for each turned row [m].
    """

    rows: Array
    turned: Array
    coefficients: Array
    lengths: Array
    added: Array


def _lengths(rows: Array) -> Array:
    return np.sqrt(np.einsum("ij,ij->i", rows, rows))


def _rows(gramian: Array, rounding: float) -> Array:
    """Rows [m, r] with this Gramian [m, m] up to rounding.

    A row may lose nearly all of its length as it is turned. Its square, a difference of entries of
    the Gramian, is then off by any factor and cosines far beyond 1 would come out; the length of
    an explicit row keeps twice as many digits.
    """
    lengths, cosines = split_lengths(gramian)
    values, vectors = np.linalg.eigh(cosines)
    kept = values > len(values) ** 0.5 * rounding * values.max(initial=0.0)
    return lengths[:, None] * (vectors[:, kept] * np.sqrt(values[kept]))


def _divide(values: Array, divisors: Array) -> Array:
    """The quotients, and 0 where the divisor is 0."""
    return np.divide(values, divisors, out=np.zeros_like(values), where=divisors > 0.0)


class GradVac(GramianWeightedAggregator, Stateful):
    """Turns each row of the Jacobian towards the others until their angles reach moving targets.

    "Gradient Vaccine: Investigating and Improving Multi-task Optimization in Massively Multilingual
    Models" (arXiv:2010.05874). For each row i, the other rows j are visited in random order; where
    the cosine of the turned row i and row j is below its target, a multiple of row j is added that
    lifts it to the target, and the target moves to (1 - beta) target + beta cosine. The result is
    the sum of the turned rows. One instance serves one group of parameters, since it remembers the
    targets.

    Rows of low rank may lose nearly all of their length as they are turned. Explicit rows, from a
    factor of G in float64, keep their directions; torchjd takes lengths from the Gramian, and can
    remember cosines far beyond 1. A row of which only rounding is left has the cosine 0 with all.

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
