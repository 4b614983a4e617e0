"""Krum: the rows that are close to most others are averaged, the outliers left out."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from jddist._checked import Checked
from jddist.linalg.matrix import PSDMatrix

from ._bases import Forwarded, GramianWeightedAggregator
from ._host import from_host, to_host
from ._weightings import GramianWeighting


class KrumWeighting(GramianWeighting):
    """Weights of `Krum`, from the Gramian [m, m] to [m]: 1 / n_selected or 0 each.

    Args:
        n_byzantine: Number of rows that may be adversarial (>= 0).
        n_selected: Number of rows to average (> 0).

    Raises:
        ValueError: A parameter is out of its range, or at call time m is below n_byzantine + 3 or
            n_selected.
    """

    pure: ClassVar[bool] = True

    n_byzantine = Checked[int](lambda value: value >= 0, "non-negative")
    n_selected = Checked[int](lambda value: value >= 1, "positive")

    def __init__(self, n_byzantine: int, n_selected: int = 1) -> None:
        super().__init__()
        self.n_byzantine = n_byzantine
        self.n_selected = n_selected

    def forward(self, gramian: PSDMatrix, /) -> Tensor:
        m = gramian.shape[0]
        if m < max(self.n_byzantine + 3, self.n_selected):
            raise ValueError(
                f"Krum with n_byzantine={self.n_byzantine} and n_selected={self.n_selected} needs "
                f"at least n_byzantine + 3 and n_selected objectives. Found {m}."
            )
        half_gramian = 0.5 * to_host(gramian)
        half_squares = half_gramian.diagonal()
        # Quarters of the squared distances: the same order and rounding, and no overflow.
        squares = 0.5 * half_squares[:, None] + 0.5 * half_squares - half_gramian
        distances = np.sqrt(np.maximum(squares, 0.0))
        # Of each row's distances the smallest is its own, 0.
        n_closest = m - self.n_byzantine - 2
        distances.partition(n_closest, axis=1)
        scores = distances[:, : n_closest + 1].sum(axis=1)
        # Ties are the rule when m = n_byzantine + 3: topk breaks them as torchjd does.
        selected = torch.from_numpy(scores).topk(self.n_selected, largest=False).indices
        weights = np.zeros(m)
        weights[selected.numpy()] = 1.0 / self.n_selected
        return from_host(weights, gramian)


class Krum(GramianWeightedAggregator):
    """Averages the rows of the Jacobian that are closest to most of the others.

    "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent" (NeurIPS 2017). The
    score of a row is the sum of the distances to its m - n_byzantine - 2 closest other rows; the
    `n_selected` rows of the lowest scores are averaged (Multi-Krum if more than one). Which
    of equal scores counts is left to `torch.topk`. (The paper sums squared distances, torchjd and
    this class the distances.)

    Autograd follows the average; the selection counts as constant.

    Args:
        n_byzantine: Number of rows that may be adversarial (>= 0).
        n_selected: Number of rows to average (> 0).

    Raises:
        ValueError: A parameter is out of its range, or at call time m is below n_byzantine + 3 or
            n_selected.
    """

    gramian_weighting: KrumWeighting
    n_byzantine = Forwarded[int, int]()
    n_selected = Forwarded[int, int]()

    def __init__(self, n_byzantine: int, n_selected: int = 1) -> None:
        super().__init__(KrumWeighting(n_byzantine, n_selected))

    def __str__(self) -> str:
        return f"{type(self).__name__}{self.n_byzantine}-{self.n_selected}"
