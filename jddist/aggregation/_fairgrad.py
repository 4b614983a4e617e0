"""FairGrad: every objective's gain, to the power alpha, is the inverse of its weight."""

from __future__ import annotations

from math import isfinite
from typing import ClassVar

from torch import Tensor

from jddist._checked import Checked
from jddist.linalg.matrix import PSDMatrix

from ._bases import Forwarded, GramianWeightedAggregator
from ._fair import balance
from ._host import from_double, relative_rounding, to_host_in_double
from ._weightings import GramianWeighting


class FairGradWeighting(GramianWeighting):
    """Weights of `FairGrad`, from the Gramian [m, m] to [m].

    Args:
        alpha: What kind of fairness (>= 0 and finite).
        max_iters: Greatest number of Newton steps; None means as many as it takes.

    Raises:
        ValueError: A parameter is out of its range.
    """

    pure: ClassVar[bool] = True

    differentiable: ClassVar[bool] = False  # The solver runs on numpy arrays.

    alpha = Checked[float](
        lambda value: value >= 0.0 and isfinite(value), "non-negative and finite"
    )

    def __init__(self, alpha: float, max_iters: int | None = None) -> None:
        super().__init__()
        self.alpha = alpha
        self.max_iters = max_iters

    @property
    def max_iters(self) -> int | None:
        """Greatest number of Newton steps, or None."""
        return self._max_iters

    @max_iters.setter
    def max_iters(self, value: int | None) -> None:
        if value is not None and value <= 0:
            raise ValueError(f"max_iters must be None or positive. Found max_iters={value!r}.")
        self._max_iters = value

    def forward(self, gramian: PSDMatrix, /) -> Tensor:
        m = gramian.shape[0]
        if self.alpha == 0.0:
            return gramian.new_full([m], 1.0 / max(m, 1))
        matrix = to_host_in_double(gramian)
        power = 1.0 / max(self.alpha, 1e-300)
        weights = balance(matrix, power, relative_rounding(gramian), self.max_iters)
        return from_double(weights, gramian)


class FairGrad(GramianWeightedAggregator):
    """Combines the rows of the Jacobian so that the gains of all objectives are alpha-fair.

    "Fair Resource Allocation in Multi-Task Learning" (arXiv:2402.15638), Algorithm 1: the weights
    x > 0 satisfy (G x)^alpha = 1 / x. For alpha = 0 they are those of the mean; for alpha = 1 the
    result is that of Nash bargaining; the greater alpha, the more the least gain counts. A row of
    zeros takes no part and has the weight 0.

    The equation is solved to rounding error. torchjd's bounded least squares stops earlier, the
    more so where the rows differ in length, and starts from weights 1/m whatever the scale of G.
    At a Pareto stationary point no x solves it; the weights are then those of a problem within
    rounding error of the given one, and their combination of the rows is almost 0. For alpha near
    0.1 and rows whose lengths differ by orders of magnitude, gains would have to be smaller than
    their rounding error; the weights are then finite, but not a solution.

    Args:
        alpha: What kind of fairness (>= 0 and finite).
        max_iters: Greatest number of Newton steps for each of the problems on the way to this
            alpha; None means as many as it takes. (The steps are not those of torchjd: results cut
            short differ.)

    Raises:
        ValueError: A parameter is out of its range.
    """

    gramian_weighting: FairGradWeighting
    alpha = Forwarded[float, float]()
    max_iters = Forwarded[int | None, int | None]()

    def __init__(self, alpha: float, max_iters: int | None = None) -> None:
        super().__init__(FairGradWeighting(alpha, max_iters))

    def __str__(self) -> str:
        return f"{self.alpha}-{type(self).__name__}"
