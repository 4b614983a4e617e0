"""GradNorm: weights that let all objectives train at similar rates."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from jddist._checked import Checked
from jddist._stateful import Stateful
from jddist.linalg.matrix import PSDMatrix

from ._bases import Forwarded, GramianWeightedAggregator
from ._losses import NeedsLosses
from ._memory import Remembers
from ._weightings import GramianWeighting

# Weights are kept above this before they are scaled to sum m.
SMALLEST = 1e-3


class GradNormWeighting(GramianWeighting, Remembers, NeedsLosses):
    """Weights of `GradNorm`, from the Gramian [m, m] to [m].

    Call `set_losses(losses)` before each call. It remembers the weights and the first losses. They
    start afresh after `reset` and when m or the dtype changes.

    Args:
        alpha: Strength of the pull towards a common training rate (>= 0).
        lr: Step size of the weights (> 0).

    Raises:
        ValueError: A parameter is out of its range, or the losses of a call were not stated.
    """

    differentiable: ClassVar[bool] = False  # The calls before are not part of the graph.

    alpha = Checked[float](lambda value: value >= 0.0, "non-negative")
    lr = Checked[float](lambda value: value > 0.0, "positive")

    def __init__(self, alpha: float = 1.5, lr: float = 0.025) -> None:
        super().__init__()
        self.alpha = alpha
        self.lr = lr
        self.reset()

    def set_extra_state(self, state: dict[str, Tensor]) -> None:
        """Takes over what another instance remembers; losses of a call to come are dropped."""
        super().set_extra_state(state)
        self._losses = None

    def forward(self, gramian: PSDMatrix, /) -> Tensor:
        m = gramian.shape[0]
        losses = self._take_losses(gramian)
        weights = self._recall("weights", gramian, m)
        first = self._recall("first losses", gramian, m)
        if weights is None or first is None:
            weights, first = gramian.new_ones(m), losses
        lengths = gramian.diagonal().clamp(min=0.0).sqrt()
        weighted = weights * lengths
        slopes = lengths * torch.sign(weighted - weighted.mean() * self._pulls(losses, first))
        stepped = (weights - self.lr * slopes).clamp(min=SMALLEST)
        self._memory = {"weights": stepped * (m / stepped.sum()), "first losses": first}
        return weights

    def _pulls(self, losses: Tensor, first: Tensor) -> Tensor:
        """r ** alpha, with r the relative inverse training rates; 1 where all losses are 0."""
        limits = torch.finfo(first.dtype)
        ratios = losses / first.clamp(min=limits.tiny)
        ratios = ratios.clamp(max=limits.max / max(len(first), 1))  # A first loss may have been 0.
        mean = ratios.mean()
        return torch.where(mean > 0.0, ratios / mean, 1.0) ** self.alpha

    def __repr__(self) -> str:
        return f"GradNormWeighting(alpha={self.alpha!r}, lr={self.lr!r})"


class GradNorm(GramianWeightedAggregator, Stateful):
    """Learns weights that bring the lengths of the weighted gradients to common training rates.

    Algorithm 1 of "GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep Multitask
    Networks" (arXiv:1711.02257). With w the weights, 1 at first, G_i = w_i |J_i|, and L_i the loss
    over its first value, r_i = L_i / mean(L), each call returns w^T J and then takes a gradient
    step on sum_i |G_i - mean(G) r_i^alpha|, the targets being constants:

        w_i <- w_i - lr |J_i| sign(G_i - mean(G) r_i^alpha),  then w <- m w / sum(w)

    Call `set_losses(losses)` before each call. The step is not free of scale: choose lr for the
    lengths of your gradients. The paper leaves open what happens to weights that a step makes
    negative; here they stay at 1e-3 or more before they are scaled.

    Args:
        alpha: Strength of the pull towards a common training rate (>= 0).
        lr: Step size of the weights (> 0).

    Raises:
        ValueError: A parameter is out of its range, or the losses of a call were not stated.
    """

    gramian_weighting: GradNormWeighting
    alpha = Forwarded[float, float]()
    lr = Forwarded[float, float]()

    def __init__(self, alpha: float = 1.5, lr: float = 0.025) -> None:
        super().__init__(GradNormWeighting(alpha, lr))

    def set_losses(self, losses: Tensor) -> None:
        """States the losses [m] whose Jacobian the next call gets."""
        self.gramian_weighting.set_losses(losses)

    def reset(self) -> None:
        """Forgets the weights and the first losses."""
        self.gramian_weighting.reset()
