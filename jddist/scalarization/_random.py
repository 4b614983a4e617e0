"""A combination of the objectives with random weights."""

from __future__ import annotations

import torch
from torch import Tensor

from jddist._seeded import Seeded

from ._bases import Scalarizer


class Random(Scalarizer, Seeded):
    """Combines the values with random positive weights of sum 1.

    The weights are the softmax of one `torch.randn(values.numel())` per call. Algorithm 2 of
    "Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task Learning"
    (arXiv:2111.10603).

    Args:
        generator: What to draw from; None for torch's default generator of the values' device. Its
            state is part of `state_dict`.
    """

    def __init__(self, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, values: Tensor, /) -> Tensor:
        device = self.draws_on(values.device)
        draw = torch.randn(
            values.numel(), generator=self.generator, device=device, dtype=values.dtype
        ).to(values.device)
        return (draw.softmax(dim=-1).reshape(values.shape) * values).sum()
