"""The average of the rows."""

from __future__ import annotations

import torch
from torch import Tensor

from jddist.linalg.matrix import Matrix

from ._bases import WeightedAggregator
from ._weightings import RowCountWeighting


class MeanWeighting(RowCountWeighting):
    """Gives each of the m objectives the weight 1/m."""

    def forward(self, matrix: Matrix, /) -> Tensor:
        m = matrix.shape[0]
        return torch.full([m], 1.0 / max(m, 1), device=matrix.device, dtype=matrix.dtype)


class Mean(WeightedAggregator):
    """Averages the rows of the Jacobian: plain gradient descent on the mean of the objectives."""

    weighting: MeanWeighting

    def __init__(self) -> None:
        super().__init__(MeanWeighting())
