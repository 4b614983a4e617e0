"""ConFIG: the direction that makes the same angle with every row."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from torch import Tensor

from jddist.linalg._format import vector_suffix
from jddist.linalg.matrix import PSDMatrix

from ._bases import Forwarded, GramianWeightedAggregator
from ._cosines import invert, split_lengths
from ._host import from_double, relative_rounding, to_host_in_double
from ._preference import HasPreference
from ._sum import SumWeighting
from ._weightings import GramianWeighting, RowCountWeighting


class ConFIGWeighting(HasPreference, GramianWeighting):
    """Weights of `ConFIG`, from the Gramian [m, m] to [m].

    Args:
        pref_vector: Preference vector of shape [m]; None means 1 each.
    """

    pure: ClassVar[bool] = True

    # Autograd through a pseudo-inverse of changing rank would be wrong.
    differentiable: ClassVar[bool] = False
    default_preference: ClassVar[type[RowCountWeighting]] = SumWeighting

    def __init__(self, pref_vector: Tensor | None = None) -> None:
        super().__init__()
        self.pref_vector = pref_vector

    def forward(self, gramian: PSDMatrix, /) -> Tensor:
        preference = to_host_in_double(self.weighting(gramian))
        lengths, cosines = split_lengths(to_host_in_double(gramian))
        rounding = relative_rounding(gramian)
        # The direction Uᵀ(UUᵀ)⁺ p of the unit rows U has the coefficients x in terms of U.
        values, vectors = np.linalg.eigh(cosines)
        kept = int((values > rounding * values.max(initial=0.0)).sum())
        values, vectors = values[len(values) - kept :], vectors[:, len(values) - kept :]
        components = preference @ vectors
        if components @ components <= rounding**2 * (preference @ preference):
            return gramian.new_zeros(gramian.shape[0])  # No direction: rounding is all there is.
        coefficients = vectors @ (components / values)
        products = vectors @ components  # Of the direction with the unit rows.
        squared_norm = components @ (components / values)
        # The direction's length becomes the sum of the rows' projections on it.
        weights = coefficients * (lengths @ products / squared_norm)
        return from_double(weights * invert(lengths), gramian)


class ConFIG(GramianWeightedAggregator):
    """Points where all rows of the Jacobian are at the same angle, or at preferred cosines.

    "ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks"
    (arXiv:2408.11104), Equation 2: with U the rows of unit length and p the preference, the
    direction is U⁺p, and the result is the sum of the rows' projections on it. Since
    U⁺ = Uᵀ(UUᵀ)⁺, the Gramian suffices: UUᵀ holds the rows' cosines.

    Eigenvalues of UUᵀ up to m eps times the greatest do not enter its pseudo-inverse. torchjd takes
    U apart itself and keeps singular values down to max(m, n) eps of the greatest: unlike this one
    it tells rows apart whose directions differ by less than about (m eps)^(1/2). Where the
    preference is orthogonal to all that U can reach, there is no direction and the weights are 0.

    Args:
        pref_vector: Preference vector of shape [m]; None means 1 each.

    Raises:
        ValueError: The preference vector is not a vector, or at call time its length is not m.
    """

    gramian_weighting: ConFIGWeighting
    pref_vector = Forwarded[Tensor | None, Tensor | None]()

    def __init__(self, pref_vector: Tensor | None = None) -> None:
        super().__init__(ConFIGWeighting(pref_vector))

    def __str__(self) -> str:
        return type(self).__name__ + vector_suffix(self.pref_vector)
