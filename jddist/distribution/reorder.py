"""Columns in the model's order, for aggregators that ask where theirs are among all of them.

The shards of several tensors lie one after the other on each rank; column j of the Jacobian is then
anywhere. Here they move to equal shards of all columns in order, and the result moves back.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .collectives import column_bounds
from .grid import Grid, Holding

# In how many messages rows move.
MESSAGES = 4


class ColumnOrder:
    """The way of every column from its tensor's shard to its place in order.

    Args:
        tensors: Tensors, sharded over the grid, or held alike and dealt out in shares.
        grid: The ranks over which they are cut.
    """

    def __init__(self, tensors: Sequence[Tensor], grid: Grid) -> None:
        self._group = grid.group
        self._holdings = [(tensor.numel(), Holding(tensor, grid)) for tensor in tensors]
        self._targets = column_bounds(sum(t.numel() for t in tensors), grid.group.size)

    def to_order(self, columns: Tensor) -> Tensor:
        """From the shards' columns [m, n_r] to this rank's share of all columns [m, p_r]."""
        sent, places = [], []
        first, last = self._targets[self._group.rank]
        mine = self._places(self._group.rank)
        for other in range(self._group.size):
            sent.append(columns[:, _within(mine, *self._targets[other])])
            theirs = self._places(other)
            places.append(theirs[_within(theirs, first, last)] - first)
        return self._move(sent, list(places), columns.new_empty(len(columns), last - first))

    def from_order(self, vector: Tensor) -> Tensor:
        """From this rank's share of a vector [p_r] to the shards' parts of it [n_r]."""
        columns = vector.unsqueeze(0)
        sent, places = [], []
        first, last = self._targets[self._group.rank]
        mine = self._places(self._group.rank)
        for other in range(self._group.size):
            theirs = self._places(other)
            wanted = theirs[_within(theirs, first, last)] - first
            sent.append(columns[:, wanted.to(vector.device)])
            where = _within(mine, *self._targets[other])
            places.append(torch.arange(where.start, where.stop))
        return self._move(sent, places, columns.new_empty(1, len(mine))).squeeze(0)

    def _move(self, sent: Sequence[Tensor], places: Sequence[Tensor], moved: Tensor) -> Tensor:
        """Sends each rank its columns; those that come go to their ``places`` in ``moved``.

        In some messages, so that what is under way is a part of the rows alone.
        """
        at_once = max(1, -(-len(moved) // MESSAGES))
        places = [where.to(moved.device) for where in places]
        for start in range(0, len(moved), at_once):
            rows = moved[start : start + at_once]
            counts = [len(rows) * len(where) for where in places]
            parts = [part[start : start + at_once].reshape(-1) for part in sent]
            wait = self._group.exchange(parts, counts)
            for part, where in zip(wait().split(counts), places, strict=True):
                rows[:, where] = part.view(len(rows), len(where))
        return moved

    def _places(self, rank: int) -> Tensor:
        """The places of a rank's columns among all columns, ascending."""
        pieces, offset = [], 0
        for total, holding in self._holdings:
            pieces.append(holding.places(rank) + offset)
            offset += total
        return torch.cat(pieces)


def _within(places: Tensor, first: int, last: int) -> slice:
    """Which of some ascending places lie in a range."""
    start, stop = torch.searchsorted(places, torch.tensor([first, last])).tolist()
    return slice(start, stop)
