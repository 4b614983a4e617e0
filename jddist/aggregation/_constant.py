"""A combination of the rows with weights chosen in advance."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from jddist.linalg._format import vector_suffix
from jddist.linalg.matrix import Matrix

from ._bases import WeightedAggregator
from ._columns import UsesSettings
from ._weightings import RowCountWeighting


class ConstantWeighting(RowCountWeighting, UsesSettings):
    """Gives the same weights at every call.

    Args:
        weights: Weights of shape [m].

    Raises:
        ValueError: The weights are not a vector, or at call time the number of rows is not m.
    """

    settings: ClassVar[tuple[str, ...]] = ("weights",)

    def __init__(self, weights: Tensor) -> None:
        if weights.ndim != 1:
            raise ValueError(
                "`weights` must be a vector with one weight per objective. Found weights of shape "
                f"{tuple(weights.shape)}."
            )
        super().__init__()
        self.weights = weights

    def forward(self, matrix: Matrix, /) -> Tensor:
        if matrix.shape[0] != len(self.weights):
            raise ValueError(
                f"There are {len(self.weights)} constant weights, but {matrix.shape[0]} objectives "
                f"(rows of a tensor of shape {tuple(matrix.shape)}): give one weight per objective."
            )
        return self.weights.to(device=matrix.device, dtype=matrix.dtype)


class Constant(WeightedAggregator):
    """Combines the rows of the Jacobian with constant weights.

    Args:
        weights: Weights of shape [m].

    Raises:
        ValueError: The weights are not a vector, or at call time the number of rows is not m.
    """

    weighting: ConstantWeighting

    def __init__(self, weights: Tensor) -> None:
        super().__init__(ConstantWeighting(weights))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(weights={self.weighting.weights!r})"

    def __str__(self) -> str:
        return type(self).__name__ + vector_suffix(self.weighting.weights)
