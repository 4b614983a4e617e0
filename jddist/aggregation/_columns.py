"""The seam through which an aggregator may act on a part of the Jacobian's columns.

An aggregator is handed all rows but perhaps only some columns of J. It never asks where the others
are: what needs them goes through the current `Columns`, which are the whole ones unless a caller
says otherwise with `acting_on`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor


class Columns(ABC):
    """The columns of J at hand, and how to learn what the other shards' columns contribute."""

    @abstractmethod
    def sum(self, partial: Tensor) -> Tensor:
        """Adds a statistic that is a sum over columns over all the shards.

        Args:
            partial: This shard's part, of the same shape on all shards.
        """

    @abstractmethod
    def weigh(self, weighting: Callable[[Tensor], Tensor], statistic: Tensor) -> Tensor:
        """Gives all shards the same weights [m], from one run of `weighting`.

        Args:
            weighting: Maps the statistic to weights.
            statistic: A tensor that is the same on all shards.
        """


class WholeColumns(Columns):
    """All columns are here: nothing to add, nothing to share."""

    def sum(self, partial: Tensor) -> Tensor:
        return partial

    def weigh(self, weighting: Callable[[Tensor], Tensor], statistic: Tensor) -> Tensor:
        return weighting(statistic)


_current: ContextVar[Columns] = ContextVar("jddist_columns", default=WholeColumns())  # noqa: B039


def current_columns() -> Columns:
    """The columns that aggregators called from here act on."""
    return _current.get()


@contextmanager
def acting_on(columns: Columns) -> Iterator[None]:
    """Within this context, aggregators act on `columns`."""
    token = _current.set(columns)
    try:
        yield
    finally:
        _current.reset(token)


def weigh(weighting: Callable[[Tensor], Tensor], statistic: Tensor) -> Tensor:
    """`Columns.weigh` of the current columns.

    The statistic describes J as a whole, so inside `weighting` the columns are the whole ones: a
    weighting run on one shard alone must not wait for the others.
    """
    columns = current_columns()
    if type(columns) is WholeColumns:
        return weighting(statistic)
    with acting_on(WholeColumns()):
        return columns.weigh(weighting, statistic)
