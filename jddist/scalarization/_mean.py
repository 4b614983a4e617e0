"""The mean of the objectives."""

from __future__ import annotations

from torch import Tensor

from ._bases import Scalarizer


class Mean(Scalarizer):
    """Averages the values."""

    def forward(self, values: Tensor, /) -> Tensor:
        return values.mean()
