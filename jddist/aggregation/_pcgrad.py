"""PCGrad: every row sheds what conflicts with the other rows, in random order."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from jddist._seeded import Seeded
from jddist.linalg.matrix import PSDMatrix

from ._bases import GramianWeightedAggregator
from ._host import from_host, to_host
from ._weightings import GramianWeighting


class PCGradWeighting(GramianWeighting, Seeded):
    """Weights of `PCGrad`, from the Gramian [m, m] to [m].

    Each call draws m times `torch.randperm(m)`.

    Args:
        generator: What to draw from; None for torch's default generator of the CPU. Its state is
            part of `state_dict`.
    """

    differentiable: ClassVar[bool] = False  # The loop runs on numpy arrays.

    def __init__(self, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, gramian: PSDMatrix, /) -> Tensor:
        matrix = to_host(gramian)
        m = matrix.shape[0]
        orders = np.array([self.permutation(m).tolist() for _ in range(m)], dtype=int)
        coefficients = np.eye(m, dtype=matrix.dtype)  # Row i is the projected row i in terms of J.
        products = matrix.copy()  # coefficients @ matrix, kept up to date.
        rows = np.arange(m)
        # The square of a row that is 0, or too short for its dtype: nothing to project on.
        squares = matrix.diagonal()
        usable = squares >= np.finfo(matrix.dtype).tiny
        # The rows do not depend on each other: step k serves all of them at once.
        for k in range(m):
            others = orders[:, k]
            conflicts = (products[rows, others] < 0.0) & (others != rows) & usable[others]
            chosen = np.flatnonzero(conflicts)
            if chosen.size == 0:
                continue
            others = others[chosen]
            with np.errstate(all="ignore"):
                steps = -products[chosen, others] / squares[others]
                coefficients[chosen, others] += steps
                products[chosen] += steps[:, None] * matrix[others]
        return from_host(coefficients.sum(axis=0), gramian)


class PCGrad(GramianWeightedAggregator):
    """Projects each row of the Jacobian off the rows it conflicts with, then sums the rows.

    Algorithm 1 of "Gradient Surgery for Multi-Task Learning" (arXiv:2001.06782).

    Args:
        generator: See `PCGradWeighting`.
    """

    gramian_weighting: PCGradWeighting

    def __init__(self, *, generator: torch.Generator | None = None) -> None:
        super().__init__(PCGradWeighting(generator=generator))
