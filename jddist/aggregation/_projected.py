"""What UPGrad and DualProj share: a preference vector and a projector onto the dual cone."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from jddist.linalg._format import vector_suffix
from jddist.linalg.batched_projector import AutomaticProjector
from jddist.linalg.dual_cone import DualConeProjector

from ._bases import Forwarded, GramianWeightedAggregator
from ._preference import HasPreference
from ._weightings import GramianWeighting


class ProjectedWeighting(HasPreference, GramianWeighting):
    """Base class of the weightings that project onto the dual cone of the rows.

    Args:
        pref_vector: Preference vector of shape [m]; None means 1/m each.
        projector: Solves the projections; None means `AutomaticProjector()`.
    """

    differentiable: ClassVar[bool] = False  # The solver leaves autograd.

    def __init__(
        self, pref_vector: Tensor | None = None, projector: DualConeProjector | None = None
    ) -> None:
        super().__init__()
        self.pref_vector = pref_vector
        self.projector = projector

    @property
    def projector(self) -> DualConeProjector:
        """What solves the projections."""
        return self._projector

    @projector.setter
    def projector(self, value: DualConeProjector | None) -> None:
        self._projector = AutomaticProjector() if value is None else value


class ProjectedAggregator(GramianWeightedAggregator):
    """Base class of the aggregators whose weighting is a `ProjectedWeighting`."""

    pref_vector = Forwarded[Tensor | None, Tensor | None]()
    projector = Forwarded[DualConeProjector, DualConeProjector | None]()

    def __str__(self) -> str:
        return type(self).__name__ + vector_suffix(self.pref_vector)
