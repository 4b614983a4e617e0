"""DualProj: the combination of the rows is projected onto the dual cone."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from jddist.linalg.dual_cone import DualConeProjector
from jddist.linalg.matrix import PSDMatrix

from ._projected import ProjectedAggregator, ProjectedWeighting


class DualProjWeighting(ProjectedWeighting):
    """Weights of `DualProj`, from the Gramian [m, m] to [m].

    Args:
        pref_vector: Preference vector of shape [m]; None means 1/m each.
        projector: Solves the projection; None means `AutomaticProjector()`.
    """

    pure: ClassVar[bool] = True

    def forward(self, gramian: PSDMatrix, /) -> Tensor:
        return self.projector(self.weighting(gramian), gramian)


class DualProj(ProjectedAggregator):
    """Combines the rows of the Jacobian and projects the result onto the dual cone of the rows.

    The result conflicts with no objective. Equation 11 of "Gradient Episodic Memory for Continual
    Learning" (arXiv:1706.08840).

    Args:
        pref_vector: Preference vector of shape [m] that combines the rows; None means 1/m each.
        projector: Solves the projection; None means `AutomaticProjector()`.

    Raises:
        ValueError: The preference vector is not a vector, or at call time its length is not m.
    """

    gramian_weighting: DualProjWeighting

    def __init__(
        self, pref_vector: Tensor | None = None, projector: DualConeProjector | None = None
    ) -> None:
        super().__init__(DualProjWeighting(pref_vector, projector))
