"""UPGrad: every row is projected onto the dual cone before the rows are combined."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from jddist.linalg._dealing import Dealable
from jddist.linalg.dual_cone import DualConeProjector
from jddist.linalg.matrix import PSDMatrix

from ._projected import ProjectedAggregator, ProjectedWeighting


class UPGradWeighting(ProjectedWeighting, Dealable):
    """Weights of `UPGrad`, from the Gramian [m, m] to [m].

    Args:
        pref_vector: Preference vector of shape [m]; None means 1/m each.
        projector: Solves the m projections; None means `AutomaticProjector()`.
    """

    pure: ClassVar[bool] = True

    def forward(self, gramian: PSDMatrix, /) -> Tensor:
        return self.projector(torch.diag(self.weighting(gramian)), gramian).sum(dim=0)

    def deals(self, num_objectives: int) -> bool:
        """Whether on several ranks each of them solves its share of the m projections."""
        projector = self.projector
        return isinstance(projector, DualConeProjector) and projector.deals(
            num_objectives, num_objectives
        )


class UPGrad(ProjectedAggregator):
    """Projects each row of the Jacobian onto the dual cone of all rows and combines the results.

    The result conflicts with no objective. "Jacobian Descent For Multi-Objective Optimization"
    (arXiv:2406.16232).

    Args:
        pref_vector: Preference vector of shape [m] that combines the projected rows; None means
            1/m each.
        projector: Solves the m projections; None means `AutomaticProjector()`.

    Raises:
        ValueError: The preference vector is not a vector, or at call time its length is not m.
    """

    gramian_weighting: UPGradWeighting

    def __init__(
        self, pref_vector: Tensor | None = None, projector: DualConeProjector | None = None
    ) -> None:
        super().__init__(UPGradWeighting(pref_vector, projector))
