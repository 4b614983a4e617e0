"""CR-MOGM: any weighting, smoothed over the calls."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from jddist._checked import Checked
from jddist._stateful import Stateful

from ._columns import UsesSettings
from ._memory import Remembers
from ._weightings import Weighting, _Stat_contra


class CRMOGMWeighting(Weighting[_Stat_contra], UsesSettings, Remembers):
    """A moving average of the weights that another weighting gives.

    "On the Convergence of Stochastic Multi-Objective Gradient Manipulation and Beyond" (NeurIPS
    2022): the weights are w <- alpha w + (1 - alpha) w', with w' those of the wrapped weighting. It
    takes what that one takes: use it in a `GramianWeightedAggregator` around a Gramian weighting,
    in a `WeightedAggregator` around any other. It remembers w; `reset` also resets the wrapped
    weighting. Autograd sees w' alone, not the calls before.

    Args:
        weighting: The weighting to smooth.
        alpha: Share of the weights of the call before (between 0 and 1). The paper lets it grow
            towards 1 as the learning rate falls: set it between calls.
        initial_weights: w before the first call, of shape [m]; None means the first w'.

    Raises:
        ValueError: `alpha` is out of its range, or at call time the number of objectives is not
            that of `initial_weights` or of the call before.
    """

    settings: ClassVar[tuple[str, ...]] = ("alpha", "initial_weights")

    alpha = Checked[float](lambda value: 0.0 <= value <= 1.0, "between 0 and 1")

    def __init__(
        self,
        weighting: Weighting[_Stat_contra],
        alpha: float = 0.9,
        initial_weights: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.weighting = weighting
        self.alpha = alpha
        self.initial_weights = initial_weights
        self._memory = {}

    @property
    def acts_on_columns(self) -> bool:
        """Whether the wrapped weighting does."""
        return self.weighting.acts_on_columns

    def reset(self) -> None:
        """Forgets the weights, and lets the wrapped weighting forget."""
        super().reset()
        if isinstance(self.weighting, Stateful):
            self.weighting.reset()

    def forward(self, stat: _Stat_contra, /) -> Tensor:
        new = self.weighting(stat)
        before = self._memory.get("weights", self.initial_weights)
        if before is None:
            before = new
        elif before.shape != new.shape:
            raise ValueError(
                f"Found {len(new)} objectives, but the weights to be smoothed are of shape "
                f"{tuple(before.shape)}: call reset() (or give other initial_weights) when the "
                "number of objectives changes."
            )
        weights = self.alpha * before.detach().to(new) + (1.0 - self.alpha) * new
        self._memory["weights"] = weights.detach()
        return weights

    def __repr__(self) -> str:
        return (
            f"CRMOGMWeighting({self.weighting!r}, alpha={self.alpha!r}, "
            f"initial_weights={self.initial_weights!r})"
        )
