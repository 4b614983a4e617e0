"""The geometric mean of the objectives."""

from __future__ import annotations

import torch
from torch import Tensor

from ._bases import Scalarizer


class GeometricMean(Scalarizer):
    """Takes the geometric mean of non-negative values, also known as GLS.

    For m values l it is (l_1 * ... * l_m)^(1/m), computed through logarithms. "MultiNet++:
    Multi-Stream Feature Aggregation and Geometric Loss Strategy for Multi-Task Learning" (CVPR
    Workshops 2019).

    The gradient is the result over m l_i, which scales each value to the same size. Where a value
    is exactly zero the result is zero, its minimum, and so is the gradient (the formula has none
    for that value, and NaN for all values if it is computed as it stands).

    Raises:
        ValueError: At call time, a value is negative.
    """

    def forward(self, values: Tensor, /) -> Tensor:
        if (values < 0.0).any():
            raise ValueError(
                "The geometric mean is defined for non-negative values. Found the value "
                f"{values.min().item():.6g}: use losses that are never negative."
            )
        zero = values == 0.0
        # Neither branch may see the logarithm of zero, or its gradient would be NaN.
        mean = values.masked_fill(zero, 1.0).log().mean().exp()
        return torch.where(zero.any(), 0.0 * mean.detach(), mean)
