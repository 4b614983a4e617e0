"""A combination of the objectives with random weights."""

from __future__ import annotations

import torch
from torch import Tensor

from ._bases import Scalarizer


class Random(Scalarizer):
    """Combines the values with random positive weights of sum 1.

    The weights are the softmax of one `torch.randn(values.numel())` per call, from torch's default
    generator. Algorithm 2 of "Reasonable Effectiveness of Random Weighting: A Litmus Test for
    Multi-Task Learning" (arXiv:2111.10603).
    """

    def forward(self, values: Tensor, /) -> Tensor:
        draw = torch.randn(values.numel(), device=values.device, dtype=values.dtype)
        return (draw.softmax(dim=-1).reshape(values.shape) * values).sum()
