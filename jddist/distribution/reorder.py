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
            sent.append([columns[:, _within(mine, *self._targets[other])[0]]])
            places.append(_within(self._places(other), first, last)[1])
        return self._move(sent, places, columns.new_empty(len(columns), last - first))

    def from_order(self, vector: Tensor) -> Tensor:
        """From this rank's share of a vector [p_r] to the shards' parts of it [n_r]."""
        columns = vector.unsqueeze(0)
        sent, places = [], []
        first, last = self._targets[self._group.rank]
        mine = self._places(self._group.rank)
        for other in range(self._group.size):
            wanted = _within(self._places(other), first, last)[1]
            sent.append([columns[:, where] for where in _indices(wanted, vector)])
            here = _within(mine, *self._targets[other])[0]
            places.append([range(here.start, here.stop)])
        width = sum(map(len, mine))
        return self._move(sent, places, columns.new_empty(1, width)).squeeze(0)

    def _move(
        self,
        sent: Sequence[Sequence[Tensor]],
        places: Sequence[Sequence[range | Tensor]],
        moved: Tensor,
    ) -> Tensor:
        """Sends each rank its columns; those that come go to their ``places`` in ``moved``.

        In some messages, so that what is under way is a part of the rows alone.
        """
        at_once = max(1, -(-len(moved) // MESSAGES))
        widths = [sum(map(len, of_rank)) for of_rank in places]
        for start in range(0, len(moved), at_once):
            rows = moved[start : start + at_once]
            parts = [
                _flat([p[start : start + at_once] for p in of_rank], moved) for of_rank in sent
            ]
            wait = self._group.exchange(parts, [len(rows) * width for width in widths])
            received = wait().split([len(rows) * width for width in widths])
            for part, width, of_rank in zip(received, widths, places, strict=True):
                pieces = part.view(len(rows), width).split([len(where) for where in of_rank], dim=1)
                for piece, where in zip(pieces, _indices(of_rank, moved), strict=True):
                    rows[:, where] = piece
        return moved

    def _places(self, rank: int) -> list[range | Tensor]:
        """The places of a rank's columns among all columns, ascending, of each tensor."""
        pieces: list[range | Tensor] = []
        offset = 0
        for total, holding in self._holdings:
            interval = holding.interval(rank)
            if interval is None:
                pieces.append(holding.places(rank) + offset)
            else:
                pieces.append(range(interval.start + offset, interval.stop + offset))
            offset += total
        return pieces


def _within(
    pieces: Sequence[range | Tensor], first: int, last: int
) -> tuple[slice, list[range | Tensor]]:
    """Which columns have places from ``first`` to ``last``, and these places, less ``first``."""
    begin = end = at = 0
    found: list[range | Tensor] = []
    for piece in pieces:
        clipped: range | Tensor
        if isinstance(piece, range):
            low = min(max(first - piece.start, 0), len(piece))
            high = min(max(last - piece.start, low), len(piece))
            clipped = range(piece.start + low - first, piece.start + high - first)
        else:
            low, high = torch.searchsorted(piece, torch.tensor([first, last])).tolist()
            clipped = piece[low:high] - first
        if low < high:
            begin = begin if found else at + low
            end = at + high
            found.append(clipped)
        at += len(piece)
    return slice(begin, end), found


def _indices(places: Sequence[range | Tensor], like: Tensor) -> list[slice | Tensor]:
    return [
        slice(where.start, where.stop) if isinstance(where, range) else where.to(like.device)
        for where in places
    ]


def _flat(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    """Some columns of the same rows, row by row."""
    if len(parts) == 1:
        return parts[0].reshape(-1)
    return torch.cat(list(parts), dim=1).reshape(-1) if parts else like.new_empty(0)
