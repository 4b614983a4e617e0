"""Preference vectors: how methods let the user say how much each objective matters."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from ._constant import ConstantWeighting
from ._mean import MeanWeighting
from ._weightings import RowCountWeighting


class HasPreference(nn.Module):
    """Mixin with a settable `pref_vector`, and the `weighting` that turns it into weights [m].

    Without a preference vector the weights are those of `default_preference`.
    """

    default_preference: ClassVar[type[RowCountWeighting]] = MeanWeighting
    weighting: RowCountWeighting

    @property
    def pref_vector(self) -> Tensor | None:
        """Preference vector of shape [m], or None."""
        return self._pref_vector

    @pref_vector.setter
    def pref_vector(self, value: Tensor | None) -> None:
        if value is not None and value.ndim != 1:
            raise ValueError(
                "`pref_vector` must be a vector with one entry per objective. Found a tensor of "
                f"shape {tuple(value.shape)}."
            )
        self.weighting = self.default_preference() if value is None else ConstantWeighting(value)
        self._pref_vector = value
