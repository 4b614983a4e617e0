"""The sum of the rows."""

from __future__ import annotations

import torch
from torch import Tensor

from jddist.linalg.matrix import Matrix

from ._bases import WeightedAggregator
from ._weightings import RowCountWeighting


class SumWeighting(RowCountWeighting):
    """Gives each objective the weight 1."""

    def forward(self, matrix: Matrix, /) -> Tensor:
        return torch.ones(matrix.shape[0], device=matrix.device, dtype=matrix.dtype)


class Sum(WeightedAggregator):
    """Sums the rows of the Jacobian: plain gradient descent on the sum of the objectives."""

    weighting: SumWeighting

    def __init__(self) -> None:
        super().__init__(SumWeighting())
