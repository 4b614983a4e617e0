"""Which elements of a tensor each rank holds, on a mesh of ranks over which columns are cut.

A rank holds a box of a tensor: an interval of every dimension. A box that several ranks hold alike
is dealt out among them in equal shares, so that every element is a column of exactly one rank.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from .collectives import Group, column_bounds

_Index = TypeVar("_Index", int, Tensor)


@dataclass(frozen=True, eq=False)
class Grid:
    """The ranks over which columns are cut.

    Attributes:
        group: All of them, in row-major order of their coordinates.
        dims: For each dimension, the ranks that differ from this one in that coordinate alone.
    """

    group: Group
    dims: tuple[Group, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The number of ranks along each dimension."""
        return tuple(dim.size for dim in self.dims)

    def coordinate(self, rank: int) -> list[int]:
        """Where a rank of the group is."""
        place = []
        for size in reversed(self.shape):
            place.append(rank % size)
            rank //= size
        return place[::-1]

    def along(self, dims: Sequence[int]) -> Group:
        """The ranks that differ from this one in some of the coordinates."""
        if len(dims) == len(self.dims):
            return self.group
        assert len(dims) == 1  # of two dimensions one, or none
        return self.dims[dims[0]]


class Holding:
    """What the ranks of a grid hold of one tensor.

    Args:
        tensor: A DTensor, sharded over some dimensions of the grid or none; or any other tensor,
            which all ranks hold alike. What it is sharded over beside the grid is put together
            again.
        grid: The ranks.
    """

    def __init__(self, tensor: Tensor, grid: Grid) -> None:
        self._shape = tuple(tensor.shape)
        self._grid = grid
        cuts: list[tuple[bool, int, int]] = []
        if isinstance(tensor, DTensor):
            for along, placement in enumerate(tensor.placements):
                if placement.is_replicate():
                    continue
                dim = _dim_of(grid, tensor.device_mesh.get_group(along))
                if dim is None:
                    continue
                # A strided shard was cut after the others: it cuts what they left.
                later = is_strided(placement)
                cuts.append((later, placement.dim, dim))  # type: ignore[attr-defined]
        self._cuts = [(dim, along) for _, dim, along in sorted(cuts, key=lambda cut: cut[0])]
        over = {along for _, along in self._cuts}
        self.alike = tuple(dim for dim in range(len(grid.dims)) if dim not in over)
        """The dimensions of the grid along which ranks hold the same box."""

    def box(self, rank: int) -> list[tuple[int, int]]:
        """The interval of each dimension of the tensor that a rank holds."""
        box = [(0, size) for size in self._shape]
        place = self._grid.coordinate(rank)
        for dim, along in self._cuts:
            low, high = box[dim]
            start, stop = column_bounds(high - low, self._grid.shape[along])[place[along]]
            box[dim] = (low + start, low + stop)
        return box

    def share(self, rank: int) -> tuple[int, int]:
        """Which of the elements of its box, in order, are a rank's columns."""
        held = prod(high - low for low, high in self.box(rank))
        place, parts, index = self._grid.coordinate(rank), 1, 0
        for along in self.alike:
            parts *= self._grid.shape[along]
            index = index * self._grid.shape[along] + place[along]
        return column_bounds(held, parts)[index]

    @cached_property
    def mine(self) -> tuple[int, int]:
        """This rank's share."""
        return self.share(self._grid.group.rank)

    @property
    def width(self) -> int:
        """The number of this rank's columns."""
        start, stop = self.mine
        return stop - start

    def among(self, first: int, last: int) -> tuple[slice, Tensor]:
        """Which of this rank's columns are among the elements ``first`` to ``last`` of the tensor,
        and where those are; in no more memory than these take."""
        start, stop = self.mine
        low = bisect_left(range(start, stop), first, key=self._place)
        high = bisect_left(range(start, stop), last, key=self._place)
        return slice(low, high), self._place(torch.arange(start + low, start + high))

    @cached_property
    def _steps(self) -> list[tuple[int, int, int]]:
        """For each dimension, the last one first: the interval of this rank's box that begins with
        the first number and has the length of the second, and the tensor's stride."""
        steps, stride = [], 1
        for size, (low, high) in zip(
            reversed(self._shape), reversed(self.box(self._grid.group.rank)), strict=True
        ):
            steps.append((low, high - low, stride))
            stride *= size
        return steps

    def _place(self, index: _Index) -> _Index:
        """Where elements of this rank's box, by their number in it, are among all."""
        place = index * 0
        for low, width, stride in self._steps:
            place = place + (low + index % width) * stride
            index = index // width
        return place

    def interval(self, rank: int) -> range | None:
        """The places of a rank's columns among all elements of the tensor, if they have no gaps."""
        box = self.box(rank)
        if any(cut != (0, size) for cut, size in zip(box[1:], self._shape[1:], strict=True)):
            return None
        first = box[0][0] * prod(self._shape[1:]) if box else 0
        start, stop = self.share(rank)
        return range(first + start, first + stop)

    def places(self, rank: int) -> Tensor:
        """The places of a rank's columns among all elements of the tensor, ascending."""
        places = torch.zeros((), dtype=torch.int64)
        for size, (low, high) in zip(self._shape, self.box(rank), strict=True):
            places = places.unsqueeze(-1) * size + torch.arange(low, high)
        start, stop = self.share(rank)
        return places.reshape(-1)[start:stop]


def is_strided(placement: Any) -> bool:
    """Whether it is the shard of a shard: a type of its own, which denies that it is a shard."""
    return hasattr(placement, "split_factor")


def is_cut_over(tensor: Tensor, group: Group) -> bool:
    """Whether a tensor is sharded over the ranks of a group, a dimension of its mesh."""
    if not isinstance(tensor, DTensor):
        return False
    ranks = ranks_of(group)
    return any(
        not placement.is_replicate()
        and dist.get_process_group_ranks(tensor.device_mesh.get_group(along)) == ranks
        for along, placement in enumerate(tensor.placements)
    )


def ranks_of(group: Group) -> list[int] | None:
    """The ranks of a group among all that run; None for a process alone."""
    if group.process_group is None:
        return None
    return list(dist.get_process_group_ranks(group.process_group))


def _dim_of(grid: Grid, process_group: dist.ProcessGroup) -> int | None:
    ranks = list(dist.get_process_group_ranks(process_group))
    found = (dim for dim, group in enumerate(grid.dims) if ranks_of(group) == ranks)
    return next(found, None)
