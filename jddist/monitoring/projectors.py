"""Counts what the projectors of UPGrad and DualProj count, from one call to the next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

_COUNTED = ("below_norm_eps", "fallbacks")


class ProjectorCounts:
    """The counts of projectors, before and after weightings run."""

    def __init__(self) -> None:
        self._weightings: Sequence[object] = ()
        self._holders: list[Any] = []  # the modules that have projectors
        self._projectors: list[Any] = []
        self._before: list[int] = []

    def before(self, weightings: Sequence[object]) -> None:
        """Weightings are about to run."""
        if not _are_same(weightings, self._weightings):
            self._weightings, self._holders = weightings, list(_holders_of(weightings))
        self._projectors = list({id(h.projector): h.projector for h in self._holders}.values())
        self._before = self._counts()

    def after(self) -> dict[str, int]:
        """They have run: how much each count grew, over all their projectors."""
        counts = self._counts()
        if counts == self._before:  # nearly always
            return {}
        grown = [new - old for new, old in zip(counts, self._before, strict=True)]
        return {name: sum(grown[i :: len(_COUNTED)]) for i, name in enumerate(_COUNTED)}

    def _counts(self) -> list[int]:
        return [int(getattr(p, name, 0)) for p in self._projectors for name in _COUNTED]


def _are_same(these: Sequence[object], those: Sequence[object]) -> bool:
    return len(these) == len(those) and all(a is b for a, b in zip(these, those, strict=True))


def _holders_of(weightings: Sequence[object]) -> Iterator[object]:
    for weighting in weightings:
        for module in weighting.modules() if isinstance(weighting, nn.Module) else ():
            if hasattr(module, "projector"):
                yield module
