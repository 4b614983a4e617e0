"""IMTL-L: a learned scale for each objective."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from jddist._stateful import Stateful

from ._bases import Scalarizer
from ._checks import as_shape, check_same_shape


class IMTLL(Scalarizer, Stateful):
    """Adds up the values, each with a learned scale: sum of exp(s_i) l_i - s_i.

    The loss-balancing part of "Towards Impartial Multi-task Learning" (ICLR 2021); for positive
    values. At the optimal scale each scaled value exp(s_i) l_i is 1. It is twice `UW` at -s.

    The scales s are the parameter `log_scale`, which is zero at first (so that the gradient is the
    sum's). Give it to the optimizer together with the model's parameters. On several ranks its
    gradient is not averaged by itself: see `jddist.scalarization`.

    Args:
        shape: Shape of the values; n means (n,). It cannot be changed afterwards.

    Attributes:
        log_scale: The parameter s, of that shape.

    Raises:
        ValueError: A size is negative, or at call time the values have another shape.
    """

    def __init__(self, shape: int | Sequence[int]) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(as_shape(shape)))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the values."""
        return tuple(self.log_scale.shape)

    def reset(self) -> None:
        """Sets all s to zero. The optimizer's memory of them is its own."""
        with torch.no_grad():
            self.log_scale.zero_()

    def forward(self, values: Tensor, /) -> Tensor:
        check_same_shape("log_scale", self.log_scale, values)
        return (self.log_scale.exp() * values - self.log_scale).sum()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={self.shape})"
