"""IMTLG: the result makes the same progress along every row."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from torch import Tensor

from jddist.linalg.matrix import PSDMatrix

from ._bases import GramianWeightedAggregator
from ._host import Array, from_double, relative_rounding, to_host_in_double
from ._weightings import GramianWeighting


class IMTLGWeighting(GramianWeighting):
    """Weights of `IMTLG`, from the Gramian [m, m] to [m]; their sum is 1, or they are all 0."""

    pure: ClassVar[bool] = True

    # Autograd through a pseudo-inverse of changing rank would be wrong.
    differentiable: ClassVar[bool] = False

    def forward(self, gramian: PSDMatrix, /) -> Tensor:
        matrix = to_host_in_double(gramian)
        largest = matrix.diagonal().max(initial=0.0)
        if largest <= 0.0:
            return gramian.new_zeros(gramian.shape[0])
        rounding = relative_rounding(gramian)
        solution = _solve(matrix / largest, rounding)
        total = solution.sum()
        if np.abs(total) <= rounding * np.abs(solution).sum():
            return gramian.new_zeros(gramian.shape[0])
        return from_double(solution / total, gramian)


def _solve(gramian: Array, rounding: float) -> Array:
    """The G⁺d, where d holds the lengths of the rows."""
    lengths = np.sqrt(np.maximum(gramian.diagonal(), 0.0))
    values, vectors = np.linalg.eigh(gramian)
    magnitudes = np.abs(values)
    kept = magnitudes > rounding * magnitudes.max()
    if kept.all():
        # G = D C D with d = D 1: far more precise than the eigenvalues if the rows' lengths differ.
        try:
            cosines = gramian / lengths[:, None] / lengths
            return np.linalg.solve(cosines, np.ones_like(lengths)) / lengths
        except np.linalg.LinAlgError:
            pass
    values, vectors = values[kept], vectors[:, kept]
    return vectors @ ((lengths @ vectors) / values)


class IMTLG(GramianWeightedAggregator):
    """Combines the rows of the Jacobian so that the projection on every row has the same length.

    "Towards Impartial Multi-task Learning" (ICLR 2021), in the general form of "Jacobian Descent
    For Multi-Objective Optimization" (arXiv:2406.16232), which admits dependent rows: with d the
    lengths of the rows, the weights are G⁺d divided by their sum. Eigenvalues up to m eps times the
    greatest do not enter the pseudo-inverse G⁺. The weights are 0 where that sum is 0 up to
    rounding. (torchjd compares it with 1e-12, whatever the scale of G, so that rows longer than
    1e12 get the weight 0.)
    """

    gramian_weighting: IMTLGWeighting

    def __init__(self) -> None:
        super().__init__(IMTLGWeighting())
