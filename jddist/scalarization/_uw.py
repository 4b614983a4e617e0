"""UW: a learned uncertainty for each objective."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from jddist._stateful import Stateful

from ._bases import Scalarizer
from ._checks import as_shape, check_same_shape


class UW(Scalarizer, Stateful):
    """Adds up the values, each with a learned uncertainty: sum of (exp(-s_i) l_i + s_i) / 2.

    Uncertainty weighting, "Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry
    and Semantics" (arXiv:1705.07115), where s_i = log(sigma_i^2). Every value has the paper's form
    for regression; its form for classification has no factor 1/2 before the loss, so hand over
    twice that loss to get it.

    The log-variances s are the parameter `log_var`, which is zero at first (so that the gradient is
    half the sum's). Give it to the optimizer together with the model's parameters. On several ranks
    its gradient is not averaged by itself: see `jddist.scalarization`.

    Args:
        shape: Shape of the values; n means (n,). It cannot be changed afterwards.

    Attributes:
        log_var: The parameter s, of that shape.

    Raises:
        ValueError: A size is negative, or at call time the values have another shape.
    """

    def __init__(self, shape: int | Sequence[int]) -> None:
        super().__init__()
        self.log_var = nn.Parameter(torch.zeros(as_shape(shape)))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the values."""
        return tuple(self.log_var.shape)

    def reset(self) -> None:
        """Sets all s to zero. The optimizer's memory of them is its own."""
        with torch.no_grad():
            self.log_var.zero_()

    def forward(self, values: Tensor, /) -> Tensor:
        check_same_shape("log_var", self.log_var, values)
        return (0.5 * (-self.log_var).exp() * values + 0.5 * self.log_var).sum()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={self.shape})"
