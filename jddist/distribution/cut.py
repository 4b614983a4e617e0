"""Which columns of the Jacobian a rank holds when the parameters themselves are sharded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from .grid import Grid, Holding
from .lockstep import settled, shifted

# Where rows live that are cut as their parameters are.
COLUMNS = Shard(1)


class ColumnCut:
    """This rank's columns of some tensors, one after the other.

    Of a DTensor they are those of its own shard, or its share of a shard that several ranks hold
    alike; of any other tensor, which all ranks hold alike, an equal share.

    Args:
        tensors: The tensors.
        grid: The ranks over which the columns are cut.
    """

    def __init__(self, tensors: Sequence[Tensor], grid: Grid) -> None:
        self.tensors = tensors
        self._grid = grid
        self._holdings = [Holding(tensor, grid) for tensor in tensors]

    @property
    def total(self) -> int:
        """n, the number of columns over all ranks."""
        return sum(t.numel() for t in self.tensors)

    def columns(self, jacs: Sequence[Tensor | None], num_rows: int, dtype: torch.dtype) -> Tensor:
        """The rows' columns at hand: [m, n_r], zeros for tensors without rows.

        What ``adjacent_rows`` made in the order of the tensors is not copied."""
        pieces = []
        for tensor, jac, holding in zip(self.tensors, jacs, self._holdings, strict=True):
            if jac is None:
                piece = part_of(tensor).new_zeros(num_rows, holding.width, dtype=dtype)
            else:
                start, stop = holding.mine
                local = part_of(jac.detach())
                piece = local.reshape(num_rows, local.shape[1:].numel())[:, start:stop]
            pieces.append(piece.to(dtype))
        return _joined(pieces)

    def among(self, first: int, last: int) -> tuple[slice, Tensor]:
        """Which of the columns at hand are among the columns ``first`` to ``last`` of all, in the
        tensors' order, and the places of those in that range."""
        before = offset = 0
        start: int | None = None
        found = []
        for tensor, holding in zip(self.tensors, self._holdings, strict=True):
            low, high = max(first - offset, 0), min(last - offset, tensor.numel())
            if low < high and holding.width:
                here, places = holding.among(low, high)
                start = before + here.start if start is None else start
                found.append(places + (offset - first))
            before += holding.width
            offset += tensor.numel()
        joined = torch.cat(found) if found else torch.zeros(0, dtype=torch.int64)
        start = start or 0
        return slice(start, start + len(joined)), joined

    def gradients(self, vector: Tensor) -> list[Tensor]:
        """From every rank's part [n_r] of a vector to gradients like the tensors.

        Those of shards need no communication; what several ranks hold alike is gathered.
        """
        parts = list(vector.split([holding.width for holding in self._holdings]))
        alike: dict[tuple[int, ...], list[int]] = {}
        for i, holding in enumerate(self._holdings):
            if holding.alike:
                alike.setdefault(holding.alike, []).append(i)
        for dims, indices in alike.items():
            self._gather(parts, dims, indices)
        return [
            like(tensor, part.reshape(_shape(tensor)).to(tensor.dtype))
            for tensor, part in zip(self.tensors, parts, strict=True)
        ]

    def _gather(self, parts: list[Tensor], dims: Sequence[int], indices: Sequence[int]) -> None:
        """Replaces this rank's shares of tensors that are alike along some dimensions of the grid
        by all that the rank holds of them."""
        group = self._grid.along(dims)
        if group.size == 1:
            return
        bounds = [self._shares(i, dims) for i in indices]
        widths = [[b[r][1] - b[r][0] for b in bounds] for r in range(group.size)]
        flat = torch.cat([parts[i] for i in indices])
        gathered = group.all_gather_uneven(flat, [sum(w) for w in widths])
        of_ranks = [g.split(w) for g, w in zip(gathered, widths, strict=True)]
        for position, i in enumerate(indices):
            parts[i] = torch.cat([of_rank[position] for of_rank in of_ranks])

    def _shares(self, index: int, dims: Sequence[int]) -> list[tuple[int, int]]:
        """The shares of the ranks that hold the same box as this one, in their order."""
        grid, holding = self._grid, self._holdings[index]
        here = grid.coordinate(grid.group.rank)
        return [
            holding.share(rank)
            for rank in range(grid.group.size)
            if all(a == b or d in dims for d, (a, b) in enumerate(_pairs(here, grid, rank)))
        ]


