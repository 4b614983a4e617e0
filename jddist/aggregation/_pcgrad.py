"""PCGrad: every row sheds what conflicts with the other rows, in random order."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from jddist.linalg.matrix import PSDMatrix

from ._bases import GramianWeightedAggregator
from ._host import from_host, to_host
from ._weightings import GramianWeighting


class PCGradWeighting(GramianWeighting):
    """Weights of `PCGrad`, from the Gramian [m, m] to [m].

    Each call draws m times `torch.randperm(m)` from torch's default generator.
    """

    differentiable: ClassVar[bool] = False  # The loop runs on numpy arrays.

    def forward(self, gramian: PSDMatrix, /) -> Tensor:
        matrix = to_host(gramian)
        m = matrix.shape[0]
        orders = np.array([torch.randperm(m, device="cpu").tolist() for _ in range(m)], dtype=int)
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
    """

    gramian_weighting: PCGradWeighting

    def __init__(self) -> None:
        super().__init__(PCGradWeighting())
