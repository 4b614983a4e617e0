"""Base class of scalarizers, which reduce a tensor of objectives to one scalar to minimize."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn


class Scalarizer(nn.Module, ABC):
    """Maps values of the objectives, a tensor of any shape, to one scalar.

    A subclass implements `forward`. Calling the scalarizer also runs its hooks.
    """

    @abstractmethod
    def forward(self, values: Tensor, /) -> Tensor:
        """Computes the scalar."""

    def __call__(self, values: Tensor, /) -> Tensor:
        """Computes the scalar and runs all hooks.

        Args:
            values: Values of the objectives, of any shape.

        Returns:
            Tensor of shape [].
        """
        return super().__call__(values)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def __str__(self) -> str:
        return type(self).__name__
