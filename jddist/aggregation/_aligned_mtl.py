"""AlignedMTL: the principal components of the Jacobian are brought to one length."""

from __future__ import annotations

from typing import ClassVar, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from jddist.linalg._format import vector_suffix
from jddist.linalg.matrix import PSDMatrix

from ._bases import Forwarded, GramianWeightedAggregator
from ._host import relative_rounding
from ._preference import HasPreference
from ._weightings import GramianWeighting

ScaleMode: TypeAlias = Literal["min", "median", "rmse"]


class AlignedMTLWeighting(HasPreference, GramianWeighting):
    """Weights of `AlignedMTL`, from the Gramian [m, m] to [m].

    Args:
        pref_vector: Preference vector of shape [m]; None means 1/m each.
        scale_mode: Which squared length the components get: the smallest one ("min"), the lower
            median ("median") or the mean ("rmse").

    Raises:
        ValueError: The preference vector is not a vector, or at call time its length is not m; or
            the mode is none of the three.
    """

    pure: ClassVar[bool] = True

    def __init__(self, pref_vector: Tensor | None = None, scale_mode: ScaleMode = "min") -> None:
        super().__init__()
        self.pref_vector = pref_vector
        self.scale_mode = scale_mode

    @property
    def scale_mode(self) -> ScaleMode:
        """Which squared length the components get."""
        return self._scale_mode

    @scale_mode.setter
    def scale_mode(self, value: ScaleMode) -> None:
        if value not in get_args(ScaleMode):
            raise ValueError(f"Invalid scale_mode={value!r}. Expected 'min', 'median', or 'rmse'.")
        self._scale_mode: ScaleMode = value

    def forward(self, gramian: PSDMatrix, /) -> Tensor:
        preference = self.weighting(gramian)
        if gramian.shape[0] == 0:
            return preference
        values, vectors = torch.linalg.eigh(_scale(gramian), UPLO="U")
        rank = int((values > relative_rounding(gramian) * values[-1]).sum())
        if rank == 0:
            return preference
        values, vectors = values[-rank:], vectors[:, -rank:]
        if self.scale_mode == "min":
            scale = values[0]
        elif self.scale_mode == "median":
            scale = values.median()
        else:
            scale = values.mean()
        components = preference.to(vectors) @ vectors
        return (vectors @ ((scale / values).sqrt() * components)).to(gramian)


def _scale(gramian: Tensor) -> Tensor:
    """The Gramian times a power of 2, which changes no weight, so that no number overflows."""
    matrix = gramian if gramian.dtype == torch.float64 else gramian.float()
    _, exponent = torch.frexp(matrix.detach().diagonal().max())
    return matrix * torch.ldexp(matrix.new_ones([]), -exponent.clamp(-100, 100))


class AlignedMTL(GramianWeightedAggregator):
    """Combines rows that were transformed so that the principal components are equally long.

    "Independent Component Alignment for Multi-Task Learning" (arXiv:2305.19000), Algorithm 1: with
    the eigenvalues v and eigenvectors V of the Gramian, the weights are V (s / v)^(1/2) Vᵀ times
    the preference vector, where s is the scale. Eigenvalues that rounding may have made are left
    out: those up to m eps times the greatest. Without any left, the weights are the preference.

    Args:
        pref_vector: Preference vector of shape [m] that combines the transformed rows; None means
            1/m each.
        scale_mode: The scale s: the smallest eigenvalue ("min"), the lower median ("median") or
            the mean ("rmse", the official code's).

    Raises:
        ValueError: The preference vector is not a vector, or at call time its length is not m; or
            the mode is none of the three.
    """

    gramian_weighting: AlignedMTLWeighting
    pref_vector = Forwarded[Tensor | None, Tensor | None]()
    scale_mode = Forwarded[ScaleMode, ScaleMode]()

    def __init__(self, pref_vector: Tensor | None = None, scale_mode: ScaleMode = "min") -> None:
        super().__init__(AlignedMTLWeighting(pref_vector, scale_mode))

    def __str__(self) -> str:
        return type(self).__name__ + vector_suffix(self.pref_vector)
