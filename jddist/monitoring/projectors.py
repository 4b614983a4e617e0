"""Counts what the projectors of UPGrad and DualProj count, from one call to the next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

_COUNTED = ("below_norm_eps", "fallbacks")


class ProjectorCounts:
    """The counts of projectors, before and after weightings run."""

    def __init__(self) -> None:
        self._projectors: list[Any] = []
        self._before: list[int] = []

    def before(self, weightings: Sequence[object]) -> None:
        """Weightings are about to run."""
        self._projectors = list(_projectors_of(weightings))
        self._before = self._counts()

    def after(self) -> dict[str, int]:
        """They have run: how much each count grew, over all their projectors."""
        grown = [new - old for new, old in zip(self._counts(), self._before, strict=True)]
        self._projectors = []
        return {name: sum(grown[i :: len(_COUNTED)]) for i, name in enumerate(_COUNTED)}

    def _counts(self) -> list[int]:
        return [int(getattr(p, name, 0)) for p in self._projectors for name in _COUNTED]


def _projectors_of(weightings: Sequence[object]) -> Iterator[object]:
    seen: set[int] = set()
    for weighting in weightings:
        for module in weighting.modules() if isinstance(weighting, nn.Module) else ():
            projector = getattr(module, "projector", None)
            if projector is not None and id(projector) not in seen:
                seen.add(id(projector))
                yield projector
