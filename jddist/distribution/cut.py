"""Which columns of the Jacobian a rank holds when the parameters themselves are sharded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Shard

from .collectives import Group, column_bounds

# Where rows live that are cut as their parameters are.
COLUMNS = Shard(1)


@dataclass(frozen=True, eq=False)
class ColumnCut:
    """This rank's columns of some tensors, one after the other.

    Of a DTensor they are those of its own shard, of any other tensor, which all ranks hold alike,
    an equal share.

    Attributes:
        tensors: The tensors.
        group: The ranks over which the columns are cut.
    """

    tensors: Sequence[Tensor]
    group: Group

    @property
    def total(self) -> int:
        """n, the number of columns over all ranks."""
        return sum(t.numel() for t in self.tensors)

    def columns(self, jacs: Sequence[Tensor | None], num_rows: int, dtype: torch.dtype) -> Tensor:
        """The rows' columns at hand: [m, n_r], zeros for tensors without rows."""
        pieces = []
        for tensor, jac in zip(self.tensors, jacs, strict=True):
            if jac is None:
                piece = tensor.new_zeros(0) if not isinstance(tensor, DTensor) else _local(tensor)
                piece = piece.new_zeros(num_rows, self._width(tensor), dtype=dtype)
            elif isinstance(jac, DTensor):
                piece = _local(jac).reshape(num_rows, self._width(tensor))
            else:
                start, stop = self._bounds(tensor)[self.group.rank]
                piece = jac.detach().reshape(num_rows, -1)[:, start:stop]
            pieces.append(piece.to(dtype))
        return torch.cat(pieces, dim=1)

    def gradients(self, vector: Tensor) -> list[Tensor]:
        """From every rank's part [n_r] of a vector to gradients like the tensors.

        Those of DTensors need no communication; the others are gathered together.
        """
        parts = list(vector.split([self._width(t) for t in self.tensors]))
        whole = [i for i, t in enumerate(self.tensors) if not isinstance(t, DTensor)]
        if whole and self.group.size > 1:
            self._gather(parts, whole)
        return [
            like(tensor, part.reshape(_shape(tensor)).to(tensor.dtype))
            for tensor, part in zip(self.tensors, parts, strict=True)
        ]

    def _gather(self, parts: list[Tensor], whole: Sequence[int]) -> None:
        """Replaces this rank's share of the tensors at ``whole`` by all of their columns."""
        bounds = [self._bounds(self.tensors[i]) for i in whole]
        widths = [[b[r][1] - b[r][0] for b in bounds] for r in range(self.group.size)]
        flat = torch.cat([parts[i] for i in whole])
        gathered = self.group.all_gather_uneven(flat, [sum(w) for w in widths])
        of_ranks = [g.split(w) for g, w in zip(gathered, widths, strict=True)]
        for position, i in enumerate(whole):
            parts[i] = torch.cat([of_rank[position] for of_rank in of_ranks])

    def _width(self, tensor: Tensor) -> int:
        if isinstance(tensor, DTensor):
            return _local(tensor).numel()
        start, stop = self._bounds(tensor)[self.group.rank]
        return stop - start

    def _bounds(self, tensor: Tensor) -> list[tuple[int, int]]:
        return column_bounds(tensor.numel(), self.group.size)


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


def shifted(tensor: DTensor) -> list[Placement]:
    """The placements of rows [m, *shape] of a sharded tensor."""
    return [Shard(p.dim + 1) if isinstance(p, Shard) else p for p in tensor.placements]


def new_rows(tensor: Tensor, num_rows: int) -> Tensor:
    """Zeros [m, *shape of this rank's part]."""
    local = _local(tensor) if isinstance(tensor, DTensor) else tensor
    return torch.zeros(num_rows, *local.shape, dtype=local.dtype, device=local.device)


def part_of(tensor: Tensor) -> Tensor:
    """This rank's part of a gradient."""
    return _local(tensor) if isinstance(tensor, DTensor) else tensor


def _shape(tensor: Tensor) -> torch.Size:
    return _local(tensor).shape if isinstance(tensor, DTensor) else tensor.shape


def _local(tensor: DTensor) -> Tensor:
    return tensor.to_local().detach()
