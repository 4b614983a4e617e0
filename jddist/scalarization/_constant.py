"""A combination of the objectives with weights chosen in advance."""

from __future__ import annotations

from torch import Tensor

from jddist.linalg._format import vector_suffix

from ._bases import Scalarizer


class Constant(Scalarizer):
    """Combines the values with constant weights.

    Args:
        weights: Weights of the shape of the values.

    Raises:
        ValueError: At call time, the values have another shape than the weights.
    """

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, values: Tensor, /) -> Tensor:
        if values.shape != self.weights.shape:
            raise ValueError(
                f"The values must have the shape {tuple(self.weights.shape)} of the weights. Found "
                f"values of shape {tuple(values.shape)}: give one weight per value."
            )
        return (self.weights * values).sum()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(weights={self.weights!r})"

    def __str__(self) -> str:
        if self.weights.ndim == 1:
            return type(self).__name__ + vector_suffix(self.weights)
        return f"{type(self).__name__}(weights of shape {tuple(self.weights.shape)})"
