"""COSMOS: a weighted sum that is pulled towards the direction of the weights."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cosine_similarity

from jddist._checked import Checked

from ._bases import Scalarizer
from ._checks import check_same_shape


class COSMOS(Scalarizer):
    """Adds up the weighted values and rewards their similarity to the weights.

    It is w.l - lambda * cos(w, l) for values l and weights w. "Scalable Pareto Front Approximation
    for Deep Multi-Objective Learning" (arXiv:2103.13392). There, weights are drawn from a Dirichlet
    distribution before every call, and the model is told them; here, assign `weights` before the
    call (the same on all ranks) and give them to the model yourself.

    Args:
        lambda_: Reward of similarity (>= 0); 0 leaves the weighted sum. The paper has 0.01 to 8.
        weights: Preferences w of the shape of the values.

    Raises:
        ValueError: lambda_ is negative, or at call time the values have another shape than the
            weights.
    """

    lambda_ = Checked[float](lambda value: value >= 0.0, "non-negative")

    def __init__(self, lambda_: float, weights: Tensor) -> None:
        super().__init__()
        self.lambda_ = lambda_
        self.weights = weights

    def forward(self, values: Tensor, /) -> Tensor:
        check_same_shape("weights", self.weights, values)
        similarity = cosine_similarity(self.weights.flatten(), values.flatten(), dim=0)
        return (self.weights * values).sum() - self.lambda_ * similarity

    def __repr__(self) -> str:
        return f"{type(self).__name__}(lambda_={self.lambda_}, weights={self.weights!r})"