def check_is_cut(tensors: Sequence[Tensor], jacs: Sequence[Tensor | None]) -> None:
    """Raises ValueError unless the rows of sharded tensors are sharded alike."""
    for tensor, jac in zip(tensors, jacs, strict=True):
        if not isinstance(tensor, DTensor) or jac is None:
            continue
        expected = tuple(shifted(tensor))
        if (
            not isinstance(jac, DTensor)
            or jac.device_mesh != tensor.device_mesh
            or jac.placements != expected
        ):
            found = jac.placements if isinstance(jac, DTensor) else type(jac).__name__
            raise ValueError(
                f"Found a .jac of a sharded parameter of shape {tuple(tensor.shape)} that is "
                f"placed as {found}; expected a DTensor placed as {expected}, as backward and "
                "mtl_backward make it."
            )


def like(tensor: Tensor, local: Tensor) -> Tensor:
    """This rank's part of a gradient as a gradient of ``tensor``, in its own placements."""
    if not isinstance(tensor, DTensor):
        return local
    return DTensor.from_local(
        local,
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def rows_like(tensor: Tensor, local: Tensor) -> Tensor:
    """This rank's part [m, ...] of rows as rows of ``tensor``, sharded one dimension later."""
    if not isinstance(tensor, DTensor):
        return local
    shape = torch.Size([len(local), *tensor.shape])
    return DTensor.from_local(
        local,
        tensor.device_mesh,
        shifted(tensor),
        run_check=False,
        shape=shape,
        stride=(tensor.numel(), *torch.empty(tensor.shape, device="meta").stride()),
    )


def new_rows(tensor: Tensor, num_rows: int) -> Tensor:
    """Zeros [m, *shape of this rank's part]."""
    local = part_of(tensor)
    return torch.zeros(num_rows, *local.shape, dtype=local.dtype, device=local.device)


def adjacent_rows(tensors: Sequence[Tensor], num_rows: int) -> list[Tensor]:
    """``new_rows`` of several tensors, side by side in one matrix for each kind of them."""
    parts = [part_of(tensor) for tensor in tensors]
    widths: dict[tuple[torch.dtype, torch.device], int] = {}
    for part in parts:
        kind = (part.dtype, part.device)
        widths[kind] = widths.get(kind, 0) + part.numel()
    matrices = {
        kind: torch.zeros(num_rows, width, dtype=kind[0], device=kind[1])
        for kind, width in widths.items()
    }
    starts = dict.fromkeys(widths, 0)
    rows = []
    for part in parts:
        kind = (part.dtype, part.device)
        start = starts[kind]
        starts[kind] = stop = start + part.numel()
        rows.append(matrices[kind][:, start:stop].view(num_rows, *part.shape))
    return rows


def _joined(pieces: Sequence[Tensor]) -> Tensor:
    """Matrices side by side; if they lie so in memory already, as a view of it."""
    filled = [piece for piece in pieces if piece.numel()]
    if not filled:
        return torch.cat(list(pieces), dim=1)
    first, at = filled[0], filled[0].storage_offset()
    for piece in filled:
        same = piece.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (same and piece.dtype == first.dtype and piece.storage_offset() == at):
            return torch.cat(list(pieces), dim=1)
        between, within = piece.stride()  # within one column there is no next one
        if between != first.stride(0) or (within != 1 and piece.shape[1] > 1):
            return torch.cat(list(pieces), dim=1)
        at += piece.shape[1]
    width = at - first.storage_offset()
    return first.as_strided((len(first), width), (first.stride(0), 1))


def part_of(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return settled(tensor.to_local().detach()) if isinstance(tensor, DTensor) else tensor


def _shape(tensor: Tensor) -> torch.Size:
    return part_of(tensor).shape


def _pairs(here: Sequence[int], grid: Grid, rank: int) -> list[tuple[int, int]]:
    return list(zip(here, grid.coordinate(rank), strict=True))
