"""Columns in the model's order, for aggregators that ask where theirs are among all of them.

The shards of several tensors lie one after the other on each rank; column j of the Jacobian is then
anywhere. Here they move to equal shards of all columns in order, and the result moves back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from .collectives import Group, column_bounds

# Where a piece of columns is in the owner's shards, and where in the target's.
Piece = tuple[slice, slice]


class ColumnOrder:
    """The way of every column from its tensor's shard to its place in order.

    Args:
        tensors: Tensors, sharded along their first dimension or held in equal shares.
        group: The ranks over which they are cut.

    Raises:
        ValueError: A tensor is sharded along another dimension.
    """

    def __init__(self, tensors: Sequence[Tensor], group: Group) -> None:
        self._group = group
        self._spans: list[list[tuple[int, int]]] = [[] for _ in range(group.size)]
        offset = 0
        for tensor in tensors:
            for spans, (start, stop) in zip(self._spans, _bounds(tensor, group.size), strict=True):
                spans.append((offset + start, offset + stop))
            offset += tensor.numel()
        self._targets = column_bounds(offset, group.size)

    def to_order(self, columns: Tensor) -> Tensor:
        """From the shards' columns [m, n_r] to this rank's share of all columns [m, p_r]."""
        return self._move(columns, back=False)

    def from_order(self, vector: Tensor) -> Tensor:
        """From this rank's share of a vector [p_r] to the shards' parts of it [n_r]."""
        return self._move(vector.unsqueeze(0), back=True).squeeze(0)

    def _move(self, columns: Tensor, *, back: bool) -> Tensor:
        rank, m = self._group.rank, len(columns)
        sent, places, counts = [], [], []
        for other in range(self._group.size):
            mine, theirs = list(self._pieces(rank, other)), list(self._pieces(other, rank))
            outgoing = [p[1] for p in theirs] if back else [p[0] for p in mine]
            incoming = [p[0] for p in mine] if back else [p[1] for p in theirs]
            sent.append(torch.cat([columns[:, :0], *(columns[:, s] for s in outgoing)], dim=1))
            places.append(incoming)
            counts.append(m * sum(s.stop - s.start for s in incoming))
        wait = self._group.exchange([part.reshape(-1) for part in sent], counts)
        received = wait().split(counts)
        moved = columns.new_empty(m, sum(counts) // max(1, m))
        for part, slices in zip(received, places, strict=True):
            widths = [s.stop - s.start for s in slices]
            for piece, where in zip(
                part.view(m, sum(widths)).split(widths, 1), slices, strict=True
            ):
                moved[:, where] = piece
        return moved

    def _pieces(self, owner: int, target: int) -> Iterator[Piece]:
        first, last = self._targets[target]
        at = 0
        for start, stop in self._spans[owner]:
            low, high = max(start, first), min(stop, last)
            if low < high:
                yield (
                    slice(at + low - start, at + high - start),
                    slice(low - first, high - first),
                )
            at += stop - start


def _bounds(tensor: Tensor, parts: int) -> list[tuple[int, int]]:
    """The elements of a tensor that each rank holds."""
    if not isinstance(tensor, DTensor):
        return column_bounds(tensor.numel(), parts)
    if tensor.placements[-1] != Shard(0):
        raise ValueError(
            f"Found a parameter placed as {tensor.placements}; expected Shard(0), for an "
            "aggregator that depends on the order of the Jacobian's columns. Leave out "
            "fully_shard's shard_placement_fn."
        )
    lines = tensor.shape[0]
    width = tensor.numel() // max(1, lines)
    return [(start * width, stop * width) for start, stop in column_bounds(lines, parts)]
