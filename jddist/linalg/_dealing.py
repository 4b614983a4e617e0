"""The seam through which many problems that share one matrix are dealt out.

A solver of many problems asks for the current `Dealer`: if there is one, it solves its own share
and gathers the others'. It never asks who the others are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor


class Dealer(ABC):
    """One of several that solve the same problems together.

    Attributes:
        share: Which share is one's own.
        num_shares: The number of shares.
    """

    share: int
    num_shares: int

    @abstractmethod
    def gather(self, mine: Tensor, counts: list[int], problems: bytes) -> list[Tensor]:
        """All shares' solutions.

        Args:
            mine: One's own solutions [k_r, m].
            counts: k_r of every share.
            problems: What has to be the same for all shares.
        """

    def rows_of(self, share: int, k: int) -> slice:
        """Which of k problems belong to a share: every num_shares-th, for neighbours are alike."""
        return slice(share, k, self.num_shares)

    def collect(self, mine: Tensor, k: int, problems: bytes) -> Tensor:
        """The solutions [k, m] of all shares, in order; ``problems`` as for ``gather``."""
        rows = [self.rows_of(share, k) for share in range(self.num_shares)]
        parts = self.gather(mine, [len(range(k)[r]) for r in rows], problems)
        solutions = mine.new_empty(k, mine.shape[1])
        for r, part in zip(rows, parts, strict=True):
            solutions[r] = part
        return solutions


class Dealable(ABC):
    """Something that may deal out its work if it is run by all shares alike."""

    @abstractmethod
    def deals(self, num_objectives: int) -> bool:
        """Whether it does, at this number of objectives."""


_current: ContextVar[Dealer | None] = ContextVar("jddist_dealer", default=None)


def current_dealer() -> Dealer | None:
    """Who deals out the work of solvers called from here; None if one solves everything alone."""
    return _current.get()


@contextmanager
def dealing(dealer: Dealer) -> Iterator[None]:
    """Within this context, solvers may deal out their work with `dealer`."""
    token = _current.set(dealer)
    try:
        yield
    finally:
        _current.reset(token)


def is_dealt(weighting: object, num_objectives: int) -> bool:
    """Whether a weighting, or one that it wraps, deals out its work."""
    modules = weighting.modules() if isinstance(weighting, torch.nn.Module) else ()
    return any(isinstance(m, Dealable) and m.deals(num_objectives) for m in modules)
