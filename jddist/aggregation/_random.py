"""A combination of the rows with random weights."""

from __future__ import annotations

import torch
from torch import Tensor

from jddist.linalg.matrix import Matrix

from ._bases import WeightedAggregator
from ._columns import weigh
from ._weightings import RowCountWeighting


class RandomWeighting(RowCountWeighting):
    """Draws positive weights of sum 1 at every call: the softmax of a standard normal vector.

    The draw is one `torch.randn(m)` from torch's default generator of the input's device.
    """

    def forward(self, matrix: Matrix, /) -> Tensor:
        return weigh(_draw, matrix)  # the draw looks at the number of rows alone


def _draw(like: Tensor) -> Tensor:
    return torch.randn(len(like), device=like.device, dtype=like.dtype).softmax(dim=0)


class Random(WeightedAggregator):
    """Combines the rows of the Jacobian with random positive weights of sum 1.

    Algorithm 2 of "Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task
    Learning" (arXiv:2111.10603).
    """

    weighting: RandomWeighting

    def __init__(self) -> None:
        super().__init__(RandomWeighting())
