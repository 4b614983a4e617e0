"""PBI: the length along a preferred direction, and a penalty on the distance from it."""

from __future__ import annotations

from torch import Tensor

from jddist._checked import Checked

from ._bases import Scalarizer
from ._checks import check_same_shape

_EPSILON = 1e-12  # Under the root, whose gradient is undefined on the direction itself.


class PBI(Scalarizer):
    """Adds a penalty on the distance from a direction to the length along it.

    For values l, a reference z and the direction u = w / |w|, the length is d1 = (l - z).u, the
    distance d2 = |l - z - d1 u|, and the scalar d1 + theta * d2. Penalty-based boundary
    intersection, "MOEA/D: A Multiobjective Evolutionary Algorithm Based on Decomposition" (IEEE
    Transactions on Evolutionary Computation, 2007). d2 is the root of its square plus 1e-12, so it
    is 1e-6 too large on the direction itself, where its gradient is then zero.

    Args:
        theta: Penalty (>= 0). The paper has 5, and says that no value suits all problems.
        weights: Direction w of the shape of the values, non-negative and not zero.
        reference: Ideal point z of the shape of the values, below all of them; None means 0 each.

    Raises:
        ValueError: theta is negative, the weights are all zero, or at call time the values have
            another shape than the weights or the reference.
    """

    theta = Checked[float](lambda value: value >= 0.0, "non-negative")

    def __init__(self, theta: float, weights: Tensor, reference: Tensor | None = None) -> None:
        super().__init__()
        self.theta = theta
        self.weights = weights
        self.reference = reference

    @property
    def weights(self) -> Tensor:
        """The direction, of any length."""
        return self._weights

    @weights.setter
    def weights(self, value: Tensor) -> None:
        if not value.any():
            raise ValueError(
                "weights must be a direction. Found weights that are all zero: give at least one "
                "positive entry."
            )
        self._weights = value

    def forward(self, values: Tensor, /) -> Tensor:
        check_same_shape("weights", self.weights, values)
        check_same_shape("reference", self.reference, values)
        distances = (values if self.reference is None else values - self.reference).flatten()
        direction = self.weights.flatten() / self.weights.norm()
        length = distances @ direction
        across = distances - length * direction
        return length + self.theta * (across @ across + _EPSILON).sqrt()

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(theta={self.theta}, weights={self.weights!r}, "
            f"reference={self.reference!r})"
        )
