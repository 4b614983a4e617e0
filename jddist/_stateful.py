"""The mark of objects that remember earlier steps, and how to make them forget."""

from __future__ import annotations

from abc import ABC, abstractmethod


class Stateful(ABC):
    """Mixin of aggregators, weightings and scalarizers whose result depends on earlier calls.

    One instance must not serve two streams of Jacobians: give every group of parameters its own.
    """

    @abstractmethod
    def reset(self) -> None:
        """Forgets all earlier calls, so that the next one is like the first."""
