"""STCH: a smooth maximum of the objectives."""

from __future__ import annotations

from torch import Tensor

from jddist._checked import Checked

from ._bases import Scalarizer
from ._checks import check_same_shape


class STCH(Scalarizer):
    """Takes a smooth weighted maximum of the values' distances from a reference point.

    It is mu * log(sum of exp(w_i (l_i - z_i) / mu)) for values l, weights w and a reference z, at
    most mu log(m) above the greatest w_i (l_i - z_i). "Smooth Tchebycheff Scalarization for
    Multi-Objective Optimization" (arXiv:2402.19078). The gradient is w times a softmax: with the
    default weights it adds up to 1/m, with weights of 1 to 1.

    Args:
        mu: Smoothing: the smaller, the closer to the maximum (> 0). The paper tries 0.01 to 1.
        weights: Preferences w of the shape of the values; None means 1/m each.
        reference: Ideal point z of the shape of the values; None means 0 each.

    Raises:
        ValueError: mu is not positive, or at call time the values have another shape than the
            weights or the reference.
    """

    mu = Checked[float](lambda value: value > 0, "positive")

    def __init__(
        self, mu: float, weights: Tensor | None = None, reference: Tensor | None = None
    ) -> None:
        super().__init__()
        self.mu = mu
        self.weights = weights
        self.reference = reference

    def forward(self, values: Tensor, /) -> Tensor:
        check_same_shape("weights", self.weights, values)
        check_same_shape("reference", self.reference, values)
        distances = values if self.reference is None else values - self.reference
        weights = 1.0 / values.numel() if self.weights is None else self.weights
        terms = (weights * distances).flatten()
        # Subtracted before the division by mu, which could overflow; it cancels in the gradient.
        peak = terms.detach().max()
        return self.mu * ((terms - peak) / self.mu).logsumexp(dim=0) + peak

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(mu={self.mu}, weights={self.weights!r}, "
            f"reference={self.reference!r})"
        )
