"""The seam through which an aggregator may act on a part of the Jacobian's columns.

An aggregator is handed all rows but perhaps only some columns of J. It never asks where the others
are: what needs them goes through the current `Columns`, which are the whole ones unless a caller
says otherwise with `acting_on`. A tensor that knows its shards itself, such as a DTensor, is handed
to the function that `register_sharded` was given for its type.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import ClassVar, TypeAlias

from torch import Tensor, nn


class Columns(ABC):
    """The columns of J at hand, and how to learn what the other shards' columns contribute."""

    @abstractmethod
    def total(self, width: int) -> int:
        """n, the number of all columns.

        Args:
            width: The number of columns at hand.
        """

    @abstractmethod
    def among(self, width: int, first: int, last: int) -> tuple[slice, slice | Tensor]:
        """Which columns at hand are among the columns ``first`` to ``last`` of J, in its order.

        Args:
            width: The number of columns at hand.
            first: A column of J.
            last: The column after the last one in question.

        Returns:
            The columns at hand, and for each of them its place in ``range(last - first)``.
        """

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

    @abstractmethod
    def pack(self, columns: Tensor) -> Tensor:
        """Makes a tensor [m, n] of the columns [m, n_r] of all shards, without sending anything."""

    @abstractmethod
    def unpack(self, packed: Tensor) -> Tensor:
        """The columns at hand, [m, n_r], of what `pack` made here or in another process.

        Raises:
            ValueError: They are not here.
        """


class WholeColumns(Columns):
    """All columns are here: nothing to add, nothing to share."""

    def total(self, width: int) -> int:
        return width

    def among(self, width: int, first: int, last: int) -> tuple[slice, slice | Tensor]:
        return slice(first, last), slice(0, last - first)

    def sum(self, partial: Tensor) -> Tensor:
        return partial

    def weigh(self, weighting: Callable[[Tensor], Tensor], statistic: Tensor) -> Tensor:
        return weighting(statistic)

    def pack(self, columns: Tensor) -> Tensor:
        return columns

    def unpack(self, packed: Tensor) -> Tensor:
        if type(packed) is not Tensor:
            raise ValueError(
                f"Found a state that is spread over ranks (a {type(packed).__name__}) where all "
                "columns are in one process; expected a plain tensor. Load the checkpoint with "
                "torch.distributed.checkpoint, after jddist.autojac.allocate_state."
            )
        return packed


def overlap(start: int, stop: int, first: int, last: int) -> tuple[slice, slice]:
    """`Columns.among` for the columns from `start` to `stop` of J."""
    low, high = max(start, first), max(min(stop, last), start, first)
    return slice(low - start, high - start), slice(low - first, high - first)


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


# Calls an aggregator on a Jacobian that knows its shards.
Runner: TypeAlias = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]

_runners: dict[type[Tensor], Runner] = {}


def register_sharded(kind: type[Tensor], run: Runner) -> None:
    """Makes aggregators accept Jacobians of a type that knows its shards.

    Args:
        kind: The type.
        run: Called with an aggregator and such a Jacobian [m, n]; calls the aggregator on this
            shard's columns within `acting_on`, and makes a vector [n] of that type of the result.
    """
    _runners[kind] = run


def runner_of(matrix: Tensor) -> Runner | None:
    """What was registered for the type of `matrix`, or None."""
    return next((run for kind, run in _runners.items() if isinstance(matrix, kind)), None)


class UsesSettings(nn.Module):
    """Mixin of modules that every shard runs by itself, so that their settings must be the same.

    Attributes:
        settings: The names of the attributes: numbers, tensors or None.
    """

    settings: ClassVar[tuple[str, ...]]


def settings_of(module: nn.Module) -> list[object]:
    """The settings of the module and its submodules that every shard uses, as JSON values."""
    found: list[object] = []
    for part in module.modules():
        if isinstance(part, UsesSettings):
            values = [getattr(part, name) for name in part.settings]
            found += [v.detach().tolist() if isinstance(v, Tensor) else v for v in values]
    return found
