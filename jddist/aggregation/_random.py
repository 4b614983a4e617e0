"""A combination of the rows with random weights."""

from __future__ import annotations

import torch
from torch import Tensor

from jddist._seeded import Seeded
from jddist.linalg.matrix import Matrix

from ._bases import WeightedAggregator
from ._columns import weigh
from ._weightings import RowCountWeighting


class _Draw(Seeded):
    """One positive weight of sum 1 for each row."""

    def __init__(self, generator: torch.Generator | None) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, like: Tensor) -> Tensor:
        device = self.draws_on(like.device)
        draw = torch.randn(len(like), generator=self.generator, device=device, dtype=like.dtype)
        return draw.softmax(dim=0).to(like.device)


class RandomWeighting(RowCountWeighting):
    """Draws positive weights of sum 1 at every call: the softmax of a standard normal vector.

    The draw is one `torch.randn(m)`.

    Args:
        generator: What to draw from; None for torch's default generator of the input's device. Its
            state is part of `state_dict`.
    """

    def __init__(self, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self._draw = _Draw(generator)

    def forward(self, matrix: Matrix, /) -> Tensor:
        return weigh(self._draw, matrix)  # the draw looks at the number of rows alone


class Random(WeightedAggregator):
    """Combines the rows of the Jacobian with random positive weights of sum 1.

    Algorithm 2 of "Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task
    Learning" (arXiv:2111.10603).

    Args:
        generator: See `RandomWeighting`.
    """

    weighting: RandomWeighting

    def __init__(self, *, generator: torch.Generator | None = None) -> None:
        super().__init__(RandomWeighting(generator=generator))
